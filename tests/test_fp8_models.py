"""Layers of FP8 checkpoints (Transformers' `FP8Linear`): read, fused, packed, saved, and called where they must be."""

import copy
import io

import pytest
import torch
from models import as_on_gpu, fp8_by_reference, real_mlp, tiny_model, token_ids
from numerics import quantize_weight
from torch import nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations import finegrained_fp8
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from hf_fused_mlp import fuse_model, fusion_report, unfuse_model, validate
from hf_fused_mlp.families import problem_of
from hf_fused_mlp.ops import dispatch
from hf_fused_mlp.reference import dequantize, quantize_ref
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
    return fp8_by_reference(monkeypatch)


@pytest.fixture
def on_gpu(monkeypatch):
    as_on_gpu(monkeypatch)


def dequantized(model):
    """A copy with the numbers that the FP8 layers stand for, in fp32."""
    exact = copy.deepcopy(model)
    for path, linear in list(exact.named_modules()):
        if isinstance(linear, FP8Linear):
            plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
            plain.weight.data = dequantize(linear.weight, linear.weight_scale_inv, torch.float32)
            plain.bias = linear.bias
            owner, _, name = path.rpartition(".")
            setattr(exact.get_submodule(owner), name, plain)
    return exact


def as_accurate(got, expected, exact):
    """True if `got` is about as near to `exact` as `expected`, whose inputs are quantized too."""
    error, allowed = Errors.of(got, exact), Errors.of(expected, exact)
    return error.largest < 2 * allowed.largest and error.relative_rms < 1.1 * allowed.relative_rms


@pytest.mark.parametrize("scales", ["fp32", "e8m0"])
@pytest.mark.parametrize("path", [LLAMA, PHI3, NEOX], ids=["gated", "packed", "plain"])
@torch.no_grad()
def test_modules(path, scales, by_transformers, on_gpu):
    """No layer is called, and outputs are nearer to the truth than those of quantized inputs."""
    mlp = to_fp8(real_mlp(path, **SIZES), scales=scales)
    x = torch.randn(2, 3, SIZES["hidden_size"])
    expected, exact = mlp(x), dequantized(nn.ModuleList([mlp]))[0].double()(x.double())
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
    hooked: "up_proj has hooks or a replaced forward",
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
@pytest.mark.parametrize("called", [False, True])
def test_damaged_scales(called, value):
    """Also where another layer has to be called."""
    mlp = to_fp8(real_mlp(LLAMA, **SIZES))
    if called:
        hooked(mlp)
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
    """MLPs alone: attention calls its layers. All projections: none is called, and nothing else is in the way."""
    model = to_fp8(tiny_model(**SIZES))
    exact, ids = dequantized(model), token_ids(2, 7)
    before = model(ids).logits
    fuse_model(model, strict=True)
    by_transformers.clear()
    model(ids)
    assert len(by_transformers) == 2 * 4
    assert {status.state for status in fusion_report(model).fp8_linears} == {"fusable"}

    fuse_model(model, strict=True, fp8_linears=True)
    by_transformers.clear()
    torch.testing.assert_close(model(ids).logits, exact(ids).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate(ids, max_new_tokens=4), exact.generate(ids, max_new_tokens=4))
    assert by_transformers == []
    report = fusion_report(model)
    assert [(status.state, status.reason) for status in (*report.mlps, *report.fp8_linears)] == [("fused", None)] * 16
    torch.save(copy.deepcopy(model), file := io.BytesIO())
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    unfuse_model(model)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_without_a_download(device, by_transformers, tmp_path, monkeypatch):
    """Quantized in every projection while it loads, a model generates, asks for no kernel of Transformers', and is
    saved as it would be unfused."""

    def download(*_):
        raise ImportError("no network")

    monkeypatch.setattr(finegrained_fp8, "is_kernels_available", lambda: False)
    monkeypatch.setattr(finegrained_fp8, "lazy_load_kernel", download)
    if device == "cpu":
        as_on_gpu(monkeypatch)
        monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    tiny_model(dtype=torch.bfloat16, head_dim=64, **SIZES).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        device_map=device,
        quantization_config=FineGrainedFP8Config(modules_to_not_convert=["lm_head"]),
        use_fused_mlp={"fp8_linears": True},
    )
    report, ids = fusion_report(model), token_ids(2, 7).to(device)
    assert [(status.state, status.reason) for status in (*report.mlps, *report.fp8_linears)] == [("fused", None)] * 16
    logits, exact = model(ids).logits, nn.Module.float(dequantized(model))(ids).logits
    assert (logits - exact).norm() < 0.1 * exact.norm()
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 11)
    assert by_transformers == []
    for form, change in (("fused", fuse_model), ("plain", unfuse_model)):
        change(model).save_pretrained(tmp_path / form)
    fused, plain = ((tmp_path / form / "model.safetensors").read_bytes() for form in ("fused", "plain"))
    assert fused == plain and len(plain) < 0.6 * (tmp_path / "model.safetensors").stat().st_size


