"""The kernels of routed experts on FP8 weights against float64: interpreted on the CPU, compiled on a GPU."""

from dataclasses import replace

import pytest
import torch
from numerics import ROUTINGS, quantize_stack, rerouted, run_experts

from hf_fused_mlp.reference import experts_ref, fp8_experts_ref
from hf_fused_mlp.types import ExpertsForm, ExpertsPlan, Matrix, TileConfig
from hf_fused_mlp.validation import Errors, inaccuracy

GATED = ExpertsForm("planes", True, "silu")
FORMS = {"gated": GATED, "clamped": GATED._replace(limit=0.7), "plain": ExpertsForm("planes", False, "relu2")}
ROW = TileConfig("pairs", block_n=128, block_k=128)


def plan(order, rows, up, down="", up_n=128):
    """Of these kernels; what up gives is quantized in tiles of 128."""
    tile = TileConfig(up, block_n=up_n, block_k=128, num_warps=4, num_stages=2, group_m=2)
    return ExpertsPlan(order, rows, tile, replace(tile, kernel=down or up, block_n=64))


MAIN = {
    "pairs": ExpertsPlan("pairs", 1, ROW, replace(ROW, block_k=256)),
    "w8a16 16": plan("sorted", 16, "w8a16", up_n=64),
    "w8a8 64": plan("sorted", 64, "w8a8"),
    "w8a8 128": plan("gathered", 128, "w8a8"),
}
PLANS = MAIN | {
    "w8a16 128": plan("gathered", 128, "w8a16"),
    "w8a16_scaled 16": plan("sorted", 16, "w8a16_scaled"),
    "w8a16_scaled 128": plan("gathered", 128, "w8a16_scaled"),
    "w8a8 16": plan("sorted", 16, "w8a8"),
    "down as it is": plan("sorted", 16, "w8a8", "w8a16", up_n=64),
    "down scaled": plan("gathered", 128, "w8a16", "w8a8"),
}


def run(plan, operands, form):
    """The output of a plan; on a GPU, dot products of as many rows as registers hold."""
    if plan.order == "pairs" and operands[0].is_cuda:
        plan = replace(plan, up=replace(plan.up, block_n=2), down=replace(plan.down, block_n=2))
    return run_experts(plan, operands, form)


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


def check(got, operands, form):
    """As near to float64 as Transformers' arithmetic; nearer by far where tokens are not quantized."""
    x, ids, weights, up, down, _, _, *scales = operands
    exact = experts_ref(x.double(), ids, weights.double(), up, down, None, None, form, *scales)
    stacks = (Matrix(data, scale, None) for data, scale in zip((up, down), scales, strict=True))
    baseline = fp8_experts_ref(x, ids, weights, *stacks, form)
    assert inaccuracy(got, baseline, exact, quantized=True) is None and got.is_contiguous()
    return Errors.of(got, exact).relative_rms, Errors.of(baseline, exact).relative_rms


@pytest.mark.parametrize(("form", "scales"), [*((form, "fp32") for form in FORMS), ("gated", "e8m0")])
@pytest.mark.parametrize("plan", PLANS)
def test_forms(plan, form, scales, device):
    operands = problem(FORMS[form], device, scales=scales)
    error, baseline = check(run(PLANS[plan], operands, FORMS[form]), operands, FORMS[form])
    quantizes = "w8a8" in (PLANS[plan].up.kernel, PLANS[plan].down.kernel)
    assert baseline > 1e-2
    assert error < (1.05 * baseline if quantizes else 1e-3)


