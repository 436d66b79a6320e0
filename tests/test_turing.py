"""A T4: fp16 alone, by the kernels that multiply no tiles. None was at hand; `test_compile_targets` compiles them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import tiny_model
from numerics import assert_accurate, mlp_cuda, oracle_of, random_mlp

from hf_fused_mlp import fuse, fuse_model, fusion_report, modes
from hf_fused_mlp.kernels import _common
from hf_fused_mlp.ops import dispatch
from hf_fused_mlp.reference import experts_ref, mlp_ref
from hf_fused_mlp.tune import tune_model
from hf_fused_mlp.tuning import tuner
from hf_fused_mlp.tuning.heuristics import heuristic_plan
from hf_fused_mlp.types import GPU, TORCH, ExpertsForm, ExpertsOperands, ProblemKey

TUNE = "tune: nothing is measured where no kernel runs"
T4 = GPU("Tesla T4", 40, (7, 5), 65536)


def problem(m, **changes):
    key = ProblemKey(m, 2048, 8192, 2048, True, "silu", torch.float16, False, True, T4)
    return replace(key, **changes)


@pytest.mark.parametrize(
    "m, changes, up, down",
    [
        (1, {}, "gemv", "gemv"),
        (2, {"gated": False}, "gemv", "gemv"),
        (3, {}, "wide", "torch"),
        (4096, {}, "elementwise", "torch"),
        (16, {"one_block": False}, "elementwise", "torch"),
        (16, {"gated": False}, "torch", "torch"),
        (1, {"gated": False, "storage": "transposed"}, "torch", "torch"),
        (1, {"gated": False, "storage": "transposed", "activation": "relu", "bias": True}, "epilogue", "torch"),
        (3, {"gated": False, "activation": "gelu_tanh", "bias": True}, "epilogue", "torch"),
        (16, {"gated": False, "storage": "transposed"}, "torch", "torch"),
        (1, {"dtype": torch.bfloat16}, "torch", "torch"),
        (1, {"dtype": torch.float32}, "torch", "torch"),
        (1, {"storage": "fp8"}, "torch", "torch"),
    ],
)
def test_the_rule(m, changes, up, down):
    plan = heuristic_plan(problem(m, **changes))
    assert (plan.up.kernel, plan.down.kernel) == (up, down)


def test_a_tuner_tries_no_tiles():
    tried = {config.kernel for m in (1, 2, 64, 4096) for config in tuner.candidates(problem(m).up)}
    assert tried == {"torch", "gemv", "wide", "elementwise"}


@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_runs(m, gated, device, monkeypatch):
    """That path, interpreted; on a GPU it is compiled for that."""
    monkeypatch.setattr(GPU, "of", lambda device: T4)
    if device.type == "cpu":  # which has none of NVIDIA's functions
        monkeypatch.setattr(_common, "libdevice", SimpleNamespace(fast_dividef=lambda a, b: a / b))
    operands = random_mlp(72, 104, gated, True, torch.float16, device)
    x = torch.randn(m, 72, generator=torch.Generator().manual_seed(2)).to(device, torch.float16)
    out = mlp_cuda(x, *operands, "gelu")
    plan = dispatch.find_plan(dispatch.problem_key(m, dispatch.MLPOperands.of(*operands, "gelu")))
    assert (plan.up == TORCH) == (m == 5 and not gated)
    assert_accurate(out, mlp_ref(x, *operands, "gelu"), oracle_of(x, operands, "gelu"))


def test_compiled_experts(monkeypatch):
    """Code that is being compiled does not ask for the capability; the operator does."""
    monkeypatch.setattr(GPU, "of", lambda device: T4)
    monkeypatch.setattr(dispatch, "prepare_experts", lambda *_: pytest.fail("a kernel would run"))
    form = ExpertsForm("planes", True, "silu")
    x, weights, ids = torch.randn(3, 32).half(), torch.rand(3, 2), torch.tensor([[0, 3], [1, 2], [3, 1]])
    operands = ExpertsOperands(torch.randn(4, 96, 32).half(), torch.randn(4, 32, 48).half(), None, None, form)
    assert torch.equal(dispatch.experts_cuda(x, ids, weights, operands), experts_ref(x, ids, weights, *operands))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_report(dtype, monkeypatch, caplog):
    no_kernels = modes.no_kernels_on
    monkeypatch.setattr(modes, "no_kernels", lambda device, *args, **options: no_kernels(T4, *args, **options))
    (reason,) = {status.reason for status in fusion_report(fuse_model(tiny_model(dtype=dtype))).mlps}
    assert reason == (None if dtype == torch.float16 else "no kernels for torch.bfloat16 on Tesla T4; load as float16")
    monkeypatch.setattr(fuse, "no_kernels", modes.no_kernels)
    fuse._warn_of_no_kernels.cache_clear()
    model = fuse_model(tiny_model(dtype=dtype), strict=True)
    if reason is not None:
        tune_model(model)
    warnings = [] if reason is None else [f"strict: fused, but no kernel runs: {reason}", f"{TUNE}: {reason}"]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == warnings
    assert no_kernels(T4, least=modes.COMPLETE).startswith("no kernels for Tesla T4; they need CUDA")
    assert no_kernels(replace(T4, capability=(7, 0))).endswith("compute capability 7.5 or later")
