"""Layers of FP8 checkpoints (Transformers' `FP8Linear`): read, fused, packed, saved, and called where they must be."""

import copy

import pytest
import torch
from models import as_on_gpu, real_mlp, tiny_model, token_ids
from numerics import quantize_weight
from torch import nn
from transformers.integrations import finegrained_fp8
from transformers.integrations.finegrained_fp8 import FP8Linear

from hf_fused_mlp import fuse_model, fusion_report, unfuse_model
from hf_fused_mlp.reference import fp8_linear_ref, quantize_ref
from hf_fused_mlp.validation import Errors
from hf_fused_mlp.weights import is_packed

MODELS = "transformers.models"
LLAMA, PHI3 = f"{MODELS}.llama.modeling_llama.LlamaMLP", f"{MODELS}.phi3.modeling_phi3.Phi3MLP"
NEOX = f"{MODELS}.gpt_neox.modeling_gpt_neox.GPTNeoXMLP"
SIZES = {"hidden_size": 256, "intermediate_size": 384}


def to_fp8(module, names=("proj", "dense"), scales="fp32"):
    """`module` with the projections whose names contain one of `names` as an FP8 checkpoint has them."""
    for path, linear in list(module.named_modules()):
        if isinstance(linear, nn.Linear) and any(name in path for name in names):
            fp8 = FP8Linear(linear.in_features, linear.out_features, [128, 128], has_bias=linear.bias is not None)
            weight, scale = quantize_weight(linear.weight.detach(), scales)
            fp8.weight, fp8.weight_scale_inv = (nn.Parameter(t, requires_grad=False) for t in (weight, scale))
            fp8.bias = linear.bias
            owner, _, name = path.rpartition(".")
            setattr(module.get_submodule(owner), name, fp8)
    return module


@pytest.fixture(autouse=True)
def by_transformers(monkeypatch):
    """In place of kernels from the Hub, and a count of the layers that were called."""
    calls = []

    def fp8_linear(x, weight, scale, block_size, bias, *_):
        calls.append(weight)
        return fp8_linear_ref(x, weight, scale, bias)

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", fp8_linear)
    return calls


@pytest.fixture
def on_gpu(monkeypatch):
    as_on_gpu(monkeypatch)


def as_accurate(got, expected, exact):
    """True if `got` is about as near to `exact` as `expected`, whose inputs are quantized too."""
    error, allowed = Errors.of(got, exact), Errors.of(expected, exact)
    return error.largest < 2 * allowed.largest and error.relative_rms < 1.1 * allowed.relative_rms


def exact_output(mlp, x):
    """The original's output with dequantized weights and nothing else rounded."""
    twin = copy.deepcopy(mlp)
    for linear in twin.modules():
        if isinstance(linear, FP8Linear):
            weight = linear.weight.double()
            scale = linear.weight_scale_inv.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
            linear.weight = nn.Parameter(weight * scale[: weight.shape[0], : weight.shape[1]])
            linear.bias = None if linear.bias is None else nn.Parameter(linear.bias.double())
    return twin(x.double())


@pytest.mark.parametrize("scales", ["fp32", "e8m0"])
@pytest.mark.parametrize("path", [LLAMA, PHI3, NEOX], ids=["gated", "packed", "plain"])
@torch.no_grad()
def test_modules(path, scales, by_transformers, on_gpu):
    """No layer is called, and outputs are nearer to the truth than those of quantized inputs."""
    mlp = to_fp8(real_mlp(path, **SIZES), scales=scales)
    x = torch.randn(2, 3, SIZES["hidden_size"])
    expected, exact = mlp(x), exact_output(mlp, x)
    state = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    model = fuse_model(nn.ModuleList([mlp]), strict=True)
    (report,) = fusion_report(model).mlps
    assert (report.state, report.reason) == ("fused", None)
    by_transformers.clear()
    got = mlp(x)
    assert as_accurate(got, expected, exact)
    assert torch.equal(mlp(x), got)
    assert torch.equal(mlp(x[0, 0]), got[0, 0]) or as_accurate(mlp(x[0]), expected[0], exact[0])
    assert by_transformers == []
    unfuse_model(model)
    assert torch.equal(mlp(x), expected)
    for name, tensor in mlp.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), state[name].view(torch.uint8)), name


def test_packing(on_gpu):
    """Weights and scales of gate and up lie side by side, and are what they were; unfusing undoes it."""
    mlp = to_fp8(real_mlp(LLAMA, hidden_size=512, intermediate_size=256))
    gate, up = mlp.gate_proj, mlp.up_proj
    before = [t.clone() for t in (gate.weight, up.weight, gate.weight_scale_inv, up.weight_scale_inv)]
    model = fuse_model(nn.ModuleList([mlp]))
    assert is_packed(gate.weight, up.weight)
    assert is_packed(gate.weight_scale_inv, up.weight_scale_inv)
    assert mlp.why_not_packed() is None
    after = gate.weight, up.weight, gate.weight_scale_inv, up.weight_scale_inv
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(before, after, strict=True))
    unfuse_model(model)
    assert not is_packed(gate.weight, up.weight)
    assert not is_packed(gate.weight_scale_inv, up.weight_scale_inv)


def test_gradients_of_inputs(on_gpu):
    """As in Transformers, through the dequantized weights, which get none."""
    mlp = to_fp8(real_mlp(LLAMA, **SIZES))
    x = torch.randn(3, SIZES["hidden_size"], requires_grad=True)
    (expected,) = torch.autograd.grad(mlp(x).square().sum(), x)
    fuse_model(nn.ModuleList([mlp]), strict=True)
    (got,) = torch.autograd.grad(mlp(x).square().sum(), x)
    assert (got - expected).norm() < 0.1 * expected.norm()
    for parameter in mlp.parameters():
        parameter.requires_grad_(parameter.is_floating_point() and parameter.dtype != torch.float8_e8m0fnu)
    mlp(x).sum().backward()
    assert all(parameter.grad is None for parameter in mlp.parameters())


