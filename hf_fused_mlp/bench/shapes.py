"""MLPs of published models, by name, for the `bench` and `tune` commands."""

import copy
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING

from hf_fused_mlp.fuse import fuse_model
from hf_fused_mlp.reference import quantize_weight_ref
from hf_fused_mlp.types import SCALE_BLOCK


@dataclass(frozen=True)
class Shape:
    """One MLP of a published model.

    `mlp_class` is `model_type.ClassName` in Transformers, `activation` the name that a config uses.
    """

    name: str
    mlp_class: str
    hidden: int
    intermediate: int
    activation: str


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3-8b", "llama.LlamaMLP", 4096, 14336, "silu"),
        Shape("llama-3.2-1b", "llama.LlamaMLP", 2048, 8192, "silu"),
        Shape("smollm2-135m", "llama.LlamaMLP", 576, 1536, "silu"),
        Shape("qwen2.5-7b", "qwen2.Qwen2MLP", 3584, 18944, "silu"),
        Shape("gemma-2-9b", "gemma2.Gemma2MLP", 3584, 14336, "gelu_pytorch_tanh"),
        Shape("phi-3-mini", "phi3.Phi3MLP", 3072, 8192, "silu"),
        Shape("llama-3-70b", "llama.LlamaMLP", 8192, 28672, "silu"),
        Shape("pythia-6.9b", "gpt_neox.GPTNeoXMLP", 4096, 16384, "gelu"),
        Shape("gpt-neox-20b", "gpt_neox.GPTNeoXMLP", 6144, 24576, "gelu"),
    )
}


def build(shape: Shape, dtype: torch.dtype, device: str = "cuda") -> nn.Module:
    """Builds the Transformers module of `shape` in eval mode, with random weights over `sqrt(fan_in) / 2`."""
    model_type, class_name = shape.mlp_class.split(".")
    config_class: Any = CONFIG_MAPPING[model_type]
    config = config_class(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        hidden_act=shape.activation,
        hidden_activation=shape.activation,
    )
    mlp_class = getattr(import_module(f"transformers.models.{model_type}.modeling_{model_type}"), class_name)
    with torch.device(device):
        mlp = mlp_class(config).to(dtype).eval()
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    return mlp


def to_fp8(module: nn.Module) -> nn.Module:
    """Replaces every `nn.Linear` in `module` by an `FP8Linear` of Transformers with the same weights, quantized."""
    from transformers.integrations.finegrained_fp8 import FP8Linear  # imports torchao where that is installed

    for path, linear in list(module.named_modules()):
        if type(linear) is nn.Linear:
            has_bias = linear.bias is not None
            fp8: Any = FP8Linear(
                linear.in_features, linear.out_features, (SCALE_BLOCK, SCALE_BLOCK), has_bias=has_bias
            )
            data, scale = quantize_weight_ref(linear.weight.detach())
            fp8.weight, fp8.weight_scale_inv = (nn.Parameter(t, requires_grad=False) for t in (data, scale))
            fp8.bias = linear.bias
            module.set_submodule(path, fp8.train(linear.training))
    return module


def fused_twin(original: nn.Module, strict: bool = True, norms: bool = False) -> Any:
    """Returns a fused copy of `original` that shares its parameters and buffers; packing moves them for both.

    Raises:
        ValueError: `strict`, and a module cannot be fused.
    """
    shared = {id(tensor): tensor for tensor in (*original.parameters(), *original.buffers())}
    return fuse_model(copy.deepcopy(original, shared), strict=strict, norms=norms)