SIZES = {
    "one token": {"tokens": 1, "experts": 5, "top_k": 1},
    "empty experts": {"tokens": 3, "experts": 60, "top_k": 4},
    "many of each": {"tokens": 70, "experts": 3, "top_k": 1},
    "all experts": {"tokens": 5, "experts": 17, "top_k": 17},
    "ragged rows": {"hidden": 272},
    "wide": {"hidden": 384, "intermediate": 256},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("plan", MAIN)
def test_sizes(plan, size, device):
    operands = problem(GATED, device, **SIZES[size])
    check(run(PLANS[plan], operands, GATED), operands, GATED)


@pytest.mark.parametrize("plan", MAIN)
def test_ragged_without_a_gate(plan, device):
    """The last blocks of scales are not whole, along rows and along K."""
    form = FORMS["plain"]
    operands = problem(form, device, hidden=272, intermediate=176)
    check(run(PLANS[plan], operands, form), operands, form)


@pytest.mark.parametrize("plan", MAIN)
@pytest.mark.parametrize("case", ROUTINGS)
def test_routings(plan, case, device):
    """All tokens to one expert, ids of other ranks, an id twice in a row."""
    x, ids, *rest = problem(GATED, device, tokens=21)
    ids, rest[0] = rerouted(case, ids, rest[0])
    got = run(PLANS[plan], (x, ids, *rest), GATED)
    if case == "all foreign":
        assert not got.any()
    else:
        check(got, (x, ids, *rest), GATED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("plan", MAIN)
def test_types(plan, dtype, device):
    """Of the tokens, whose rows may be apart; ids may be int32 and weights of another dtype."""
    if (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and "w8a16" in (PLANS[plan].up.kernel, PLANS[plan].down.kernel)
    ):
        pytest.skip("the interpreter does not multiply bf16")
    x, ids, weights, *rest = problem(GATED, device, dtype)
    apart = torch.zeros(len(x), 2 * x.shape[1], dtype=dtype, device=device)[:, : x.shape[1]].copy_(x)
    operands = apart, ids.int(), weights.float(), *rest
    check(run(PLANS[plan], operands, GATED), operands, GATED)


@pytest.mark.parametrize("plan", ["w8a8 16", "w8a8 128", "w8a16_scaled 16"])
def test_extremes(plan, device):
    """A row of zeros, large and small tokens: a block that is all zero, one that would overflow in fp16, one whose
    scale has no finite inverse."""
    x, *rest = problem(GATED, device, torch.float32, tokens=9)
    x *= torch.logspace(-6, 3, 9, device=device)[:, None]
    x[3], x[4, :128], x[8, 7] = 0, 0, 3e5
    x[5] *= 1e-19
    operands = x, *rest
    got = run(PLANS[plan], operands, GATED)
    check(got, operands, GATED)
    assert not got[3].any()


@pytest.mark.parametrize("tokens", [0, 1, 2])
@pytest.mark.parametrize("change", ["none", "strided weights", "unaligned", "rows apart", "hidden of 8", "fails"])
def test_dispatch(change, tokens, device, monkeypatch, caplog):
    """Whatever the tensors are like, and where a launch fails, the operator's answer is right."""
    from triton.errors import TritonError

    from hf_fused_mlp.kernels.experts import fp8_grouped
    from hf_fused_mlp.ops import dispatch
    from hf_fused_mlp.types import ExpertsOperands

    hidden = 136 if change == "hidden of 8" else 128
    x, ids, weights, up, down, _, _, *scales = problem(GATED, device, tokens=max(tokens, 1), top_k=1, hidden=hidden)
    x, ids, weights = x[:tokens], ids[:tokens], weights[:tokens]
    if change == "strided weights":
        up, scales[0] = up.mT.contiguous().mT, scales[0].mT.contiguous().mT
    elif change == "unaligned":
        up = torch.empty(up.numel() + 1, dtype=up.dtype, device=device)[1:].view(up.shape).copy_(up)
    elif change == "rows apart":
        x = x.mT.contiguous().mT
    elif change == "fails":

        def fail(*_):
            raise TritonError("out of resources")

        monkeypatch.setattr(fp8_grouped, "fp8_grouped", fail)
    got = dispatch.experts_cuda(x, ids, weights, ExpertsOperands(up, down, None, None, GATED, *scales))
    if tokens:
        check(got, (x, ids, weights, up, down, None, None, *scales), GATED)
    assert got.shape == x.shape
    assert ("slower plan" in caplog.text) == (change == "fails" and tokens > 1)


WRONG = {
    "a step of half a block": (PLANS["w8a8 16"], {"block_k": 64}, "a step is one block of scales"),
    "rows of two blocks": (PLANS["w8a16 16"], {"block_n": 256}, "must share their scales"),
    "half a block for down": (PLANS["w8a8 16"], {"block_n": 64}, "quantized in whole blocks"),
    "half a block at once": (PLANS["pairs"], {"block_k": 64}, "whole blocks of scales"),
}


@pytest.mark.parametrize("case", WRONG)
def test_tiles_that_cross_blocks_of_scales(case):
    """A plan may have been written by anyone."""
    plan, change, reason = WRONG[case]
    with pytest.raises(ValueError, match=reason):
        run_experts(replace(plan, up=replace(plan.up, **change)), problem(GATED, "cpu"), GATED)


@pytest.mark.parametrize("capability", [(0, 0), (8, 0), (8, 9), (9, 0), (10, 0)], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 256, 640, 4096])
def test_the_rule(tokens, capability, monkeypatch):
    """FP8 on both sides where the GPU multiplies it, and a plan that its launches accept."""
    from hf_fused_mlp.kernels.experts import prepare_experts, rule_of_thumb
    from hf_fused_mlp.types import GPU, ExpertsCall

    monkeypatch.setattr(GPU, "of", lambda device: GPU("a GPU", 132, capability, 101376))
    for dtype in (torch.bfloat16, torch.float32):
        call = ExpertsCall(tokens, 8, 128, 2048, 768, 2048, GATED, dtype, torch.device("cpu"), "fp8")
        chosen = rule_of_thumb(call)
        assert callable(prepare_experts(chosen, call))
        quantizes = tokens > 1 and capability >= (8, 9) and dtype == torch.bfloat16
        assert chosen.up.kernel == ("pairs" if tokens == 1 else "w8a8" if quantizes else "w8a16")
