"""An audit's arithmetic: made-up traces, predictions, figures."""

import pytest
import torch
from models import as_on_gpu, tiny_model

from hf_fused_mlp import fuse_model
from hf_fused_mlp.profiling import prediction
from hf_fused_mlp.profiling.estimates import amdahl, bound_of, dollars_per_1m_tokens
from hf_fused_mlp.profiling.figures import agreed_digits, shown
from hf_fused_mlp.profiling.prediction import predict
from hf_fused_mlp.profiling.report import Kernel
from hf_fused_mlp.profiling.trace import MLP, STEP, Breakdown, breakdown, covered
from hf_fused_mlp.tuning import cache, heuristics
from hf_fused_mlp.tuning.plan_files import TunedPlan
from hf_fused_mlp.types import GPU, TORCH, Plan, ProblemKey, TileConfig


def event(cat, name, start, end, **args):
    return {"cat": cat, "name": name, "ts": start, "dur": end - start, "tid": 1, "args": args}


def launched(name, at, start, end, correlation, cat="kernel"):
    """A kernel, and the launch on the host that began at `at`."""
    return [
        event("cuda_runtime", "cudaLaunchKernel", at, at + 1, correlation=correlation),
        event(cat, name, start, end, correlation=correlation),
    ]


@pytest.mark.parametrize(
    "busy, flops_per_byte, expected",
    [
        (0.69, 500, "host-bound"),
        (0.7, 500, "compute-bound"),
        (0.7, 1, "memory-bound"),
        (None, 300, "compute-bound"),
        (None, 299, "memory-bound"),
    ],
)
def test_bound(busy, flops_per_byte, expected):
    assert bound_of(busy, flops_per_byte, ridge=300) == expected


def test_gain_and_cost():
    assert amdahl(0.5, 2) == pytest.approx(4 / 3)
    assert amdahl(0.5, float("inf")) == 2
    assert amdahl(0, 5) == 1
    # a token a millisecond is 3.6 million an hour
    assert dollars_per_1m_tokens(3.6, 1000, tokens=1) == pytest.approx(1)
    assert dollars_per_1m_tokens(3.6, 1000, tokens=4) == pytest.approx(0.25)
    assert dollars_per_1m_tokens(None, 1000, tokens=1) is None


@pytest.mark.parametrize(
    "intervals, expected",
    [([], 0), ([(0, 2), (5, 6)], 3), ([(5, 6), (0, 2), (1, 3)], 4), ([(0, 10), (2, 3)], 10), ([(0, 1), (1, 2)], 2)],
)
def test_covered(intervals, expected):
    assert covered(intervals) == expected


def test_breakdown_on_a_gpu():
    """Kernels run later than their launches, and belong to the MLP that launched them."""
    events = [
        event("user_annotation", STEP, 100, 200),
        event("user_annotation", STEP, 200, 300),
        event("user_annotation", MLP + "a", 110, 130),
        event("user_annotation", MLP + "b", 150, 160),
        event("user_annotation", MLP + "a", 210, 230),
        # the warm-up before the steps, and what the GPU's timeline says of the ranges
        event("user_annotation", MLP + "a", 10, 30),
        event("gpu_user_annotation", MLP + "a", 0, 1000),
        event("cpu_op", "aten::linear", 112, 114),
        *launched("warm", at=15, start=20, end=90, correlation=1),
        # two that overlap, one of another MLP, one of none, a fill
        *launched("up", at=112, start=140, end=160, correlation=2),
        *launched("down", at=114, start=150, end=170, correlation=3),
        *launched("up", at=155, start=180, end=185, correlation=4),
        *launched("attention", at=170, start=190, end=195, correlation=5),
        *launched("Memset", at=212, start=240, end=243, correlation=6, cat="gpu_memset"),
        event("kernel", "from before", 101, 105, correlation=99),
    ]
    step = breakdown(events, on_gpu=True)
    assert (step.host_us, step.mlp_host_us) == (100, 25)
    assert (step.busy_us, step.mlp_us) == ((30 + 5 + 5 + 3) / 2, (30 + 5 + 3) / 2)
    assert step.us_by_mlp == {"a": 33 / 2, "b": 5 / 2}
    assert step.launches_per_mlp == 4 / 3
    assert step.mlp_kernels == (Kernel("up", 2 / 3, 25 / 3), Kernel("down", 1 / 3, 20 / 3), Kernel("Memset", 1 / 3, 1))
    assert Kernel("attention", 0.5, 2.5) in step.top_kernels
    assert not {"warm", "from before"} & {kernel.name for kernel in step.top_kernels}


def test_breakdown_of_nested_mlps_and_of_a_graph():
    events = [
        event("user_annotation", STEP, 0, 100),
        event("user_annotation", MLP + "moe", 10, 60),
        event("user_annotation", MLP + "moe.shared", 20, 40),
        *launched("gate", at=12, start=110, end=112, correlation=1),
        *launched("shared", at=25, start=112, end=116, correlation=2),
        *launched("experts", at=45, start=116, end=124, correlation=3),
        event("cuda_runtime", "cudaGraphLaunch", 70, 71, correlation=4),
        *(event("kernel", name, start, start + 1, correlation=4) for name, start in (("x", 130), ("y", 131))),
    ]
    step = breakdown(events, on_gpu=True)
    assert step.us_by_mlp == {"moe": 10, "moe.shared": 4}
    assert (step.mlp_host_us, step.mlp_us, step.busy_us) == (50, 14, 16)
    events += [event("user_annotation", MLP + "graphed", 69, 75)]
    assert breakdown(events, on_gpu=True).launches_per_mlp == 4 / 3


