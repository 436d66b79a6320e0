"""FP8 weights with a scale for each block: kernels against float64, and modules from checkpoint to launch."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from numerics import assert_accurate, quantized_mlp, run_plan

from hf_fused_mlp import ops
from hf_fused_mlp.kernels import KERNELS, describe_launch, fp8_dequantized, fp8_gemm, fp8_skinny, prepare
from hf_fused_mlp.kernels._quantize import quantize_rows
from hf_fused_mlp.ops import dispatch
from hf_fused_mlp.reference import dequantize, fp8_linear_ref, mlp_ref, quantize_ref
from hf_fused_mlp.tuning import tuner
from hf_fused_mlp.tuning.heuristics import heuristic_plan
from hf_fused_mlp.tuning.plan_files import _unsupported
from hf_fused_mlp.tuning.tuner import Launch, candidates, correct
from hf_fused_mlp.types import GPU, MLPOperands, Plan, ProblemKey, TileConfig
from hf_fused_mlp.validation import Errors, inaccuracy

CONFIGS = {
    "gemv": TileConfig("fp8_gemv", block_n=4, block_k=256, num_warps=4),
    "skinny": TileConfig("fp8_skinny", block_m=16, block_n=32, block_k=128),
    "split": TileConfig("fp8_skinny", block_m=16, block_n=32, block_k=128, split_k=2),
    "dequantized": TileConfig("fp8_dequantized"),
    "torch": TileConfig("torch"),
}


def baseline(x, *operands):
    """An MLP of Transformers' `FP8Linear`s."""
    gate, up, down, activation, _ = MLPOperands.of(*operands)
    return fp8_linear_ref(fp8_linear_ref(x, up, gate, activation), down)


def oracle(x, *operands):
    *weights, activation, gate_scale, up_scale, down_scale = operands
    doubled = (t if t is None or t.dtype == torch.float8_e4m3fn else t.double() for t in weights)
    return mlp_ref(x.double(), *doubled, activation, gate_scale, up_scale, down_scale)


