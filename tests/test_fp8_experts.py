"""Routed experts of FP8 checkpoints (Transformers' `FP8Experts`): read, fused by both doors, left alone, validated."""

import copy
import io

import pytest
import torch
from models import compiled_experts, experts_as_on_gpu, fp8_by_reference, tiny_moe, token_ids
from numerics import quantize_stack
from torch import nn
from transformers import FineGrainedFP8Config
from transformers.integrations import finegrained_fp8
from transformers.integrations.finegrained_fp8 import FP8Experts, replace_with_fp8_linear

from hf_fused_mlp import fuse_model, fusion_report, unfuse_model, validate
from hf_fused_mlp.families.experts import FusedExperts
from hf_fused_mlp.reading.experts import find_experts
from hf_fused_mlp.reference import experts_ref, fp8_experts_ref
from hf_fused_mlp.types import ExpertsForm, Matrix
from hf_fused_mlp.validation import Errors

SIZES = {"hidden_size": 256, "moe_intermediate_size": 128}
NOT_EXPERTS = [".*self_attn.*", "lm_head", ".*mlp.gate"]


def to_fp8(model, scales="fp32", **options):
    """`model` with its experts as Transformers puts them in place of those of a checkpoint that it quantizes."""
    floats = {name: module for name, module in model.named_modules() if name.endswith(".experts")}
    config = FineGrainedFP8Config(scale_fmt="ue8m0" if scales == "e8m0" else "float", **options)
    replace_with_fp8_linear(model, NOT_EXPERTS, config)
    for name, module in floats.items():
        fp8 = model.get_submodule(name)
        for stack, weights in module.named_parameters():
            data, factors = quantize_stack(weights.detach(), scales)
            setattr(fp8, stack, nn.Parameter(data, requires_grad=False))
            setattr(fp8, f"{stack}_scale_inv", nn.Parameter(factors, requires_grad=False))
        for parameter, buffer in list(fp8._parameters.items()):
            if buffer is not None and buffer.is_meta:
                setattr(fp8, parameter, nn.Parameter(torch.ones(buffer.shape)))
        fp8.eval()
    return model


def tiny(scales="fp32", **changes):
    model = tiny_moe(**SIZES | changes)
    return to_fp8(model, scales)


def experts_of(model, layer=0):
    return model.model.layers[layer].mlp.experts


def inputs(experts, tokens=9, dtype=torch.float32):
    torch.manual_seed(1)
    ids = torch.stack([torch.randperm(experts.num_experts)[:3] for _ in range(tokens)])
    return torch.randn(tokens, experts.hidden_dim).to(dtype), ids, torch.rand(tokens, 3).to(dtype)


@pytest.fixture(autouse=True)
def by_transformers(monkeypatch):
    """In place of kernels from the Hub, and the weights that they were called with."""
    return fp8_by_reference(monkeypatch)


@pytest.fixture
def on_gpu(monkeypatch):
    """The operator's calls, which run PyTorch's operations."""
    return experts_as_on_gpu(monkeypatch)


def as_accurate(got, expected, exact):
    """True if `got` is about as near to `exact` as `expected`, whose inputs are quantized too."""
    error, allowed = Errors.of(got, exact), Errors.of(expected, exact)
    return error.largest < 2 * allowed.largest and error.relative_rms < 1.1 * allowed.relative_rms


def exact_output(experts, x, ids, weights, form):
    return experts_ref(
        x.double(), ids, weights.double(), experts.gate_up_proj, experts.down_proj, None, None, form,
        experts.gate_up_proj_scale_inv, experts.down_proj_scale_inv,
    )  # fmt: skip


