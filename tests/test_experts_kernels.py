"""The kernels of routed experts against float64: interpreted on the CPU, compiled on a GPU."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from numerics import ROUTINGS, rerouted, run_experts

from hf_fused_mlp.reference import experts_ref
from hf_fused_mlp.types import ExpertsCall, ExpertsForm, ExpertsPlan, TileConfig

PLANES = ExpertsForm("planes", True, "silu")
FORMS = {
    "planes": PLANES,
    "clamped": PLANES._replace(limit=0.7),
    "plain": ExpertsForm("planes", False, "relu2"),
    "transposed": ExpertsForm("transposed", True, "silu"),
    "interleaved": ExpertsForm("interleaved", True, "quick_gelu", limit=0.9, up_offset=1.0),
}
UP, DOWN = (TileConfig("grouped", block_n=n, block_k=32, num_warps=4, num_stages=2, group_m=2) for n in (32, 64))
ROW = TileConfig("pairs", block_n=16, block_k=64)
PLANS = {
    "pairs": ExpertsPlan("pairs", 1, ROW, replace(ROW, block_n=32)),
    "16": ExpertsPlan("sorted", 16, UP, DOWN),
    "64": ExpertsPlan("sorted", 64, UP, DOWN),
    "128": ExpertsPlan("gathered", 128, UP, DOWN),
}


def problem(form, device, dtype, tokens=11, experts=6, top_k=3, hidden=48, intermediate=40, bias=False):
    """Random operands as the operator takes them: x, ids, weights, up, down, up_bias, down_bias."""
    torch.manual_seed(tokens + experts)
    planes = 2 if form.gated else 1
    up, down = torch.randn(experts, planes * intermediate, hidden), torch.randn(experts, hidden, intermediate)
    up, down = up * hidden**-0.5, down * intermediate**-0.5
    if form.layout != "planes":
        up, down = up.mT.contiguous(), down.mT.contiguous()
    biases = (torch.randn(experts, planes * intermediate), torch.randn(experts, hidden)) if bias else (None, None)
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]) if tokens else torch.zeros(0, top_k)
    tensors = torch.randn(tokens, hidden), torch.rand(tokens, top_k), up, down, *biases
    x, weights, *rest = (None if t is None else t.to(device, dtype) for t in tensors)
    return x, ids.long().to(device), weights, *rest


def check(got, operands, form):
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in operands]
    expected = experts_ref(*wide, form)
    error = (got.double() - expected).norm() / expected.norm()
    limit = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[operands[0].dtype]
    assert error < limit and got.dtype == operands[0].dtype and got.is_contiguous()


@pytest.mark.parametrize(("form", "plan", "bias"), list(product(FORMS, PLANS, (False, True))))
def test_forms(form, plan, bias, device):
    operands = problem(FORMS[form], device, torch.float16, bias=bias)
    check(run_experts(PLANS[plan], operands, FORMS[form]), operands, FORMS[form])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 5, 1), (40, 3, 2), (30, 60, 4), (9, 17, 16)])
def test_sizes(plan, tokens, experts, top_k, device):
    operands = problem(PLANES, device, torch.float16, tokens, experts, top_k)
    check(run_experts(PLANS[plan], operands, PLANES), operands, PLANES)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", ROUTINGS)
def test_routings(plan, case, device):
    """All tokens to one expert, ids of other ranks, an id twice in a row."""
    x, ids, *rest = problem(PLANES, device, torch.float16, tokens=21)
    ids, rest[0] = rerouted(case, ids, rest[0])
    got = run_experts(PLANS[plan], (x, ids, *rest), PLANES)
    if case == "all foreign":
        assert not got.any()
    else:
        check(got, (x, ids, *rest), PLANES)


@pytest.mark.parametrize("plan", PLANS)
def test_types(plan, device):
    """fp32 is exact; ids may be int32, weights of another dtype, and rows apart."""
    operands = problem(PLANES, device, torch.float32)
    check(run_experts(PLANS[plan], operands, PLANES), operands, PLANES)
    x, ids, weights, *rest = problem(PLANES, device, torch.float16)
    apart = torch.zeros(len(x), 2 * x.shape[1], dtype=x.dtype, device=device)[:, : x.shape[1]].copy_(x)
    operands = apart, ids.int(), weights.float(), *rest
    check(run_experts(PLANS[plan], operands, PLANES), operands, PLANES)


@pytest.mark.parametrize("plan", ["pairs", "16", "128"])
@pytest.mark.parametrize("tokens", [16, 17, 40])
def test_more_tokens_than_a_launch_takes(plan, tokens, device, monkeypatch):
    """They are computed in parts, also where rows are apart."""
    from hf_fused_mlp.kernels import experts

    monkeypatch.setattr(experts, "MOST_PROGRAMS", 9 * 19)  # of 19 tokens: three pairs of three programs each
    monkeypatch.setattr(experts, "MOST_SORTED", 3 * 19)
    x, *rest = problem(PLANES, device, torch.float16, tokens)
    apart = torch.zeros(len(x), 2 * x.shape[1], dtype=x.dtype, device=device)[:, : x.shape[1]].copy_(x)
    parts = []

    def counted(make, call, *args):
        parts.append(call.tokens)
        return make(call, *args)

    for module, name in ((experts.pairs, "pairs"), (experts.grouped, "grouped")):
        monkeypatch.setattr(module, name, partial(counted, getattr(module, name)))
    for operands in ((x, *rest), (apart, *rest)):
        parts.clear()
        check(run_experts(PLANS[plan], operands, PLANES), operands, PLANES)
        assert parts == {16: [16], 17: [16, 1], 40: [16, 8]}[tokens]


def test_most_pairs_compile(monkeypatch):
    """A program that sorts more than 1024 of them spills registers, and one of 16384 compiles for minutes."""
    from hf_fused_mlp.kernels.experts import MOST_SORTED, routing

    values = []
    monkeypatch.setattr(routing, "launcher", lambda *args, **_: values.append(args[3]))
    call = ExpertsCall(MOST_SORTED // 8, 8, 128, 64, 64, 64, PLANES, torch.float16, torch.device("cpu"))
    routing.sort(call, 128, positions=True, overlap=False)
    *_, (num_pairs, _, chunks, _, chunk, *_) = values
    assert chunks * chunk == num_pairs == MOST_SORTED and chunk <= 1024


@pytest.mark.parametrize("tokens", [0, 1, 6])
@pytest.mark.parametrize("change", ["none", "strided weights", "unaligned", "rows apart", "fails"])
def test_dispatch(change, tokens, device, monkeypatch, caplog):
    """Whatever the tensors are like, and where a launch fails, the operator's answer is right."""
    from triton.errors import TritonError

    from hf_fused_mlp.kernels.experts import grouped
    from hf_fused_mlp.ops import dispatch
    from hf_fused_mlp.types import ExpertsOperands

    x, ids, weights, up, down, *_ = problem(PLANES, device, torch.float16, tokens, bias=False)
    if change == "strided weights":
        up = up.mT.contiguous().mT
    elif change == "unaligned":
        up = torch.empty(up.numel() + 1, dtype=up.dtype, device=device)[1:].view(up.shape).copy_(up)
    elif change == "rows apart":
        x = x.mT.contiguous().mT
    elif change == "fails":

        def fail(*_):
            raise TritonError("out of resources")

        monkeypatch.setattr(grouped, "grouped", fail)
    got = dispatch.experts_cuda(x, ids, weights, ExpertsOperands(up, down, None, None, PLANES))
    if tokens:
        check(got, (x, ids, weights, up, down, None, None), PLANES)
    assert got.shape == x.shape
    assert ("slower plan" in caplog.text) == (change == "fails" and tokens == 6)
