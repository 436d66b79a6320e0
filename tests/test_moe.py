"""Mixtures of experts: dense layers and shared experts fuse like any MLP, and routed experts of a known class too."""

import pytest
import torch
from models import as_on_gpu, token_ids
from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig, Qwen2MoeConfig

from hf_fused_mlp import fuse_model, fusion_report

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=2),
    "qwen2_moe": Qwen2MoeConfig(**SIZES, num_experts=4, shared_expert_intermediate_size=24),
    "deepseek_v3": DeepseekV3Config(
        **SIZES, n_routed_experts=4, first_k_dense_replace=1, n_group=1, topk_group=1, num_experts_per_tok=2
    ),
}
DENSE = {
    "mixtral": [],
    "qwen2_moe": ["model.layers.0.mlp.shared_expert", "model.layers.1.mlp.shared_expert"],
    "deepseek_v3": ["model.layers.0.mlp", "model.layers.1.mlp.shared_experts"],
}
ROUTED = {name: [f"model.layers.{i}.mlp.experts" for i in (0, 1)] for name in DENSE}
ROUTED["deepseek_v3"] = ["model.layers.1.mlp.experts"]


@pytest.mark.parametrize("model_type", CONFIGS)
@torch.no_grad()
def test_shared_and_routed_experts(model_type, monkeypatch):
    as_on_gpu(monkeypatch)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[model_type]).eval()
    expected = model(token_ids(1, 5)).logits
    report = fusion_report(fuse_model(model, strict=True))
    assert [mlp.name for mlp in report.mlps] == DENSE[model_type]
    assert [experts.name for experts in report.experts] == ROUTED[model_type]
    assert not report.select("skipped")
    torch.testing.assert_close(model(token_ids(1, 5)).logits, expected)


def test_stacks_of_an_unknown_class_are_named():
    """Nothing is known about what its forward does."""

    class OtherExperts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.zeros(4, 6, 8))

    (status,) = fusion_report(torch.nn.ModuleDict({"experts": OtherExperts()})).mlps
    assert status.reason.startswith("routed experts, whose weights are one tensor")


@pytest.mark.parametrize("weights", [torch.nn.Conv1d(4, 8, 3), torch.nn.ParameterList([torch.zeros(1, 1, 8)])])
def test_convolutions_and_vectors_are_no_experts(weights):
    (status,) = fusion_report(torch.nn.ModuleDict({"mlp": torch.nn.ModuleList([weights])})).mlps
    assert "has a forward that is not recognised" in status.reason