@pytest.mark.parametrize(("scales", "bias"), [("fp32", False), ("e8m0", True)])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("sizes", [(256, 128), (200, 136)], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_kernels(family, sizes, gated, bias, scales, device, monkeypatch):
    monkeypatch.setattr(
        fp8_skinny, "multiplies_fp8", lambda gpu: False
    )  # or tokens are quantized, as in the next test
    H, I = sizes
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
    m = 1 if family == "gemv" else 5
    operands = quantized_mlp(H, I, gated, bias, dtype, device, scales=scales)
    x = torch.randn(m, H, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    config = CONFIGS[family]
    assert_accurate(run_plan(Plan(config, config), x, *operands), baseline(x, *operands), oracle(x, *operands))


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("quantized", [True, False], ids=["quantized", "converted"])
@pytest.mark.parametrize("sizes", [(256, 128), (200, 136)], ids=str)
@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("m", [5, 21])
def test_few_tokens(m, split_k, sizes, quantized, gated, device, monkeypatch):
    """Tokens are quantized as in Transformers where tensor cores multiply FP8; elsewhere weights are converted."""
    if quantized and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 on this GPU")
    monkeypatch.setattr(fp8_skinny, "multiplies_fp8", lambda gpu: quantized)
    H, I = sizes
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
    operands = quantized_mlp(H, I, gated, True, dtype, device)
    x = torch.randn(m, H, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    x[1] *= 20
    config = TileConfig("fp8_skinny", block_m=16, block_n=64, block_k=128, split_k=split_k)
    out, expected, exact = run_plan(Plan(config, config), x, *operands), baseline(x, *operands), oracle(x, *operands)
    if quantized:
        assert inaccuracy(out, expected, exact, quantized=True) is None
        assert 0.9 < Errors.of(out, exact).relative_rms / Errors.of(expected, exact).relative_rms < 1.1
    else:
        assert_accurate(out, expected, exact)


def reference_mm(data, scale, weight, weight_scale):
    """What `torch._scaled_mm` computes on Hopper."""
    x = data.float() * scale.t().repeat_interleave(128, 1)
    return (x @ dequantize(weight.t(), weight_scale.t(), torch.float32).t()).to(torch.bfloat16)


@pytest.fixture
def gemm_of(device, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr(fp8_gemm, "scaled_mm", reference_mm)
        monkeypatch.setattr(fp8_gemm, "library_has_it", lambda: True)
    elif torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the block-scaled GEMM is there on Hopper only")


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("plan", [("fp8_gemm", "fp8_gemm"), ("fp8_gemm", "torch"), ("torch", "fp8_gemm")], ids=str)
@pytest.mark.parametrize("m", [16, 21])
def test_gemm(m, plan, gated, bias, packed, device, gemm_of):
    """Up hands FP8 over to down if that reads it, and 16-bit numbers otherwise."""
    H, I = 512, 1024
    gate, up, *rest, gate_scale, up_scale, down_scale = quantized_mlp(H, I, gated, bias, torch.bfloat16, device)
    if packed and gated:
        gate, up = torch.cat((gate, up)).chunk(2)
        gate_scale, up_scale = torch.cat((gate_scale, up_scale)).chunk(2)
    operands = gate, up, *rest, gate_scale, up_scale, down_scale
    x = torch.randn(m, H, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    out = run_plan(Plan(*map(TileConfig, plan)), x, *operands)
    assert out.is_contiguous()
    expected, exact = baseline(x, *operands), oracle(x, *operands)
    assert inaccuracy(out, expected, exact, quantized=True) is None
    assert Errors.of(out, exact).relative_rms < 1.1 * Errors.of(expected, exact).relative_rms < 0.1


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
def test_gemm_keeps_no_weights(packed, device, gemm_of):
    """Prepared launches outlive a model. They take nothing of its weights along, and read what lies there by then."""
    gate, up, *rest, gate_scale, up_scale, down_scale = quantized_mlp(512, 512, True, False, torch.bfloat16, device)
    if packed:
        gate, up = torch.cat((gate, up)).chunk(2)
        gate_scale, up_scale = torch.cat((gate_scale, up_scale)).chunk(2)
    else:
        gate_scale = gate_scale.to(torch.float8_e8m0fnu)  # which is read as a copy
    operands = MLPOperands.of(gate, up, *rest, gate_scale, up_scale, down_scale)
    tensors = [tensor for matrix in operands[:3] for tensor in matrix if tensor is not None]
    uses = [torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) for tensor in tensors]
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    run = prepare(Plan(*[TileConfig("fp8_gemm")] * 2), x, operands)
    before = run(x, *operands[:3])
    assert [torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) for tensor in tensors] == uses
    for matrix in operands[:3]:
        matrix.scale.copy_(2 * matrix.scale.float())
    assert inaccuracy(run(x, *operands[:3]), baseline(x, *operands.flat()), oracle(x, *operands.flat()), True) is None
    assert not torch.equal(run(x, *operands[:3]), before)


def test_quantizing(device):
    """Data and scales are those of Transformers, those of a row of zeros and of extremes included."""
    x = torch.randn(5, 1024, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 5)[:, None]
    x[2, :128], x[3, 130] = 0, 1e30
    x = x.to(device, torch.bfloat16)
    call = describe_launch(x, torch.empty(8, 1024), False, "identity")
    data, scale = quantize_rows(call)(x)
    expected, factors = quantize_ref(x)
    assert data.shape == (16, 1024)
    assert scale.shape == (8, 16)
    torch.testing.assert_close(scale[:, :5].t(), factors, rtol=1e-6, atol=0)
    # where a quotient is halfway between two numbers, the last bits of a division decide, which a GPU's may get wrong
    quotients = x.float() / factors.repeat_interleave(128, 1)
    below, above = ((quotients * factor).clamp(-448, 448).to(expected.dtype) for factor in (1 - 1e-6, 1 + 1e-6))
    got = data[:5].float()
    assert ((got == below.float()) | (got == above.float())).all()
    assert (got == expected.float()).float().mean() > 0.98


@pytest.mark.parametrize("as_bytes", [True, False], ids=["bytes", "fp8"])
def test_every_number_is_decoded(as_bytes, device):
    """All 256 of e4m3, as FP8 and as the bytes that GPUs without FP8 read, and all 256 of e8m0."""
    if device.type == "cuda" and not as_bytes and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 on this GPU")
    codes = torch.arange(256, dtype=torch.uint8, device=device)

    def dequantized(weight, scale):
        out = torch.empty(weight.numel(), device=device)
        grid = (-(-weight.numel() // 128), 1, 1)
        fp8_dequantized._dequantize_kernel[grid](weight, scale, out, 1, weight.numel(), 128, 32)
        return out

    numbers = codes if as_bytes else codes.view(torch.float8_e4m3fn)
    out = dequantized(numbers, torch.ones(2, device=device))
    torch.testing.assert_close(out, codes.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)
    one = torch.ones(256 * 128, device=device).to(torch.float8_e4m3fn)
    out = dequantized(one.view(torch.uint8) if as_bytes else one, codes)[::128]
    torch.testing.assert_close(out, codes.view(torch.float8_e8m0fnu).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("m", [1, 16, 512])
def test_the_rule_is_right(m, gated, device, gemm_of, monkeypatch):
    """What it chooses on Hopper runs, is a candidate of the tuner, and within the rule of numerics."""
    monkeypatch.setattr(tuner, "weight_copies", lambda size: 1)
    gpu = GPU("a GPU", 132, (9, 0), 232448)
    key = ProblemKey(m, 512, 1024, 512, gated, "silu", torch.bfloat16, False, True, gpu, "fp8")
    plan = heuristic_plan(key)
    expected = {1: "fp8_gemv", 16: "fp8_skinny", 512: "fp8_gemm"}[m]
    assert (plan.up.kernel, plan.down.kernel) == (expected, expected)
    for launch in (key.up, key.down):
        assert expected in {config.kernel for config in candidates(launch)}
        assert {config.kernel for config in candidates(launch)} <= {"torch"} | {
            name for name in KERNELS if "fp8" in name
        }
    small = replace(key, m=min(m, 16), dtype=torch.float16 if m == 16 and device.type == "cpu" else key.dtype)
    if m == 512 or device.type == "cuda":
        small = key
    for launch, config in ((small.up, plan.up), (small.down, plan.down)):
        # the interpreter takes a millisecond for a program
        sizes = (
            {"m": min(launch.m, 48), "n": launch.n}
            if device.type == "cuda"
            else {"m": min(launch.m, 20), "n": 32 if m == 1 else 128}
        )
        launch = Launch.random(replace(launch, bias=True, **sizes), device)
        assert correct(launch, [config]) == [config]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (0, 0)])
def test_the_rule_elsewhere(capability):
    """Kernels for few tokens everywhere; for many what every library can do."""
    gpu = GPU("a GPU", 100, capability, 101376)
    kernels = []
    for m in (1, 16, 512):
        key = ProblemKey(m, 576, 1536, 576, True, "silu", torch.bfloat16, False, True, gpu, "fp8")
        plan = heuristic_plan(key)
        kernels.append(plan.up.kernel)
        assert _unsupported(key, plan) is None
    assert kernels == (["torch"] * 3 if capability == (0, 0) else ["fp8_gemv", "fp8_skinny", "fp8_dequantized"])


def test_other_scales_of_the_same_weights(device, gemm_of):
    """What is kept of gate and up by address rests on the addresses of the scales too."""
    config, x = TileConfig("fp8_gemm"), torch.randn(16, 512).to(device, torch.bfloat16)
    gate, up, down, *_, gate_scale, up_scale, down_scale = quantized_mlp(512, 512, True, False, torch.bfloat16, device)
    gate, up = torch.cat((gate, up)).chunk(2)
    runs = []
    for factor in (1.0, 3.0):
        scales = torch.cat((gate_scale, up_scale)).mul_(factor).chunk(2)
        runs.append((gate, up, down, None, None, None, "silu", *scales, down_scale))
    matrices = [MLPOperands.of(*operands) for operands in runs]
    run = prepare(Plan(config, config), x, matrices[0])
    for operands, found in zip(runs, matrices, strict=True):
        assert inaccuracy(run(x, *found[:3]), baseline(x, *operands), oracle(x, *operands), quantized=True) is None


CROSSING = [
    TileConfig("fp8_skinny", block_m=16, block_n=256, block_k=128),
    TileConfig("fp8_gemv", block_n=256, block_k=256),
    TileConfig("fp8_gemv", block_n=1, block_k=64),
]


@pytest.mark.parametrize("config", CROSSING, ids=str)
def test_tiles_that_cross_blocks_of_scales(config):
    """A file of plans may have been written by anyone."""
    operands = quantized_mlp(256, 256, False, False, torch.bfloat16)
    with pytest.raises(ValueError, match="scales"):
        run_plan(Plan(config, config), torch.randn(1, 256, dtype=torch.bfloat16), *operands)


def test_a_library_without_the_gemm(monkeypatch, plan_cache, caplog):
    """Its failure is said once, and the next best plan runs."""
    tried = []

    def prepared(plan, x, operands):
        tried.append(plan.up.kernel)
        if plan.up.kernel == "fp8_gemm":
            raise RuntimeError("only supported for CUDA 12.9 and above")
        return lambda x, *matrices: x

    monkeypatch.setattr(dispatch, "prepare", prepared)
    monkeypatch.setattr(dispatch, "SOURCES", [lambda key: Plan(TileConfig("fp8_gemm"), TileConfig("fp8_gemm"))])
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    x = torch.randn(100, 512, dtype=torch.bfloat16)
    for intermediate in (512, 1024):
        operands = MLPOperands.of(*quantized_mlp(512, intermediate, True, False, torch.bfloat16))
        assert dispatch.mlp_cuda(x, operands) is x
    assert tried == ["fp8_gemm", "fp8_dequantized", "fp8_dequantized"]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_x_is_a_float(dtype):
    operands = quantized_mlp(128, 128, True, False, torch.float32)
    with pytest.raises(ValueError, match="expected x"):
        ops.mlp(torch.ones(2, 128).to(dtype), *operands)