@torch.no_grad()
def test_linears_of_an_mlp_that_is_left_alone(by_transformers, on_gpu):
    """An excluded MLP calls its layers, which are fused."""
    model = to_fp8(tiny_model(**SIZES))
    ids, exact = token_ids(2, 7), dequantized(model)
    names = ["*.mlp", "*.q_proj"]
    fuse_model(model, exclude=names, fp8_linears=True)
    torch.testing.assert_close(model(ids).logits, exact(ids).logits, atol=0.1, rtol=0.1)
    assert len(by_transformers) == 2  # q_proj's


def test_linears(by_transformers, on_gpu):
    """Hooks see the call; biases, one token and none; gradients of the input; compiled; patched."""
    layer = nn.Sequential(to_fp8(nn.ModuleDict({"proj": nn.Linear(200, 136)}))["proj"])
    exact = dequantized(layer)
    fuse_model(layer, strict=False, fp8_linears=True)
    linear = layer[0]
    seen = []
    handle = linear.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    for shape in ((200,), (1, 200), (2, 3, 200), (0, 200)):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), exact(x), atol=1e-5, rtol=1e-5)
    assert len(seen) == 4
    handle.remove()
    x = torch.randn(3, 200, requires_grad=True)
    (got,), (expected,) = (torch.autograd.grad(form(x).square().sum(), x) for form in (layer, exact))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), exact(x), atol=1e-5, rtol=1e-5)
    assert by_transformers == []
    linear.weight_scale_inv = nn.Parameter(linear.weight_scale_inv.half(), requires_grad=False)
    assert "has scales [2, 2] of torch.float16" in fusion_report(layer).fp8_linears[0].reason
    layer(x)
    assert len(by_transformers) == 1


def test_no_linear_in_fp8():
    with pytest.raises(ValueError, match="strict: found no FP8Linear to fuse"):
        fuse_model(tiny_model(), strict=True, fp8_linears=True)


def test_quantizing_is_transformers(by_transformers):
    """The reference of the scales: the largest number of each 128 becomes e4m3's largest."""
    data, scale = quantize_ref(torch.tensor([[1.0] * 100 + [-3.0] * 28 + [0.0] * 72]))
    assert scale.tolist() == [[torch.tensor(3.0).div(448).item(), 1.0]]
    assert data[0, 127].float() == -448
    assert data.shape == (1, 200)


@pytest.mark.parametrize("fp8_linears", [False, True])
def test_validate(fp8_linears, by_transformers, on_gpu):
    """The baseline quantizes activations, the oracle nothing; a damaged scale shows against the reference model."""
    model = to_fp8(tiny_model(**SIZES), names=("proj",) if fp8_linears else ("mlp",))
    reference = copy.deepcopy(model)
    fuse_model(model, strict=True, fp8_linears=fp8_linears)
    by_transformers.clear()
    report = validate(model, token_ids(2, 17), new_tokens=2)
    assert by_transformers == []
    assert report.passed
    assert {layer.oracle for layer in report.layers} == {"float64"}
    assert all(layer.path == "fused" for layer in report.layers)
    assert all(layer.fused.relative_rms < 1e-5 < 1e-2 < layer.original.relative_rms < 0.1 for layer in report.layers)
    assert "forward" not in vars(model.model.layers[0].mlp.up_proj)
    model.model.layers[1].mlp.up_proj.weight_scale_inv.data *= 1.5
    assert not validate(model, token_ids(2, 17), reference=reference, new_tokens=0).passed


