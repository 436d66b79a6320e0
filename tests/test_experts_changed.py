"""Routed experts that were changed: the class, the instance, the registry or the weights, before fusing and after.

Whatever was changed runs, and reports say so.
"""

import copy
import gc
import inspect
import pickle
import textwrap
from types import FunctionType, MethodType, ModuleType

import pytest
import torch
from test_experts import inputs, make, on_cpu, tiny  # noqa: F401  (a fixture)
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate, grouped_mm_experts_forward

from hf_fused_mlp import launch_cache, modes, ops
from hf_fused_mlp.families.experts import FusedExperts, operands_of
from hf_fused_mlp.fuse import fuse_model, fusion_report, unfuse_model
from hf_fused_mlp.reading.experts import ExpertsSpec, find_experts, original_of
from hf_fused_mlp.types import ExpertsOperands

MIXTRAL = "transformers.models.mixtral.modeling_mixtral.MixtralExperts"
GPT_OSS = "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts"
IN_FP32 = "transformers.models.openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts"
REPLACED = "its forward or its gate was replaced"


def status(experts):
    return fusion_report(experts).experts[0]


def original_runs(experts, x, calls):
    """True if a call gives what the original forward gives, and the operator is not called."""
    calls.clear()
    return torch.equal(experts(*x), experts.original_output(*x)) and not calls


@pytest.fixture
def fused():
    experts = fuse_model(make(MIXTRAL), strict=True)
    experts.config._experts_implementation = "grouped_mm"
    return experts


@pytest.mark.parametrize("name", ["forward", "_apply_gate"])
@torch.no_grad()
def test_copies_follow_a_patch(name, on_cpu, monkeypatch):  # noqa: F811
    """A copy is of the class as it is now, not of what was read before the patch."""
    fused = fuse_model(make(MIXTRAL), strict=True)
    fused.config._experts_implementation = "grouped_mm"
    x, cls, blob = inputs(fused), type(fused).original_class, pickle.dumps(fused)
    old = getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda *args: old(*args) * 2)
    expected = fused.original_output(*x)
    for again in (fused, copy.deepcopy(fused), pickle.loads(blob)):
        torch.testing.assert_close(again(*x), expected)
    del fused, again  # and the generated class with them
    gc.collect()
    torch.testing.assert_close(pickle.loads(blob)(*x), expected)
    assert not on_cpu
    monkeypatch.undo()
    assert isinstance(pickle.loads(blob), FusedExperts)


def mine(module, hidden_states, top_k_index, top_k_weights):
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden_states, top_k_index, top_k_weights) * 0.5


@torch.no_grad()
def test_a_registered_implementation_runs(on_cpu, monkeypatch):  # noqa: F811
    """Also one that takes a name of Transformers' own."""
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "mine", mine)
    model, tokens = tiny(), torch.arange(6)[None]
    model.set_experts_implementation("mine")
    expected = model(tokens).logits
    reason = "experts_implementation='mine' is not one of Transformers' own, so it runs unchanged"
    assert status(fuse_model(model)).state == "skipped" and status(model).reason == reason
    with pytest.raises(ValueError, match="'mine' is not one of Transformers' own"):
        fuse_model(model, strict=True)
    model.set_experts_implementation("grouped_mm")
    fuse_model(model, strict=True)
    model(tokens)
    assert len(on_cpu) == 2 and status(model).reason is None
    model.set_experts_implementation("mine")
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=0)
    assert len(on_cpu) == 2 and status(model).reason == reason
    for name in ("eager", "batched_mm"):
        model.set_experts_implementation(name)
        model(tokens)
        assert len(on_cpu) == 4
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, name, mine)
        model(tokens)
        assert len(on_cpu) == 4 and "not one of Transformers' own" in status(model).reason
        on_cpu.pop(), on_cpu.pop()