@pytest.mark.parametrize("scales", ["fp32", "e8m0"])
@pytest.mark.parametrize("form", ["silu", "clamped", "swish"])
@torch.no_grad()
def test_modules(form, scales, by_transformers, on_gpu):
    """Nothing of Transformers' is called; the reference of its arithmetic is its loop's; unfusing gives all back."""
    fields = {"clamped": {"swiglu_limit": 0.4}, "swish": {"swiglu_limit": 0.6, "swiglu_alpha": 1.702}}.get(form, {})
    model = tiny(scales)
    experts = experts_of(model)
    for name, value in fields.items():
        setattr(experts, name, value)
        if name == "swiglu_limit":
            experts.limit = value
    x = inputs(experts)
    experts.config._experts_implementation = "eager"
    loop = experts(*x)
    assert by_transformers
    expected_form = {
        "silu": ExpertsForm("planes", True, "silu"),
        "clamped": ExpertsForm("planes", True, "silu", 0.4),
        "swish": ExpertsForm("planes", True, "quick_gelu", 0.6, 1.0),
    }[form]
    state = copy.deepcopy(experts.state_dict())
    fuse_model(model, strict=True)
    assert [status.state for status in fusion_report(model).experts] == ["fused", "fused"]
    by_transformers.clear()
    got, spec = experts(*x), experts.fused_spec
    assert not by_transformers and len(on_gpu) == 1
    assert on_gpu[0][3].form == expected_form and spec.up_scale == "gate_up_proj_scale_inv"
    stacks = [
        Matrix(getattr(experts, n), getattr(experts, f"{n}_scale_inv"), None) for n in ("gate_up_proj", "down_proj")
    ]
    torch.testing.assert_close(fp8_experts_ref(*x, *stacks, expected_form), loop)
    assert as_accurate(got, loop, exact_output(experts, *x, expected_form))
    unfuse_model(model)
    assert type(experts) is FP8Experts
    assert torch.equal(experts(*x), loop)
    for name, tensor in experts.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), state[name].view(torch.uint8)), name


@torch.no_grad()
def test_without_a_gate(on_gpu, by_transformers):
    model = tiny()
    gated = experts_of(model)
    decorate = finegrained_fp8.use_experts_implementation
    cls = decorate(
        experts_class=FP8Experts, experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS, has_gate=False
    )
    experts = cls(gated.config, block_size=[128, 128], has_gate=False).eval()
    for name, shape in (("up_proj", (6, 128, 256)), ("down_proj", (6, 256, 128))):
        data, scale = quantize_stack(torch.randn(shape) * shape[2] ** -0.5)
        setattr(experts, name, nn.Parameter(data, requires_grad=False))
        setattr(experts, f"{name}_scale_inv", nn.Parameter(scale, requires_grad=False))
    experts.config._experts_implementation = "eager"
    x = inputs(experts)
    loop = experts(*x)
    fuse_model(experts, strict=True)
    by_transformers.clear()
    got = experts(*x)
    assert not by_transformers and not on_gpu[0][3].form.gated
    assert (got - loop).norm() < 0.1 * loop.norm()


@torch.no_grad()
def test_another_model_is_loaded(on_gpu, by_transformers):
    """Transformers decorates `FP8Experts` again for each of its modules; those that are fused stay fused."""
    model = fuse_model(tiny(), strict=True)
    experts = experts_of(model)
    torch.save(experts, file := io.BytesIO())
    file.seek(0)
    x = inputs(experts)
    expected = experts(*x)
    forward = FP8Experts.forward
    other = tiny()
    assert FP8Experts.forward is not forward
    assert torch.equal(experts(*x), expected)
    assert fusion_report(experts).experts[0].reason is None
    for again in (
        copy.deepcopy(experts),
        torch.load(file, weights_only=False),
        fuse_model(experts_of(other), strict=True),
    ):
        assert isinstance(again, FusedExperts)
        assert again(*x).shape == expected.shape
    assert len(on_gpu) == 5 and not by_transformers


