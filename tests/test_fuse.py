"""Fusing: what it refuses and in which words, and that a refusal changes nothing."""

import copy
import logging
import pickle

import pytest
import torch
from models import as_on_gpu, tiny_model, token_ids
from torch import nn
from torch.autograd import forward_ad
from transformers.activations import ACT2FN, AccurateGELUActivation, GELUActivation, GELUTanh, SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_fused_mlp import MLPSpec, fuse_model, fusion_report, register_mlp, unfuse_model
from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.families.mlp.fused import FusedMLP
from hf_fused_mlp.reading.activations import find_activation
from hf_fused_mlp.reading.mlp import MLP_SPECS


def first_mlp(model):
    return model.model.layers[0].mlp


def fused_count(model):
    return sum(isinstance(module, FusedMLP) for module in model.modules())


class LeakySiLU(SiLUActivation):
    def forward(self, x):
        return super().forward(x) + 0.01 * x


class DoublingMLP(LlamaMLP):
    def forward(self, x):
        return 2 * super().forward(x)


def patch_forward(mlp):
    mlp.forward = lambda x: x


def change_class(mlp):
    mlp.__class__ = DoublingMLP


def replace_activation(mlp):
    mlp.act_fn = LeakySiLU()


def mix_dtypes(mlp):
    mlp.up_proj.double()


def put_on_meta(mlp):
    mlp.down_proj.to("meta")


def shrink(mlp):
    mlp.up_proj = nn.Linear(64, 100, bias=False)