def test_breakdown_on_a_cpu():
    """Operators that other operators call are not counted again."""
    events = [
        event("user_annotation", STEP, 0, 100),
        event("user_annotation", MLP + "a", 10, 50),
        event("cpu_op", "aten::linear", 11, 30),
        event("cpu_op", "aten::addmm", 12, 29),
        event("cpu_op", "aten::silu", 30, 40),
        event("cpu_op", "aten::mean", 60, 70),
        event("cpu_op", "aten::mean", 61, 70) | {"tid": 2},
    ]
    step = breakdown(events, on_gpu=False)
    assert (step.mlp_host_us, step.launches_per_mlp) == (40, 2)
    assert [kernel.name for kernel in step.mlp_kernels] == ["aten::linear", "aten::silu"]
    assert step.top_kernels[-1] == Kernel("aten::mean", 1, 10)


def a_step(**us_by_mlp):
    total = sum(us_by_mlp.values())
    return Breakdown(1000.0, 1.0, 400.0, total, us_by_mlp, 5.0, (), ())


def test_prediction(monkeypatch):
    mlps = fuse_model(torch.nn.ModuleDict({name: tiny_model().model.layers[0].mlp for name in "ab"}))
    mlps = dict(mlps.items())
    as_on_gpu(monkeypatch)
    gains = {"a": 2.0, "b": 1.0}
    monkeypatch.setattr(prediction, "_gain_alone", lambda module, m: gains[next(n for n in mlps if mlps[n] is module)])
    step = a_step(a=100.0, b=100.0)
    # 50 of 500 microseconds are saved
    assert predict(mlps, 16, "memory-bound", step, 500.0).gain == pytest.approx(500 / 450)
    assert predict(mlps, 16, "host-bound", step, 500.0).gain == 1
    gains["b"] = None
    unknown = predict(mlps, 16, "memory-bound", step, 500.0)
    assert unknown.gain is None
    assert "b and 16 tokens" in unknown.basis
    # the kernels of `b` run between calls of its projections, for which there are no plans
    mlps["b"].down_proj.register_forward_hook(lambda *_: None)
    partly = predict(mlps, 16, "memory-bound", step, 500.0)
    assert partly.gain is None
    assert "b calls projections: down_proj has hooks" in partly.basis
    for module in mlps.values():
        monkeypatch.setattr(module, "forward", lambda x: x)
    assert "replaced on the instance" in predict(mlps, 16, "memory-bound", step, 500.0).basis


def test_prediction_of_routed_experts(monkeypatch):
    """`tune` compares their plans with one another only, so it is not advised."""
    as_on_gpu(monkeypatch)
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    experts = fuse_model(tiny_model("mixtral", **sizes), strict=True).model.layers[0].mlp.experts
    found = predict({"a": experts}, 16, "memory-bound", a_step(a=100.0), 500.0)
    assert found.gain is None and "no plan says what modules like a gain" in found.basis


def test_prediction_asks_the_plans(plan_cache):
    with pytest.MonkeyPatch.context() as patch:
        as_on_gpu(patch)
        mlp = fuse_model(tiny_model()).model.layers[0].mlp
        assert prediction._gain_alone(mlp, 3) is None
        gpu = GPU.of(torch.device("cpu"))
        key = ProblemKey(4, 64, 176, 64, True, "silu", torch.float32, False, True, gpu)
        plan = Plan(TileConfig("elementwise"), TORCH)
        cache.save([TunedPlan(key, plan, plan_us=2.0, other_us=3.0)], gpu)
        assert prediction._gain_alone(mlp, 3) == 1.5
        assert prediction._gain_alone(mlp, 5) is None
        patch.setattr(heuristics, "gains_nothing_in_eager", lambda *given: given == (key, plan, 2))
        assert prediction._gain_alone(mlp, 3) == 1.0, "because the original forward runs"
        patch.setattr(cache, "unusable", {plan})
        assert prediction._gain_alone(mlp, 3) is None


@pytest.mark.parametrize(
    "value, unit, digits, text",
    [
        (None, "us", 3, "-"),
        ("host-bound", "", 3, "host-bound"),
        (0.3742, "percent", 2, "37 %"),
        (1.0, "percent", 2, "100 %"),
        (0.0042, "percent", 2, "0.42 %"),
        (12350.0, "us", 2, "12 ms"),
        (12350.0, "us", 4, "12.35 ms"),
        (12000.0, "us", 3, "12.0 ms"),
        (999.9, "us", 3, "1,000 us"),
        (2500000.0, "us", 3, "2.50 s"),
        (12350.0, "", 2, "12,000"),
        (5.0, "", 3, "5"),
        (12350, "", 2, "12,350"),
        (1.25, "gain", 3, "1.25x"),
        (0.0318, "dollars", 2, "$0.032"),
        (0.0, "us", 3, "0 us"),
    ],
)
def test_shown(value, unit, digits, text):
    assert shown(value, unit, digits) == text


@pytest.mark.parametrize(
    "shortest, longest, digits", [(90, 120, 2), (98, 104, 3), (99.9, 100.2, 4), (99.99, 100.0, 4), (100, 100, 2)]
)
def test_rounds_agree_on_so_many_digits(shortest, longest, digits):
    assert agreed_digits({"wall_us": 100.0, "wall_min_us": shortest, "wall_max_us": longest}) == digits