@pytest.mark.parametrize("door", ["class", "interface"])
@torch.no_grad()
def test_model(door, on_gpu, by_transformers):
    """Logits of a whole model by both doors, eager and compiled in one graph."""
    model, tokens = tiny(), token_ids(1, 7)
    model.set_experts_implementation("eager")
    expected = model(tokens).logits
    by_transformers.clear()
    fuse_model(model, strict=True) if door == "class" else model.set_experts_implementation("hf_fused_mlp")
    got = model(tokens).logits
    assert len(on_gpu) == 2 and not by_transformers
    assert (got - expected).norm() < 0.1 * expected.norm()
    compiled, count = compiled_experts(model, tokens)
    torch.testing.assert_close(compiled, got, rtol=1e-4, atol=1e-4)
    assert count == 2
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 10)


def test_interface_falls_back(caplog, monkeypatch):
    """Where no kernels run, what Transformers runs for FP8 by default, and a reason once if that is for good."""
    ran = []
    monkeypatch.setitem(
        finegrained_fp8.FP8ExpertsInterface._global_mapping, "grouped_mm", lambda *args: ran.append(args) or args[1]
    )
    experts = experts_of(tiny())
    experts.config._experts_implementation = "hf_fused_mlp"
    x = inputs(experts)
    with torch.no_grad():
        experts(*x)
        assert len(ran) == 1 and not caplog.records
        experts.block_size = [64, 64]
        for _ in range(2):
            experts(*x)
    assert len(ran) == 3
    assert [r.getMessage() for r in caplog.records] == [
        "gate_up_proj has a scale for each block of [64, 64] weights, expected [128, 128]; load a checkpoint of such "
        "blocks, or pass exclude=[...]; grouped_mm runs"
    ]


def scale_of(experts, change):
    experts.gate_up_proj_scale_inv = nn.Parameter(change(experts.gate_up_proj_scale_inv), requires_grad=False)


def wrong_block(experts):
    experts.block_size = [64, 128]


def per_tensor(experts):
    experts.block_size = None
    scale_of(experts, lambda scale: scale[:, :1, :1])


def static(experts):
    experts.activation_scheme = "static"


def few_scales(experts):
    scale_of(experts, lambda scale: scale[:, :1])


def scales_of_few(experts):
    scale_of(experts, lambda scale: scale[:2])


def half_scales(experts):
    scale_of(experts, lambda scale: scale.half())


def no_scales(experts):
    experts.gate_up_proj_scale_inv = None


def softcap(experts):
    experts.gate_softcap = 5.0


def own_linear(experts):
    experts.linear = lambda x, *_, **__: x


def fp4(experts):
    experts.gate_up_proj = nn.Parameter(torch.zeros(6, 256, 128, dtype=torch.int8), requires_grad=False)


def mixed(experts):
    experts.down_proj = nn.Parameter(experts.down_proj.bfloat16(), requires_grad=False)


LEFT_ALONE = {
    wrong_block: "gate_up_proj has a scale for each block of [64, 128] weights, expected [128, 128]; load a",
    per_tensor: "gate_up_proj has a scale for each block of None weights, expected [128, 128]",
    static: "gate_up_proj quantizes its input by a scale that the checkpoint gives, expected dynamic ones; load a",
    few_scales: "gate_up_proj has scales [6, 1, 2] of torch.float32 for a weight [6, 256, 256], expected one for",
    scales_of_few: "gate_up_proj has scales [2, 2, 2] of torch.float32 for a weight [6, 256, 256], expected one for",
    half_scales: "gate_up_proj has scales [6, 2, 2] of torch.float16 for a weight [6, 256, 256], expected one for",
    no_scales: "gate_up_proj is in FP8 and has no scales gate_up_proj_scale_inv; load the checkpoint as it was",
    softcap: "FP8Experts combines gate and up in a way that no kernel computes",
    own_linear: "its method linear was replaced on the instance; undo the patch",
    fp4: "gate_up_proj is Parameter of torch.int8, expected a Parameter of fp16, bf16 or fp32",
    mixed: "its weights do not fit together (gate_up_proj [6, 256, 256] torch.float8_e4m3fn cpu, down_proj",
}