def test_validate_against_floats(on_gpu):
    """Layers are compared with their own original form, logits with the model before it was quantized."""
    model = tiny_model(**SIZES)
    reference = copy.deepcopy(model)
    fuse_model(to_fp8(model, names=("mlp",)), strict=True)
    report = validate(model, token_ids(2, 17), reference=reference, new_tokens=0)
    assert report.passed and report.reference == "its original form"
    assert all(layer.fused.relative_rms < 1e-5 < 1e-2 < layer.original.relative_rms < 0.1 for layer in report.layers)
    own = validate(model, token_ids(2, 17), new_tokens=0)
    quantizing = (model(token_ids(2, 17)).logits - reference(token_ids(2, 17)).logits).abs().max().item()
    assert report.logits.largest_difference == pytest.approx(quantizing) != own.logits.largest_difference
    assert report.logits.reference_perplexity != own.logits.reference_perplexity


@torch.no_grad()
def test_linears_compile_without_gradients(by_transformers, on_gpu):
    """As `generate` compiles: one graph."""
    layer = nn.Sequential(to_fp8(nn.ModuleDict({"proj": nn.Linear(256, 128)}))["proj"])
    fuse_model(layer, fp8_linears=True)
    x = torch.randn(3, 256)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    assert by_transformers == []


def test_weights_that_require_gradients(on_gpu):
    """As Transformers loads them. They get none, and a backward that reaches nothing else is no error."""
    linears = to_fp8(nn.ModuleDict({"proj": nn.Linear(256, 128)}))
    model = nn.ModuleDict({"mlp": to_fp8(real_mlp(LLAMA, **SIZES)), "proj": linears["proj"]})
    for parameter in model.parameters():
        parameter.requires_grad_()
    fuse_model(model, fp8_linears=True)
    bias = nn.Parameter(torch.zeros(128))
    (model["proj"](model["mlp"](torch.randn(3, 256))) + bias).sum().backward()
    assert bias.grad is not None
    assert all(p.grad is None for name, p in model.named_parameters() if "weight" in name)
    assert model["proj"].bias.grad is not None


def test_linears_under_autocast(by_transformers, on_gpu):
    layer = nn.Sequential(to_fp8(nn.ModuleDict({"proj": nn.Linear(256, 128)}))["proj"])
    fuse_model(layer, fp8_linears=True)
    x = torch.randn(3, 256)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = layer(x)
        assert torch.equal(layer[0](input=x), out)
    assert out.dtype == torch.float32
    assert by_transformers == []


@torch.no_grad()
def test_weights_that_were_left_in_floats(by_transformers, on_gpu):
    """Sizes that are no whole blocks: Transformers' `FP8Linear` then holds a float weight, and is a plain layer."""
    mlp = to_fp8(real_mlp(LLAMA, **SIZES))
    x = torch.randn(3, SIZES["hidden_size"])
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        linear.weight = nn.Parameter(linear.weight.float() * 0.01)
    expected = mlp(x)
    model = fuse_model(nn.ModuleList([mlp]), strict=True)
    assert [(m.state, m.reason) for m in fusion_report(model).mlps] == [("fused", None)]
    assert fusion_report(model).fp8_linears == ()
    torch.testing.assert_close(mlp(x), expected)
    assert by_transformers == []


def test_weights_on_meta(on_gpu):
    """Nothing can be called, and the reason says so; where accelerate fetches them, linears are fused all the same."""
    accelerate = pytest.importorskip("accelerate")
    mlp = to_fp8(real_mlp(LLAMA, **SIZES)).to("meta")
    (report,) = fusion_report(nn.ModuleList([mlp])).mlps
    assert "gate_proj has its weight on meta" in report.reason
    model = nn.Sequential(to_fp8(nn.ModuleDict({"proj": nn.Linear(256, 128)}))["proj"])
    expected = dequantized(model)(torch.ones(2, 256))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    fuse_model(model, fp8_linears=True)
    assert [linear.state for linear in fusion_report(model).fp8_linears] == ["fused"]
    torch.testing.assert_close(model(torch.ones(2, 256)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("hidden", [256, 512])
@pytest.mark.parametrize("cls", [LLAMA, PHI3, NEOX])
def test_a_plan_is_measured_for_the_problem_that_runs(cls, hidden, on_gpu):
    """Also if the scales of gate do not end where those of up may begin."""
    mlp = fuse_model(nn.ModuleList([to_fp8(real_mlp(cls, hidden_size=hidden, intermediate_size=384))]))[0]
    key = problem_of(mlp, 4)
    assert key == dispatch.problem_key(4, mlp.operands(), torch.bfloat16)
    assert key.one_block == (cls != LLAMA or hidden == 512)