def test_compiles_without_a_break(by_transformers, on_gpu):
    mlp = to_fp8(real_mlp(LLAMA, **SIZES))
    fuse_model(nn.ModuleList([mlp]), strict=True)
    x = torch.randn(3, SIZES["hidden_size"])
    with torch.no_grad():
        expected = mlp(x)
        got = torch.compile(mlp, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, expected)
    assert by_transformers == []


def wrong_block(mlp):
    mlp.up_proj.block_size = [64, 128]


def static_scale(mlp):
    mlp.up_proj.activation_scale = nn.Parameter(torch.ones(()))


def hooked(mlp):
    mlp.up_proj.register_forward_hook(lambda *_: None)


def few_scales(mlp):
    mlp.up_proj.weight_scale_inv = nn.Parameter(mlp.up_proj.weight_scale_inv[:1])


def half_scales(mlp):
    mlp.up_proj.weight_scale_inv = nn.Parameter(mlp.up_proj.weight_scale_inv.half())


def per_tensor(mlp):
    mlp.up_proj.block_size = None
    mlp.up_proj.weight_scale_inv = nn.Parameter(torch.ones(()))


CALLED = {
    wrong_block: "up_proj has a scale for each block of [64, 128] weights, expected [128, 128]; load a checkpoint of",
    static_scale: "up_proj quantizes its input by a scale that the checkpoint gives, expected dynamic ones; load a",
    hooked: "up_proj has hooks or a forward of its own",
    few_scales: "up_proj has scales [1, 2] of torch.float32 for a weight [384, 256], expected one for each block of",
    half_scales: "up_proj has scales [3, 2] of torch.float16 for a weight [384, 256], expected one for each block of",
    per_tensor: "up_proj has a scale for each block of None weights",
}


@pytest.mark.parametrize("change", CALLED, ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_cannot_be_read_is_called(change, by_transformers, on_gpu, monkeypatch):
    """Whether it is so when fusing or becomes so afterwards."""
    mlp = to_fp8(real_mlp(LLAMA, **SIZES))
    later = copy.deepcopy(mlp)
    fuse_model(nn.ModuleList([later]), strict=True)
    for module in (mlp, later):
        change(module)
    model = fuse_model(nn.ModuleList([mlp]), strict=True)
    for module in (model, nn.ModuleList([later])):
        (report,) = fusion_report(module).mlps
        assert CALLED[change] in report.reason
    x = torch.randn(2, SIZES["hidden_size"])
    for module in (mlp, later):
        by_transformers.clear()
        monkeypatch.setattr(
            finegrained_fp8, "fp8_linear", lambda x, weight, *_: by_transformers.append(weight) or x @ weight.float().T
        )
        module(x)
        assert any(weight is module.up_proj.weight for weight in by_transformers)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_damaged_scales(value):
    mlp = to_fp8(real_mlp(LLAMA, **SIZES))
    mlp.down_proj.weight_scale_inv.data[1, 2] = value
    (report,) = fusion_report(fuse_model(nn.ModuleList([mlp]))).mlps
    assert report.state == "skipped"
    assert report.reason.startswith("down_proj has 1 of 6 scales that are zero or not finite; load it again")


def test_mixed_formats():
    """A layer that was left in floats beside FP8: one clear reason, no wrong answer."""
    mlp = to_fp8(real_mlp(LLAMA, **SIZES), names=("gate", "up"))
    (report,) = fusion_report(fuse_model(nn.ModuleList([mlp]))).mlps
    assert report.state == "skipped"
    assert "its weights differ in dtype" in report.reason
    assert "down_proj.weight torch.float32" in report.reason


def test_halves_that_share_scales(on_gpu):
    mlp = to_fp8(real_mlp(PHI3, hidden_size=256, intermediate_size=192))
    (report,) = fusion_report(fuse_model(nn.ModuleList([mlp]), strict=True)).mlps
    assert "gate_up_proj packs gate and up [384, 256], whose halves share scales" in report.reason
    mlp(torch.randn(3, 256))


@torch.no_grad()
def test_a_whole_model(by_transformers, on_gpu):
    """Attention in floats, MLPs in FP8: tokens are those of the same weights dequantized."""
    model = to_fp8(tiny_model(**SIZES), names=("mlp",))
    exact = copy.deepcopy(model)
    fuse_model(model, strict=True)
    by_transformers.clear()
    ids = token_ids(2, 7)
    logits = model(ids).logits
    assert by_transformers == []
    for name, linear in list(exact.named_modules()):
        if isinstance(linear, FP8Linear):
            owner, _, child = name.rpartition(".")
            plain = nn.Linear(linear.in_features, linear.out_features, bias=False)
            scale = linear.weight_scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)
            plain.weight.data = linear.weight.float() * scale
            setattr(exact.get_submodule(owner), child, plain)
    torch.testing.assert_close(logits, exact(ids).logits, atol=1e-5, rtol=1e-5)


def test_quantizing_is_transformers(by_transformers):
    """The reference of the scales: the largest number of each 128 becomes e4m3's largest."""
    data, scale = quantize_ref(torch.tensor([[1.0] * 100 + [-3.0] * 28 + [0.0] * 72]))
    assert scale.tolist() == [[torch.tensor(3.0).div(448).item(), 1.0]]
    assert data[0, 127].float() == -448
    assert data.shape == (1, 200)