@pytest.mark.parametrize("change", LEFT_ALONE, ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_cannot_be_read_runs_as_it_is(change, on_gpu, monkeypatch):
    """Whether it is so when fusing or becomes so afterwards."""
    if change is softcap and not hasattr(experts_of(tiny()), "gate_softcap"):
        pytest.skip("no softcap in this version")
    experts, later = experts_of(tiny()), fuse_model(experts_of(tiny()), strict=True)
    x = inputs(experts)
    for module in (experts, later):
        change(module)
    fuse_model(experts)
    assert not isinstance(experts, FusedExperts)
    for module in (experts, later):
        ran = []
        (report,) = fusion_report(module).experts
        if not (module is later and change in (softcap, fp4)):  # words of another kind
            assert LEFT_ALONE[change] in report.reason
        else:
            assert report.reason
        with monkeypatch.context() as patch:
            patch.setitem(
                finegrained_fp8.FP8ExpertsInterface._global_mapping,
                "grouped_mm",
                lambda *args: ran.append(1),  # noqa: B023
            )
            module.config._experts_implementation = "grouped_mm"
            from hf_fused_mlp.families import experts as family

            patch.setattr(family, "runs_transformers_own", lambda *_: True)
            module(*x)
        assert ran and not on_gpu


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_damaged_scales(value):
    experts = experts_of(tiny())
    experts.down_proj_scale_inv.data[1, 1, 0] = value
    (report,) = fusion_report(fuse_model(experts)).experts
    assert report.state == "skipped"
    assert report.reason.startswith("down_proj has 1 of 12 scales that are zero or not finite; load it again")


def test_halves_that_share_scales():
    (report,) = fusion_report(fuse_model(experts_of(tiny(moe_intermediate_size=192)))).experts
    assert "gate_up_proj packs gate and up [6, 384, 256], whose halves share scales" in report.reason


def test_a_method_that_was_replaced(on_gpu, monkeypatch):
    """`FP8Experts.linear`, before fusing and after."""
    later, experts = fuse_model(experts_of(tiny()), strict=True), experts_of(tiny())
    monkeypatch.setattr(FP8Experts, "linear", lambda self, x, *_, **__: x)
    assert "known loops" in find_experts(experts)
    assert "was replaced after fusing" in fusion_report(later).experts[0].reason


@torch.no_grad()
def test_weights_that_were_left_in_floats(on_gpu):
    """Sizes that are no whole blocks: Transformers' `FP8Experts` then multiplies with floats."""
    experts = experts_of(tiny())
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, nn.Parameter(torch.randn(getattr(experts, name).shape) * 0.05, requires_grad=False))
    experts.config._experts_implementation = "eager"
    x = inputs(experts)
    loop = experts(*x)
    fuse_model(experts, strict=True)
    torch.testing.assert_close(experts(*x), loop, rtol=1e-4, atol=1e-5)
    assert len(on_gpu) == 1 and on_gpu[0][3].up_scale is None


@pytest.mark.parametrize("scales", ["fp32", "e8m0"])
def test_validate(scales, on_gpu, by_transformers):
    """The baseline quantizes activations, the oracle nothing; a damaged scale shows against the reference model."""
    model = fuse_model(tiny(scales), strict=True)
    reference = copy.deepcopy(model)
    report = validate(unfused := model, token_ids(2, 17), reference=reference, new_tokens=0)
    assert report.passed and unfused is model, str(report)
    assert {layer.oracle for layer in report.layers} == {"float64"} and len(report.layers) == 2
    assert all(layer.fused.relative_rms < 1e-5 < 1e-2 < layer.original.relative_rms < 0.1 for layer in report.layers)
    assert "linear" not in vars(experts_of(model))
    experts_of(model, 1).down_proj_scale_inv.data[2] = experts_of(model, 1).down_proj_scale_inv.data[2].float() * 4
    assert not validate(model, token_ids(2, 17), reference=reference, new_tokens=0).passed
