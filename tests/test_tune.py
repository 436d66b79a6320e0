"""`fuse_model(model, tune=True)`: what is measured, and when nothing is. The tuner has tests of its own."""

import logging

import pytest
import torch
from models import as_on_gpu, tiny_model

from hf_fused_mlp import fuse_model
from hf_fused_mlp.ops.dispatch import find_plan, problem_key
from hf_fused_mlp.tune import TOKENS, tune_model, unmeasured
from hf_fused_mlp.tuning import cache, tuner
from hf_fused_mlp.tuning.plan_files import TunedPlan
from hf_fused_mlp.types import TORCH, Plan, TileConfig

PLAN = Plan(TileConfig("gemm", 64, 64, 64, num_stages=2), TORCH)


@pytest.fixture
def asked(plan_cache, monkeypatch):
    """The problems that were measured, on a GPU on paper; the one of 512 tokens has no room."""
    as_on_gpu(monkeypatch)
    keys = []

    def tune(key, device, most=None):
        keys.append(key)
        torch.randn(3, device=device)
        if key.m == 512:
            raise torch.OutOfMemoryError("none left")
        return TunedPlan(key, PLAN, 1.0, 2.0)

    monkeypatch.setattr(tuner, "tune", tune)
    return keys


def test_distinct_problems_are_measured_once(asked, caplog):
    model = tiny_model(dtype=torch.float16)
    state = torch.get_rng_state()
    fuse_model(model, tune=True)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are his"
    assert [key.m for key in asked] == list(TOKENS), "two layers, one problem"
    assert [record.getMessage() for record in caplog.records if record.name == "hf_fused_mlp"] == [
        "tune: the GPU has no room to measure 512 tokens of 64 x 176"
    ]
    mlp = model.model.layers[0].mlp
    assert find_plan(problem_key(100, mlp.operands())) == PLAN
    assert [key.m for key in unmeasured(model)] == [512]
    asked.clear()
    fuse_model(tiny_model(dtype=torch.float16), tune=True)
    assert [key.m for key in asked] == [512], "what has a plan is not measured again"


def test_the_flag(asked, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_model(dtype=torch.float16).save_pretrained(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model", use_fused_mlp={"tune": True})
    assert len(asked) == len(TOKENS)
    AutoModelForCausalLM.from_pretrained(tmp_path / "model", use_fused_mlp=True)
    assert len(asked) == len(TOKENS)


def test_nothing_is_measured_without_kernels(plan_cache, monkeypatch, caplog):
    monkeypatch.setattr(tuner, "tune", lambda *_: pytest.fail("measured"))
    fuse_model(tiny_model(), tune=True)
    (record,) = caplog.records
    assert record.getMessage().startswith("tune: nothing is measured where no kernel runs: on cpu, ")


def test_nothing_is_measured_for_other_modules(asked):
    model = fuse_model(tiny_model(dtype=torch.float16), batch_invariant=True, tune=True)
    model = fuse_model(tiny_model(dtype=torch.float16))
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, args, output: None)
    tune_model(model)
    assert asked == [], "batch-invariant, or with a layer that is called"


def test_a_problem_that_cannot_be_measured(asked, monkeypatch, caplog):
    """Whatever the GPU or the compiler raises, the model is fused, and other problems are measured."""

    def fail(key, device, most=None):
        if key.m == 2:
            raise RuntimeError("CUDA error: operation not permitted")
        return TunedPlan(key, PLAN, 1.0, 2.0)

    monkeypatch.setattr(tuner, "tune", fail)
    model = fuse_model(tiny_model(dtype=torch.float16), tune=True)
    assert [key.m for key in unmeasured(model)] == [2]
    assert "tune: 2 tokens of 64 x 176 cannot be measured: CUDA error" in caplog.text
    assert "cannot be kept" not in caplog.text


def test_in_training_mode(asked):
    """Models that are built from a config are; they will be measured for what they do in evaluation mode."""
    model = tiny_model(dtype=torch.float16).train()
    fuse_model(model, tune=True)
    assert len(asked) == len(TOKENS)
    assert all(module.training for module in model.modules())


def test_plans_that_cannot_be_kept(asked, monkeypatch, caplog):
    def refuse(*args):
        raise PermissionError("read-only")

    monkeypatch.setattr(cache, "save", refuse)
    with caplog.at_level(logging.WARNING):
        fuse_model(tiny_model(dtype=torch.float16), tune=True)
    assert asked == []
    assert "tune: plans cannot be kept (read-only); set HF_FUSED_MLP_CACHE" in caplog.text


@pytest.mark.parametrize("option", ["tune", "batch_invariant"])
def test_options_are_true_or_false(option):
    with pytest.raises(TypeError, match=f"{option}=1: expected True or False"):
        fuse_model(tiny_model(), **{option: 1})


@pytest.mark.gpu
@pytest.mark.slow
def test_on_a_gpu(plan_cache):
    model = tiny_model(dtype=torch.bfloat16, hidden_size=256, intermediate_size=512).to("cuda")
    fuse_model(model, strict=True, tune=True)
    assert unmeasured(model) == {}
