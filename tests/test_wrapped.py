"""What people put around a model: adapters, quantizers, hooks, offload, training. Called where it has to be, never
bypassed, whether it came before or after fusing."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from models import as_on_gpu, tiny_model, token_ids
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.prune import l1_unstructured
from transformers import Trainer, TrainingArguments

from hf_fused_mlp import fuse_model, fusion_report, ops, unfuse_model
from hf_fused_mlp.families.mlp.fused import FusedMLP

DEVICES = pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
ORDERS = pytest.mark.parametrize("order", ["before", "after"])
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def gpu(where, monkeypatch):
    """Modules on the CPU take the paths that they take on a GPU."""
    if where == "cpu":
        as_on_gpu(monkeypatch)
    return where


@pytest.fixture
def products(monkeypatch):
    """The calls of the kernel for activation and product."""
    calls, act_mul = [], ops.act_mul
    monkeypatch.setattr(ops, "act_mul", lambda *args: calls.append(args) or act_mul(*args))
    return calls


def first_mlp(model):
    return model.model.layers[0].mlp


class TaggedLinear(nn.Linear):
    """What a quantizer or an adapter puts in a Linear's place."""

    def forward(self, x):
        return 2 * super().forward(x)


class QuantizedTensor(torch.Tensor):
    """A weight that gives ordinary tensors when it is used."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return out.as_subclass(torch.Tensor) if function is nn.functional.linear else out


def replace_linear(mlp, name):
    old = getattr(mlp, name)
    new = TaggedLinear(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    setattr(mlp, name, new)


def wrap_weight(mlp, name):
    linear = getattr(mlp, name)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(QuantizedTensor))


def attach_parameter(mlp, name):
    getattr(mlp, name).register_parameter("scale", nn.Parameter(torch.ones(1)))


def attach_hook(mlp, name):
    getattr(mlp, name).register_forward_hook(lambda module, args, output: output + 1)


def patch_forward(mlp, name):
    linear = getattr(mlp, name)
    linear.forward = lambda x: 3 * nn.functional.linear(x, linear.weight)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrize(mlp, name):
    register_parametrization(getattr(mlp, name), "weight", Doubled())


def prune_half(mlp, name):
    l1_unstructured(getattr(mlp, name), "weight", 0.5)


WRAPPERS = {
    parametrize: "ParametrizedLinear, expected nn.Linear",
    prune_half: "holds a NoneType as weight",
    replace_linear: "TaggedLinear, expected nn.Linear",
    wrap_weight: "holds a",
    attach_parameter: "carries scale",
    attach_hook: "has hooks",
    patch_forward: "has hooks or a replaced forward",
}


@DEVICES
@ORDERS
@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("wrap", WRAPPERS)
@torch.no_grad()
def test_a_wrapped_projection_is_called(wrap, name, order, where, gpu, products):
    model, x = tiny_model(), torch.randn(3, 64, device=where)
    mlp = first_mlp(model)
    if order == "after":
        fuse_model(model, strict=True)
    wrap(mlp, name)
    model.to(where)
    fuse_model(model, strict=True)
    original = copy.copy(mlp)
    original.__class__ = mlp.original_class
    torch.testing.assert_close(mlp(x), original(x))
    assert len(products) == (name != "down_proj"), "gate and up are read, unless one of them is wrapped"
    first, second = fusion_report(model).mlps
    assert first.reason.startswith("calls some projections, and fuses the rest: ")
    assert f"{name} " in first.reason
    assert WRAPPERS[wrap] in first.reason
    assert second.reason is None


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_plain_mlp_with_a_wrapped_projection_is_left_alone(wrap):
    model = tiny_model("gpt_neox")
    mlp = model.gpt_neox.layers[0].mlp
    wrap(mlp, "dense_h_to_4h")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp \(GPTNeoXMLP\): dense_h_to_4h "):
        fuse_model(model, strict=True)
    fuse_model(model)
    (skipped,) = fusion_report(model).select("skipped")
    assert WRAPPERS[wrap] in skipped.reason
    assert not isinstance(mlp, FusedMLP)


@torch.no_grad()
def test_a_plain_mlp_wrapped_afterwards_runs_its_forward(monkeypatch):
    as_on_gpu(monkeypatch)
    model = fuse_model(tiny_model("gpt_neox"))
    mlp = model.gpt_neox.layers[0].mlp
    replace_linear(mlp, "dense_h_to_4h")
    x = torch.randn(3, 64)
    assert torch.equal(mlp(x), mlp.original_class.forward(mlp, x))
    assert fusion_report(model).mlps[0].reason.startswith("dense_h_to_4h is ")


def lora(model, *names):
    """`model` with adapters of some effect on these projections, one after the other."""
    peft = pytest.importorskip("peft")
    for index, name in enumerate(names):
        config = peft.LoraConfig(r=4, target_modules=[*PROJECTIONS, "q_proj"], lora_dropout=0.0)
        if index == 0:
            model = peft.get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.1 * noise)
    return model.eval()


@DEVICES
@ORDERS
@torch.no_grad()
def test_lora(order, where, gpu, products):
    """Unmerged, switched off, another adapter, merged, unloaded: always what the unfused model says."""
    plain, ids = lora(tiny_model(), "one", "two").to(where), token_ids(2, 7).to(where)
    if order == "before":
        fused = fuse_model(lora(tiny_model(), "one", "two").to(where), strict=True)
    else:
        fused = lora(fuse_model(tiny_model().to(where), strict=True), "one", "two").to(where)
    adapted = [name for name, _ in fused.named_modules() if name.endswith(".lora_A")]
    assert len(adapted) == 2 * 4, "every projection has its adapter"

    answers = []
    for step in (
        lambda model: None,
        lambda model: model.set_adapter("two"),
        lambda model: model.merge_adapter(["one"]),
        lambda model: model.unmerge_adapter(),
    ):
        step(plain), step(fused)
        torch.testing.assert_close(fused(ids).logits, plain(ids).logits, atol=2e-5, rtol=2e-5)
        answers.append(plain(ids).logits)
    assert not torch.allclose(answers[0], answers[1], atol=1e-2)
    with plain.disable_adapter(), fused.disable_adapter():
        torch.testing.assert_close(fused(ids).logits, plain(ids).logits, atol=2e-5, rtol=2e-5)
    assert len(products) == 2 * 5
    assert all("lora" in mlp.reason for mlp in fusion_report(fused).mlps)

    plain, fused = (model.merge_and_unload() for model in (plain, fused))
    torch.testing.assert_close(fuse_model(fused)(ids).logits, plain(ids).logits, atol=2e-5, rtol=2e-5)
    assert len(products) == 2 * 5
    assert [mlp.reason for mlp in fusion_report(fused).mlps] == [None, None]
    assert torch.equal(unfuse_model(fused)(ids).logits, plain(ids).logits)


def test_lora_of_one_in_the_other(tmp_path):
    """An adapter trained and saved on an unfused model loads into a fused one, and the other way round."""
    peft, ids = pytest.importorskip("peft"), token_ids(2, 7)
    for index, (here, there) in enumerate(((tiny_model, fused_model), (fused_model, tiny_model))):
        trained = lora(here(), "default")
        trained.save_pretrained(tmp_path / str(index))
        loaded = peft.PeftModel.from_pretrained(there(), tmp_path / str(index)).eval()
        torch.testing.assert_close(loaded(ids).logits, trained(ids).logits)


def fused_model(*args, **kw):
    return fuse_model(tiny_model(*args, **kw), strict=True)


@DEVICES
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox"])
def test_training(model_type, checkpointing, where, gpu, products):
    """Gradients of everything, through the kernel for activation and product where there is a gate."""
    losses, grads = [], []
    for model in (tiny_model(model_type), fused_model(model_type)):
        model.to(where).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = token_ids(2, 9).to(where)
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-4, msg=name)
    assert len(products) == (0 if model_type == "gpt_neox" else 4 if checkpointing else 2)


@DEVICES
def test_training_under_autocast(where, gpu, products):
    model, ids = fused_model().to(where).train(), token_ids(2, 9).to(where)
    plain = tiny_model().to(where).train()
    with torch.autocast(where, torch.bfloat16):
        loss, expected = (m(ids, labels=ids).loss for m in (model, plain))
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=2e-2, rtol=2e-2)
    assert products[0][0].dtype == torch.bfloat16
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_training_keeps(monkeypatch):
    """Less than the original: gate, up and their product, and not the activation beside them."""
    as_on_gpu(monkeypatch)
    sizes = []
    for model in (tiny_model(), fused_model()):
        mlp, saved = first_mlp(model).train(), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor
        ):
            mlp(torch.randn(5, 64))
        weights = {parameter.data_ptr() for parameter in mlp.parameters()}
        sizes.append(sum(tensor.numel() for start, tensor in saved.items() if start not in weights))
    assert sizes == [5 * (64 + 4 * 176), 5 * (64 + 3 * 176)]


@pytest.mark.gpu
def test_peak_memory_of_training_is_not_above_the_originals():
    peaks = []
    for model in (tiny_model, fused_model):
        model = model(hidden_size=1024, intermediate_size=4096, head_dim=256, dtype=torch.bfloat16).cuda().train()
        x = torch.randn(8192, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2):  # the second finds what the first left: gradients, workspaces
            torch.cuda.reset_peak_memory_stats()
            out = x
            for layer in model.model.layers:
                out = layer.mlp(out)
            out.sum().backward()
            x.grad = None
            del out
        peaks.append(torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated())
    assert peaks[1] <= peaks[0]


def test_trainer_stops_and_resumes(tmp_path, monkeypatch):
    """Two steps, a checkpoint, two more in a new process's models: the unfused run's weights, with its names."""
    as_on_gpu(monkeypatch)
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(8, 9)]

    def train(model, name, resume=False):
        args = TrainingArguments(
            tmp_path / name, max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
            use_cpu=True, report_to=[], disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=rows)
        trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2") if resume else None)
        return model.state_dict()

    expected = train(tiny_model(), "plain")
    whole = train(fused_model(), "fused")
    resumed = train(fused_model(), "fused", resume=True)
    crossed = train(tiny_model(), "fused", resume=True)
    for name, weight in expected.items():
        for other in (whole, resumed, crossed):
            torch.testing.assert_close(other[name], weight, atol=1e-4, rtol=1e-4, msg=name)
    assert not torch.allclose(expected["model.norm.weight"], tiny_model().state_dict()["model.norm.weight"], atol=1e-3)


def test_dropout_drops_out_in_training(monkeypatch):
    """With probability zero it does nothing; otherwise the original forward runs."""
    from test_recognition import UpFirst

    as_on_gpu(monkeypatch)
    mlp = fuse_model(nn.ModuleList([UpFirst()]), strict=True)[0].train()
    assert mlp.runs() == ("in training mode with dropout", None)
    mlp.drop.p = 0.0
    assert mlp.runs() == (None, "in training mode")


@ORDERS
@pytest.mark.parametrize("offload", ["cpu", "disk", "some layers", "none"])
@torch.no_grad()
def test_accelerate(offload, order, tmp_path, monkeypatch):
    """Weights that a hook fetches for each call are not read in its place; a hook that only aligns is no obstacle."""
    as_on_gpu(monkeypatch)
    plain, model, ids = tiny_model(), tiny_model(), token_ids(2, 7)
    if order == "after":
        fuse_model(model, strict=True)
    if offload == "cpu":
        cpu_offload(model, torch.device("cpu"))
    elif offload == "disk":
        disk_offload(model, tmp_path, torch.device("cpu"))
    else:
        places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head"), "cpu")
        places |= {"model.rotary_emb": "cpu", "model.layers.1": "disk" if offload == "some layers" else "cpu"}
        dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    fuse_model(model, strict=True)
    calls = []
    monkeypatch.setattr(ops, "mlp_if_fits", lambda *args, mlp=ops.mlp_if_fits: calls.append(args) or mlp(*args))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    assert len(calls) == {"none": 2, "some layers": 1}.get(offload, 0)
    assert [mlp.state for mlp in fusion_report(model).mlps] == ["fused", "fused"]

    unfuse_model(model)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    fuse_model(model, strict=True)
    remove_hook_from_submodules(model)
    if offload == "none":
        fuse_model(model, strict=True)
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
        assert len(calls) == 4


@ORDERS
@torch.no_grad()
def test_a_hook_around_the_module(order, monkeypatch):
    """accelerate keeps the forward that it found; it is the fused one while the module is fused."""
    as_on_gpu(monkeypatch)
    plain, model, ids, seen = tiny_model(), tiny_model(), token_ids(1, 4), []

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    calls = []
    monkeypatch.setattr(ops, "mlp_if_fits", lambda *args, mlp=ops.mlp_if_fits: calls.append(args) or mlp(*args))
    for step, expected in (("hook", 0), ("fuse", 2)) if order == "before" else (("fuse", 2), ("hook", 2)):
        add_hook_to_module(first_mlp(model), Hook()) if step == "hook" else fuse_model(model, strict=True)
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
        assert len(calls) == expected + (2 if order == "after" and step == "hook" else 0)
    unfuse_model(model)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    fuse_model(model, strict=True)
    hooked = len(seen)
    assert hooked > 0
    remove_hook_from_module(first_mlp(model))
    calls.clear()
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    assert len(calls) == 2
    assert len(seen) == hooked


@torch.no_grad()
def test_a_hook_that_names_no_device(monkeypatch):
    as_on_gpu(monkeypatch)
    model, x = fused_model(), torch.randn(3, 64)
    expected = first_mlp(model)(x)
    add_hook_to_module(first_mlp(model).up_proj, AlignDevicesHook())
    assert "up_proj has hooks" in fusion_report(model).mlps[0].reason
    torch.testing.assert_close(first_mlp(model)(x), expected)
