"""DeepSpeed on two CPU processes: what ZeRO trains is what a fused model computes with, whenever it was fused."""

import os

import pytest
import torch
import torch.distributed as dist
from models import tiny_model, token_ids
from test_distributed import run
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from hf_fused_mlp import fuse_model, fusion_report, unfuse_model
from hf_fused_mlp.families.mlp.fused import FusedMLP

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it once, at its import
deepspeed = pytest.importorskip("deepspeed")

from deepspeed.utils import safe_get_full_fp32_param  # noqa: E402
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # noqa: E402

STEPS = 5
FP32_GRADIENTS = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
CONFIGS = {
    # bf16 weights are views of one flat buffer, which the optimizer writes
    "zero-1, fp32 gradients": FP32_GRADIENTS | {"zero_optimization": {"stage": 1}},
    "zero-1": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
    "zero-2": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
    # every weight is a shard, and empty outside of the calls that use it
    "zero-3": {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0},
    },
}
# when a model is fused, and what happens to it before it is trained
HISTORIES = {
    "fused before": (fuse_model, lambda model: None),
    "fused after": (lambda model: None, fuse_model),
    "fused before, moved after": (fuse_model, lambda model: model.to("cpu")),
    "fused after, moved": (lambda model: None, lambda model: fuse_model(model).to("cpu")),
    "fused before, fused again after": (fuse_model, fuse_model),
    "fused before, unfused after": (fuse_model, unfuse_model),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_training(config, tmp_path):
    (tmp_path / "config").write_text(config)
    run(training, "cpu", str(tmp_path))


def training(where, directory):
    """Losses, weights and the consolidated checkpoint of every history are those of a model that was never fused."""
    config = CONFIGS[(directory / "config").read_text()]
    for bias in (False, True) if config["zero_optimization"]["stage"] < 3 else (True,):
        expected = train(config, bias, directory / f"{bias}-plain")
        for number, (history, (before, after)) in enumerate(HISTORIES.items()):
            actual = train(config, bias, directory / f"{bias}-{number}", before, after)
            for name, values in expected.items():
                message = f"{history}, bias={bias}: {name}"
                torch.testing.assert_close(actual[name], values, atol=2e-2, rtol=2e-2, msg=message)


def train(config, bias, directory, before=lambda model: None, after=lambda model: None):
    """The losses, the trained weights by name, and the logits that the model gives at last."""
    model, ids = tiny_model(mlp_bias=bias), token_ids(2, 9)
    initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    before(model)
    # in the order of the model, up follows gate in a flat buffer; in another, or with biases, it does not
    decayed = [parameter for name, parameter in model.named_parameters() if parameter.dim() > 1]
    others = [parameter for name, parameter in model.named_parameters() if parameter.dim() == 1]
    groups = [{"params": decayed[::-1] if bias else decayed, "weight_decay": 0.1}, {"params": others}]
    engine = initialize(model, torch.optim.AdamW(groups, lr=1e-2), config)
    after(model)
    losses = [step(engine, ids) for _ in range(STEPS)]

    weights = masters(model)
    for name, weight in weights.items():
        assert (weight - initial[name]).abs().mean() > 1e-3, f"{name} was not trained"
    engine.eval()  # gives nothing back
    with torch.no_grad():
        logits = engine(ids).logits.float()
    engine.train()
    engine.save_checkpoint(directory)
    if type(engine.optimizer).__name__ != "BF16_Optimizer":  # whose checkpoints DeepSpeed does not consolidate
        saved = get_fp32_state_dict_from_zero_checkpoint(directory)
        assert weights.keys() <= saved.keys()
        for name, weight in weights.items():
            assert torch.equal(saved[name], weight), name

    unfuse_model(model)
    assert not any(isinstance(module, FusedMLP) for module in model.modules())
    losses.append(step(engine, ids))  # which shows that the weights are still those that are trained
    masters(model)
    dist.barrier()
    return {"losses": torch.tensor(losses), "logits": logits} | weights


def initialize(model, optimizer, config):
    # the compiler would take a minute over what two processes of one machine may use in place of gloo
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = config | {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def step(engine, ids):
    loss = engine(ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    return loss.item()


def masters(model):
    """The optimizer's fp32 weights by name; what the model holds is the same, rounded."""
    weights = {}
    for name, parameter in model.named_parameters():
        weights[name] = safe_get_full_fp32_param(parameter).detach().clone()
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            assert torch.equal(parameter, weights[name].to(parameter.dtype)), f"{name} is not what was trained"
    return weights


def assert_answered(model):
    """Every MLP is skipped for a reason, or fused for all that is said of it."""
    mlps = fusion_report(model).mlps
    assert len(mlps) == 2
    assert all(mlp.state == "fused" or (mlp.state == "skipped" and mlp.reason) for mlp in mlps), mlps


def test_loading_in_parts(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    run(loading_in_parts, "cpu", str(tmp_path))


def loading_in_parts(where, directory):
    """Under ZeRO-3 `from_pretrained` partitions what it loads: the flag is answered by reasons, and training works."""
    config = CONFIGS["zero-3"] | {"train_micro_batch_size_per_gpu": 2}
    ids, losses = token_ids(2, 9), []
    hf_config = HfDeepSpeedConfig(config)  # in force as long as it is referenced
    for use_fused_mlp in (False, True):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, use_fused_mlp=use_fused_mlp)
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        assert_answered(model)
        engine = initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-2), config)
        fuse_model(model)
        assert_answered(model)
        losses.append([step(engine, ids) for _ in range(STEPS)])
        masters(model)
        unfuse_model(model)
        assert all(parameter.numel() == 0 for parameter in model.parameters())
    del hf_config
    torch.testing.assert_close(*map(torch.tensor, losses), atol=2e-2, rtol=2e-2)
