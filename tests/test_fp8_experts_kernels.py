"""The kernels of routed experts on FP8 weights against float64: interpreted on the CPU, compiled on a GPU."""

from dataclasses import replace

import pytest
import torch
from numerics import quantize_stack

from hf_fused_mlp.reference import experts_ref, fp8_experts_ref
from hf_fused_mlp.types import ExpertsForm, ExpertsPlan, Matrix, TileConfig
from hf_fused_mlp.validation import Errors, inaccuracy

GATED = ExpertsForm("planes", True, "silu")
FORMS = {"gated": GATED, "clamped": GATED._replace(limit=0.7), "plain": ExpertsForm("planes", False, "relu2")}
ROW = TileConfig("pairs", block_n=16, block_k=128)
PLANS = {"pairs": ExpertsPlan("pairs", 1, ROW, replace(ROW, block_n=32, block_k=256))}
for kernel in ("w8a16", "w8a16_scaled", "w8a8"):
    up = TileConfig(kernel, block_n=128, block_k=128, num_warps=4, num_stages=2, group_m=2)
    down = replace(up, block_n=64)
    PLANS |= {
        f"{kernel} 16": ExpertsPlan("sorted", 16, up, down),
        f"{kernel} 64": ExpertsPlan("sorted", 64, up, down),
        f"{kernel} 128": ExpertsPlan("gathered", 128, up, down),
    }
PLANS["mixed"] = ExpertsPlan("sorted", 16, up, replace(down, kernel="w8a16"))
PLANS["mixed up"] = ExpertsPlan("sorted", 16, replace(down, kernel="w8a16"), replace(down, kernel="w8a16_scaled"))
PLANS["mixed up"] = replace(PLANS["mixed up"], up=replace(up, kernel="w8a16"))


def problem(
    form, device, dtype=torch.float16, tokens=11, experts=6, top_k=3, hidden=256, intermediate=128, scales="fp32"
):
    """Random operands as launches take them: x, ids, weights, up, down, no biases, scales of up and down."""
    torch.manual_seed(tokens + experts)
    up = torch.randn(experts, (2 if form.gated else 1) * intermediate, hidden) * hidden**-0.5
    down = torch.randn(experts, hidden, intermediate) * 2 * intermediate**-0.5
    (up, up_scale), (down, down_scale) = quantize_stack(up, scales), quantize_stack(down, scales)
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    x, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, top_k).to(dtype)
    operands = x, ids, weights, up, down, None, None, up_scale, down_scale
    return tuple(None if t is None else t.to(device) for t in operands)


def run(plan, operands, form):
    from hf_fused_mlp.kernels.experts import describe_experts, prepare_experts

    x, ids, _, up, down, *_ = operands
    return prepare_experts(plan, describe_experts(x, ids, up, down, form))(*operands)


def check(got, operands, form):
    """As near to float64 as Transformers' arithmetic; nearer by far where tokens are not quantized."""
    x, ids, weights, up, down, _, _, *scales = operands
    exact = experts_ref(x.double(), ids, weights.double(), up, down, None, None, form, *scales)
    stacks = (Matrix(data, scale, None) for data, scale in zip((up, down), scales, strict=True))
    baseline = fp8_experts_ref(x, ids, weights, *stacks, form)
    assert inaccuracy(got, baseline, exact, quantized=True) is None and got.is_contiguous()
    return Errors.of(got, exact).relative_rms, Errors.of(baseline, exact).relative_rms


@pytest.mark.parametrize("scales", ["fp32", "e8m0"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("plan", PLANS)
def test_forms(plan, form, scales, device):
    operands = problem(FORMS[form], device, scales=scales)
    error, baseline = check(run(PLANS[plan], operands, FORMS[form]), operands, FORMS[form])
    quantizes = "w8a8" in (PLANS[plan].up.kernel, PLANS[plan].down.kernel)
    assert baseline > 1e-2 and error < (1.05 * baseline if quantizes else 1e-3)