def test_other_casts_are_not_repeated(device, monkeypatch):
    """Under autocast a module casts and the operator does not, so that one does not answer for the other."""
    if device.type != "cpu":
        pytest.skip("the kernels run at once on a GPU")
    from hf_fused_mlp.ops import dispatch

    experts = fuse_model(make(MIXTRAL), strict=True)
    x = inputs(experts)
    monkeypatch.setattr(modes, "no_kernels", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = experts.original_output(*x)
        out = dispatch.experts_cuda(*x, operands_of(experts, experts.fused_spec))
        assert len(launch_cache.remembered) == 1 and not torch.equal(out, expected)
        torch.testing.assert_close(experts(*x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_loop_in_fp32_keeps_its_accuracy(dtype, on_cpu, caplog, monkeypatch):  # noqa: F811
    """Kernels round in between, so its 16-bit weights are not theirs, through neither door."""
    monkeypatch.setattr("hf_fused_mlp.integrations.experts._told", set())
    experts = make(IN_FP32, dtype)
    x = inputs(experts, dtype=dtype)
    expected = experts(*x)
    assert "computes in fp32, regardless of the dtype of its weights" in status(experts).reason
    experts.config._experts_implementation = "hf_fused_mlp"
    for _ in range(2):
        # Transformers' default for this model is its own loop, the grouped one for others
        torch.testing.assert_close(experts(*x), expected, rtol=0, atol=0)
    assert len([r for r in caplog.records if "computes in fp32" in r.getMessage()]) == 1
    assert not on_cpu
    fuse_model(experts.float(), strict=True).to(dtype)
    torch.testing.assert_close(experts(*x), expected, rtol=0, atol=0)
    assert not on_cpu and "computes in fp32" in status(experts).reason
    experts.float()(x[0].float(), x[1], x[2].float())
    assert len(on_cpu) == 1 and status(experts).reason is None


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "hf_fused_mlp"])
@torch.no_grad()
def test_routing_by_name(name, on_cpu):  # noqa: F811
    """The interface's function takes the names that Transformers' functions take."""
    experts = make(MIXTRAL)
    x, ids, weights = inputs(experts)
    expected = experts(x, ids, weights)
    experts.config._experts_implementation = name
    for _ in range(2):
        out = experts(x, top_k_index=ids, top_k_weights=weights)
        torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)
        fuse_model(experts, strict=True)
    assert len(on_cpu) == (name == "hf_fused_mlp")  # by name, a fused module runs its original


def half_of_down(experts):
    experts.down_proj = nn.Parameter(experts.down_proj.half())


def narrow_down(experts):
    experts.down_proj = nn.Parameter(experts.down_proj[:, :, :7].contiguous())


def down_on_meta(experts):
    experts.down_proj = nn.Parameter(experts.down_proj.to("meta"))


def in_float64(experts):
    experts.double()


def fewer_experts(experts):
    experts.num_experts -= 1


def hidden_down(experts):
    experts.__dict__["down_proj"] = experts.down_proj.detach() * 0.5


UNFIT = {
    half_of_down: "its weights do not fit together",
    narrow_down: "its weights do not fit together",
    down_on_meta: "its weights do not fit together",
    in_float64: "fp32",
    fewer_experts: "num_experts is 5",
    hidden_down: "its weights or attributes",
}


@pytest.mark.parametrize("change", UNFIT, ids=lambda change: change.__name__)
def test_reports_of_weights_that_no_kernel_takes(change, fused, on_cpu):  # noqa: F811
    with torch.no_grad():
        change(fused)
        assert status(fused).state == "fused" and UNFIT[change] in status(fused).reason
        if change in (fewer_experts, hidden_down):
            x, ids, weights = inputs(fused)
            fused.config._experts_implementation = "eager"
            assert original_runs(fused, (x, ids % fused.num_experts, weights), on_cpu)
    unfuse_model(fused)
    assert status(fused).state == "skipped" and UNFIT[change] in status(fused).reason
    with pytest.raises(ValueError, match="strict: 1 of 1 experts modules cannot be fused"):
        fuse_model(fused, strict=True)


def test_a_property_over_a_weight(fused):
    class Scaled(type(unfuse_model(fused))):
        @property
        def down_proj(self):
            return self._parameters["down_proj"] * 0.5

    fused.__class__ = Scaled
    assert status(fused).reason.startswith("Scaled has 'down_proj' as an attribute of the class, which hides")