BAD_INPUT = pytest.mark.parametrize(
    "damage, words",
    [
        (patch_forward, ["forward was replaced"]),
        (change_class, ["subclass of LlamaMLP", "register_mlp(DoublingMLP"]),
        (replace_activation, ["act_fn is LeakySiLU", "silu"]),
        (mix_dtypes, ["differ in dtype", "up_proj.weight torch.float64"]),
        (put_on_meta, ["down_proj has its weight on meta", "device_map"]),
        (shrink, ["shapes do not fit", "up_proj [100, 64]"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)


@BAD_INPUT
def test_strict_names_the_module_the_value_and_the_remedy(damage, words):
    model = tiny_model()
    damage(first_mlp(model))
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError) as caught:
        fuse_model(model, strict=True)
    for word in ["model.layers.0.mlp", *words]:
        assert word in str(caught.value)
    assert [type(module) for module in model.modules()] == classes
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers


@BAD_INPUT
def test_without_strict_the_rest_is_fused_and_the_skip_is_logged(damage, words, caplog):
    model = tiny_model()
    damage(first_mlp(model))
    runs = damage not in (mix_dtypes, put_on_meta, shrink)  # the others do not run unfused either
    ids = token_ids(1, 5)
    before = model(ids).logits if runs else None
    with caplog.at_level(logging.WARNING, "hf_fused_mlp"):
        fuse_model(model)
    assert fused_count(model) == 1
    assert all(word in caplog.text for word in words)
    (skipped,) = fusion_report(model).select("skipped")
    assert skipped.name == "model.layers.0.mlp"
    if runs:
        assert torch.equal(model(ids).logits, before)


@pytest.mark.gpu
@torch.no_grad()
def test_what_the_kernels_do_not_take_runs_the_original_forward():
    mlp = fuse_model(copy.deepcopy(first_mlp(tiny_model())), strict=True).cuda()
    x = torch.randn(3, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert mlp(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        mlp(x.half())
    with pytest.raises(RuntimeError):
        mlp(x.cpu())
    mlp.up_proj.half()
    with pytest.raises((RuntimeError, ValueError)):
        mlp(x)


def test_unknown_architecture():
    """Apertus' MLP has an activation with weights: it is reported, and with strict it is an error."""
    model = tiny_model("apertus")
    with pytest.raises(ValueError, match=r"2 of 2 MLPs cannot be fused(.|\n)*model.layers.0.mlp \(ApertusMLP\)"):
        fuse_model(model, strict=True)
    fuse_model(model)
    assert fused_count(model) == 0
    assert {mlp.class_name for mlp in fusion_report(model).mlps} == {"ApertusMLP"}


def test_no_mlp_at_all(caplog):
    model = nn.Sequential(nn.Linear(4, 4))
    with caplog.at_level(logging.WARNING, "hf_fused_mlp"):
        fuse_model(model)
    assert "0 of 0 MLPs" in caplog.text
    with pytest.raises(ValueError, match="found no MLP"):
        fuse_model(model, strict=True)


def test_exclude():
    model = tiny_model()
    fuse_model(model, exclude=["model.layers.0.*"])
    assert [mlp.state for mlp in fusion_report(model).mlps] == ["fusable", "fused"]
    fuse_model(model)
    assert fused_count(model) == 2


@pytest.mark.parametrize("exclude, error", [("model.layers.0.mlp", TypeError), (["model.layer.0.mlp"], ValueError)])
def test_wrong_exclude(exclude, error):
    model = tiny_model()
    with pytest.raises(error, match="exclude"):
        fuse_model(model, exclude=exclude)
    assert fused_count(model) == 0


@pytest.mark.parametrize("model", ["gpt2", None, LlamaMLP], ids=str)
def test_not_a_module(model):
    with pytest.raises(TypeError, match=r"is not an nn\.Module"):
        fuse_model(model)


def test_a_patched_class_is_refused(monkeypatch):
    """A patch changes what every instance computes; the row was about the class as it was defined."""
    fused = fuse_model(tiny_model())
    with monkeypatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", lambda self, x: 2 * self.down_proj(x))
        with pytest.raises(ValueError, match="the forward of LlamaMLP was replaced by"):
            fuse_model(tiny_model(), strict=True)
        assert "was replaced by" in fusion_report(fused).mlps[0].reason
    fuse_model(tiny_model(), strict=True)


def test_a_registered_class_defined_again_is_another_class():
    def define(factor):
        class Cell(LlamaMLP):
            def forward(self, x):
                return factor * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

        return Cell

    first, second = define(1), define(2)
    register_mlp(first, MLPSpec("gated", gate="gate_proj", up="up_proj", down="down_proj", activation="act_fn"))
    try:
        for cls, fusable in ((first, 1), (second, 0)):
            model = tiny_model()
            first_mlp(model).__class__ = cls
            fuse_model(model, exclude=["model.layers.1.mlp"])
            assert fused_count(model) == fusable
    finally:
        del MLP_SPECS[first]


def test_transforms_run_the_original_forward(monkeypatch):
    as_on_gpu(monkeypatch)
    mlp = first_mlp(fuse_model(tiny_model()))
    x = torch.randn(2, 64)

    def original(x):
        return LlamaMLP.forward(mlp, x)

    for fused, plain in zip(torch.func.jvp(mlp, (x,), (x,)), torch.func.jvp(original, (x,), (x,)), strict=True):
        torch.testing.assert_close(fused, plain)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(mlp(forward_ad.make_dual(x, x))).tangent is not None
    torch.testing.assert_close(
        torch.func.grad(lambda x: mlp(x).sum())(x), torch.func.grad(lambda x: original(x).sum())(x)
    )


def test_twice_is_once():
    model = fuse_model(fuse_model(tiny_model()))
    assert [mlp.class_name for mlp in fusion_report(model).mlps] == ["LlamaMLP", "LlamaMLP"]
    unfuse_model(unfuse_model(model))
    assert fused_count(model) == 0


def test_failure_half_way_fuses_nothing(monkeypatch):

    model, calls = tiny_model(), []

    def pack_once(gate, up):
        calls.append(gate)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return []

    as_on_gpu(monkeypatch)
    monkeypatch.setattr("hf_fused_mlp.families.mlp.fused.pack", pack_once)
    with pytest.raises(KeyboardInterrupt):
        fuse_model(model)
    assert fused_count(model) == 0


def test_shared_module_is_fused_once():
    model = tiny_model()
    model.model.layers[1].mlp = first_mlp(model)
    fuse_model(model, strict=True)
    assert isinstance(model.model.layers[1].mlp, FusedMLP)
    assert model.model.layers[1].mlp is first_mlp(model)
    unfuse_model(model)
    assert type(first_mlp(model)) is LlamaMLP


def test_a_fused_module_is_still_what_it_was():
    model = tiny_model()
    mlp, keys = first_mlp(model), set(vars(first_mlp(model)))
    seen = []
    mlp.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    fuse_model(model)
    assert first_mlp(model) is mlp
    assert isinstance(mlp, LlamaMLP)
    assert set(vars(mlp)) == keys
    assert "(mlp): FusedLlamaMLP(" in str(model)
    model(token_ids(1, 3))
    assert seen == ["LlamaMLP"]


def test_keyword_call_and_wrong_calls():
    mlp = fuse_model(copy.deepcopy(first_mlp(tiny_model())))
    x = torch.randn(2, 64)
    assert torch.equal(mlp(x=x), mlp(x))
    for args, kwargs in [((), {}), ((x, x), {}), ((x,), {"y": x}), ((), {"y": x})]:
        with pytest.raises(TypeError):
            mlp(*args, **kwargs)
    with pytest.raises(RuntimeError):
        mlp(torch.randn(2, 63))


def test_register_mlp_for_a_class_of_ones_own():
    class OwnMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
            self.act = nn.GELU(approximate="tanh")

        def forward(self, x):
            return self.c(self.act(self.a(x)) * self.b(x))

    mlp, x = OwnMLP().eval(), torch.randn(3, 8)
    expected = mlp(x)
    spec = MLPSpec("gated", gate="a", up="b", down="c", activation="act")
    register_mlp(OwnMLP, spec)
    try:
        fuse_model(mlp, strict=True)
        assert mlp.operands().activation == "gelu_tanh"
        assert torch.equal(mlp(x), expected)
    finally:
        del MLP_SPECS[OwnMLP]


@pytest.mark.parametrize(
    "call",
    [
        lambda: register_mlp("LlamaMLP", MLPSpec("plain", up="u", down="d", activation="a")),
        lambda: register_mlp(LlamaMLP, {"kind": "gated"}),
        lambda: MLPSpec("gated", up="u", down="d", activation="a"),
        lambda: MLPSpec("plain", gate="g", up="u", down="d", activation="a"),
        lambda: MLPSpec("round", up="u", down="d", activation="a"),
    ],
)
def test_wrong_registration(call):
    with pytest.raises((TypeError, ValueError)):
        call()


@pytest.mark.parametrize("name", [name for name in ACT2FN if name != "xielu"])
def test_activations_are_recognised_only_for_what_they_compute(name):
    """Every activation that Transformers names computes the row it is given, or is given none and equals none."""
    module, x = ACT2FN[name].double(), torch.randn(1000, dtype=torch.float64) * 8
    rows = [row.name for row in ACTIVATIONS.values() if torch.allclose(row.function(x), module(x))]
    assert rows == ([] if (found := find_activation(module)) is None else [found])


@pytest.mark.parametrize("make", [GELUActivation, GELUTanh, AccurateGELUActivation])
@pytest.mark.parametrize("value", [torch.tanh, nn.Tanh(), GELUActivation()._gelu_python, 0.5, None])
def test_an_activation_that_holds_something_else_is_unknown(make, value):
    module = make()
    (held,) = vars(module).keys() - vars(nn.Module()).keys()
    assert find_activation(module) is not None
    assert find_activation(copy.deepcopy(module)) is not None
    delattr(module, held)
    setattr(module, held, value)
    assert find_activation(module) is None


def test_a_block_with_stacked_weights_of_its_own_is_listed():
    """It has an MLP inside that fuses, and what else it computes does not."""

    class SparseMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.w1 = tiny_model().model.layers[0].mlp, nn.Parameter(torch.randn(4, 32, 16))

        def forward(self, x):
            return self.shared(x)

    model = nn.ModuleDict({"mlp": SparseMLP()})
    states = {mlp.name: (mlp.class_name, mlp.state) for mlp in fusion_report(model).mlps}
    assert states == {"mlp": ("SparseMLP", "skipped"), "mlp.shared": ("LlamaMLP", "fusable")}
    with pytest.raises(ValueError, match="routed experts"):
        fuse_model(model, strict=True)


def test_a_wrapped_mlp_that_is_unknown_is_listed_by_its_own_class():
    class SinMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.down(torch.sin(self.up(x)))

    (mlp,) = fusion_report(nn.ModuleDict({"mlp": torch.compile(SinMLP())})).mlps
    assert (mlp.class_name, mlp.state) == ("SinMLP", "skipped")


def test_a_name_with_brackets_can_be_excluded():
    model = nn.Module()
    model._modules["x[0]"] = tiny_model().model.layers[0].mlp
    fuse_model(model, exclude=["x[0]"])
    assert not fusion_report(model).select("fused")


def test_exclude_may_be_an_iterator():
    model = fuse_model(tiny_model(), exclude=(name for name in ["model.layers.0.mlp"]))
    assert [mlp.state for mlp in fusion_report(model).mlps] == ["fusable", "fused"]
    with pytest.raises(ValueError, match="exclude: 'nope' matches no MLP"):
        fuse_model(tiny_model(), exclude=iter(["nope"]))


def test_a_function_that_no_kernel_computes():
    with pytest.raises(ValueError, match=r"MLPSpec\(function='tanh'\): expected one of silu, gelu"):
        MLPSpec("plain", up="up", down="down", function="tanh")


@pytest.mark.parametrize("registered", [False, True])
@torch.no_grad()
def test_copies_follow_a_patch(registered, monkeypatch):
    """A copy is of the class as it is now, not of what was read before the patch."""
    as_on_gpu(monkeypatch)
    mlp = first_mlp(tiny_model())
    if registered:
        register_mlp(LlamaMLP, MLPSpec("gated", "up_proj", "down_proj", "act_fn", "gate_proj"))
    try:
        fuse_model(mlp, strict=True)
        blob, old = pickle.dumps(mlp), LlamaMLP.forward
        monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: old(self, x) * 2)
        x = torch.randn(3, 64)
        for again in (copy.deepcopy(mlp), pickle.loads(blob)):
            torch.testing.assert_close(again(x), old(mlp, x) * 2)
        monkeypatch.setattr(LlamaMLP, "forward", old)
        assert isinstance(pickle.loads(blob), FusedMLP)
    finally:
        MLP_SPECS.pop(LlamaMLP, None)