def scaled(self, name):
    value = nn.Module.__getattr__(self, name)
    return value * 0.5 if name == "down_proj" else value


def of_class(**attributes):
    def change(experts, patch):
        experts.__class__ = type("Changed", (type(experts),), attributes)

    return change


def of_instance(experts, patch):
    experts.__dict__["act_fn"] = torch.tanh


class Emulated(ModuleType):
    """Like PyTorch's module but for one product, as emulators of number formats put in its place."""

    def __getattr__(self, name):
        return self if name == "functional" else getattr(nn.functional, name, None) or getattr(nn, name)

    def linear(self, *args):
        return nn.functional.linear(*args) * 0.5


def names_of_modules(experts, patch):
    patch.setattr("transformers.models.mixtral.modeling_mixtral.nn", Emulated("nn"))


ATTRIBUTES = {
    "getattr": (of_class(__getattr__=scaled), "looks its attributes up"),
    "call": (of_class(__call__=lambda self, *args: self.forward(*args) * 2), "is called"),
    "activation of the class": (
        of_class(act_fn=staticmethod(torch.tanh)),
        "has 'act_fn' as an attribute of the class",
    ),
    "activation of the instance": (of_instance, "the activation of"),
    "names": (names_of_modules, "is not one of the known loops"),
}


@pytest.mark.parametrize("case", ATTRIBUTES)
@pytest.mark.parametrize("door", ["class", "interface"])
@torch.no_grad()
def test_the_same_text_with_another_meaning(case, door, on_cpu, monkeypatch):  # noqa: F811
    """The forward is a known loop, whose words mean something else for this class, instance or module."""
    change, reason = ATTRIBUTES[case]
    find_experts(make(MIXTRAL))  # what was read before is not believed
    experts = make(MIXTRAL)
    x = inputs(experts)
    change(experts, monkeypatch)
    experts.config._experts_implementation = "eager" if door == "class" else "grouped_mm"
    expected = experts(*x)
    if door == "class":
        assert status(fuse_model(experts)).state == "skipped" and reason in status(experts).reason
    else:
        experts.config._experts_implementation = "hf_fused_mlp"
    assert torch.equal(experts(*x), expected) and not on_cpu


@pytest.mark.parametrize("change", [of_instance, names_of_modules])
@torch.no_grad()
def test_a_meaning_that_changes_after_fusing(change, fused, on_cpu, monkeypatch):  # noqa: F811
    x = inputs(fused)
    fused.config._experts_implementation = "eager"
    change(fused, monkeypatch)
    assert original_runs(fused, x, on_cpu) and status(fused).reason is not None
    monkeypatch.undo()


@torch.no_grad()
def test_an_argument_that_is_called_like_a_module(tmp_path):
    """`nn` is its tokens here."""
    source = textwrap.dedent(inspect.getsource(original_of(type(make(MIXTRAL)).forward)))
    assert "nn.functional.linear" in source
    for name in ("tokens", "nn"):
        file, names = tmp_path / f"{name}.py", {"torch": torch, "nn": nn}
        file.write_text(source.replace("hidden_states", name))
        exec(compile(file.read_text(), file, "exec"), names)
        experts = make(MIXTRAL)
        experts.__class__ = type("Own", (nn.Module,), {"forward": names["forward"]})
        assert isinstance(find_experts(experts), ExpertsSpec) == (name == "tokens")


@pytest.mark.parametrize("door", ["class", "interface"])
@torch.no_grad()
def test_compiled_code_notices_a_gate_on_the_instance(door, monkeypatch):
    monkeypatch.setattr(modes, "no_kernels", lambda *_, **__: None)
    torch._dynamo.reset()
    experts = make(MIXTRAL)
    x = inputs(experts)
    experts.config._experts_implementation = "grouped_mm" if door == "class" else "hf_fused_mlp"
    if door == "class":
        fuse_model(experts, strict=True)
    compiled = torch.compile(experts, backend="eager", fullgraph=True)
    compiled(*x)
    experts._apply_gate = MethodType(lambda self, h: h.chunk(2, -1)[0] * 0 + 1, experts)
    expected = grouped_mm_experts_forward(experts, *x)
    torch.testing.assert_close(compiled(*x), expected)


@pytest.mark.parametrize("door", ["class", "interface"])
@torch.no_grad()
def test_compiled_layers_of_other_numbers(door, monkeypatch):
    """Dynamo makes symbols of numbers in which modules differ."""
    monkeypatch.setattr(modes, "no_kernels", lambda *_, **__: None)
    torch._dynamo.reset()
    for limit, alpha in ((7.0, 1.702), (0.5, 1.702), (0.3, 1.0), (float("inf"), 1.702), (0.1, 1.4)):
        experts = make(GPT_OSS)
        experts.limit, experts.alpha = limit, alpha
        x = inputs(make(GPT_OSS))
        expected = experts(*x)
        experts.config._experts_implementation = "grouped_mm" if door == "class" else "hf_fused_mlp"
        fuse_model(experts, strict=alpha != 1.4) if door == "class" else None
        compiled = torch.compile(experts, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_numbers_that_change_are_followed(on_cpu):  # noqa: F811
    experts = fuse_model(make(GPT_OSS), strict=True)
    x = inputs(experts)
    for count, (limit, alpha) in enumerate(((0.3, 1.702), (1, 1.702), (0.5, 1.0)), start=1):
        experts.limit, experts.alpha = limit, alpha
        torch.testing.assert_close(experts(*x), experts.original_output(*x), rtol=2e-5, atol=2e-5)
        assert len(on_cpu) == count
    for experts.limit in (torch.tensor(0.3), torch.tensor([0.3] * 40), True):
        assert original_runs(experts, x, on_cpu)


@torch.no_grad()
def test_code_that_was_replaced_in_place(fused, on_cpu, monkeypatch):  # noqa: F811
    """As autoreload of notebooks does."""
    x, cls = inputs(fused), type(fused).original_class

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states * 0 + 3

    def _apply_gate(self, gate_up_out):
        return gate_up_out.chunk(2, dim=-1)[1]

    for function, other in ((original_of(cls.forward), forward), (cls._apply_gate, _apply_gate)):
        fused.config._experts_implementation = "eager" if other is forward else "grouped_mm"
        with monkeypatch.context() as patch:
            patch.setattr(function, "__code__", other.__code__)
            assert original_runs(fused, x, on_cpu) and REPLACED in status(fused).reason
            again = unfuse_model(copy.deepcopy(fused))
            assert status(again).state == "skipped"
            again.config._experts_implementation = "hf_fused_mlp"
            again(*x)
            assert not on_cpu
        fused(*x)
        assert len(on_cpu) == 1


@torch.no_grad()
def test_a_gate_of_equal_text_fuses_again(fused, on_cpu, monkeypatch):  # noqa: F811
    """As a reload of its module leaves."""
    code, names = _default_apply_gate.__code__, _default_apply_gate.__globals__
    monkeypatch.setattr(type(fused).original_class, "_apply_gate", FunctionType(code, names, "_default_apply_gate"))
    assert REPLACED in status(fused).reason
    kept = copy.copy(fused)  # keeps the first generated class in use
    fuse_model(unfuse_model(fused), strict=True)
    fused(*inputs(fused))
    assert status(fused).reason is None and len(on_cpu) == 1 and kept is not fused


@pytest.mark.parametrize("door", ["class", "interface"])
@torch.no_grad()
def test_global_hooks_see_the_activation(door, on_cpu):  # noqa: F811
    experts = make(MIXTRAL)
    x = inputs(experts)
    experts.config._experts_implementation = "grouped_mm" if door == "class" else "hf_fused_mlp"
    if door == "class":
        fuse_model(experts, strict=True)
    seen = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        experts(*x)
    finally:
        handle.remove()
    assert seen == ["SiLUActivation", "MixtralExperts"] and not on_cpu
    experts(*x)
    assert len(on_cpu) == 1


ODD = [
    *(("limit", [1, 2]), ("alpha", {}), ("limit", torch.ones(3)), ("swiglu_limit", True)),
    *(("has_bias", []), ("is_concatenated", "yes"), ("is_concatenated", None), ("has_post_expert_norm", 1)),
]


@pytest.mark.parametrize("name, value", ODD, ids=str)
def test_odd_attributes(name, value):
    """What the forward does not read does not matter; a flag that is none does."""
    experts = make(MIXTRAL)
    setattr(experts, name, value)
    assert status(experts).state == ("fusable" if name in ("limit", "alpha", "swiglu_limit") else "skipped")


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("limit", [1], "the limit of GptOssExperts is [1], expected a number above 0"),
        ("limit", True, "the limit of GptOssExperts is True, expected a number above 0"),
        ("limit", float("nan"), "the limit of GptOssExperts is nan, expected a number above 0"),
        ("alpha", 1.5, "alpha of GptOssExperts is 1.5, expected 1.0 or 1.702"),
        ("alpha", [1], "alpha of GptOssExperts is [1], expected 1.0 or 1.702"),
    ],
)
def test_reasons_name_the_number(name, value, reason):
    assert status(make(GPT_OSS)).state == "fusable"
    experts = make(GPT_OSS)
    experts.limit = 1.0
    assert status(experts).state == "fusable"
    setattr(experts, name, value)
    assert status(experts).reason.startswith(reason)


def test_classes_that_borrow_or_extend_a_forward():
    cls = type(make(MIXTRAL))

    class Borrowed(nn.Module):
        forward = cls.forward

        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(4, 6, 8))
            self.down_proj = nn.Parameter(torch.zeros(4, 8, 3))

    class Extended(cls):
        def forward(self, *args):
            return super().forward(*args) * 2

    assert "has decorator flags that contradict its forward" in status(Borrowed()).reason
    experts = make(MIXTRAL)
    experts.__class__ = Extended
    (listed,) = fusion_report(nn.ModuleDict({"experts": experts})).mlps
    assert "in an unknown class; they run unchanged" in listed.reason


@pytest.fixture
def kernels(device, monkeypatch):
    """The function that calls the operator's kernels, interpreted, and how many pairs it had to plan."""
    if device.type != "cpu":
        pytest.skip("the interpreter shows as much")
    from hf_fused_mlp.ops import dispatch

    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    experts = make(MIXTRAL)
    operands = fuse_model(experts, strict=True) and operands_of(experts, experts.fused_spec)

    def call(x, ids, weights):
        with torch.no_grad():
            return dispatch.experts_cuda(x, ids, weights, ExpertsOperands(*operands))

    return dispatch, call, experts


@pytest.mark.parametrize(
    "error", [RuntimeError("PassManager::run failed"), torch.OutOfMemoryError("none left")], ids=str
)
def test_a_plan_that_does_not_run(error, kernels, monkeypatch, caplog):
    """It gives way to a slower one, once; running out of memory is not its fault."""
    from hf_fused_mlp.kernels.experts import grouped

    dispatch, call, experts = kernels
    tried = []

    def fail(*args):
        tried.append(args)
        raise error

    monkeypatch.setattr(grouped, "grouped", fail)
    for tokens in (2, 3):
        x = inputs(experts, tokens, top_k=1)
        if isinstance(error, torch.OutOfMemoryError):
            with pytest.raises(torch.OutOfMemoryError):
                call(*x)
        else:
            torch.testing.assert_close(call(*x), ops.experts(*x, operands_of(experts, experts.fused_spec)))
    once = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
    assert len(tried) == len(caplog.records) + (not once) * 2 == (1 if once else 2)
    assert len(dispatch.unusable) == once


def test_routing_that_is_not_contiguous_or_aligned(kernels):
    """It is copied, which costs little: what is remembered of calls like it answers them too."""
    dispatch, call, experts = kernels
    x, ids, weights = inputs(experts, 40)
    expected = call(x, ids, weights)
    assert len(launch_cache.remembered) == 1
    around = torch.zeros(ids.numel() + 1, dtype=ids.dtype)
    around[1:] = ids.flatten()
    for odd in (around[1:].view(ids.shape), ids.mT.contiguous().mT):
        assert not dispatch._is_usual(odd)
        assert torch.equal(call(x, odd, weights.mT.contiguous().mT), expected)
    ((_, runs),) = launch_cache.remembered.items()
    assert len(runs) == 1
