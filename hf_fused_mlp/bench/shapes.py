"""MLPs of published models, by name, for the `bench` and `tune` commands."""

import copy
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
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
        # measured in full, with plans that ship
        Shape("llama-3-8b", "llama.LlamaMLP", 4096, 14336, "silu"),
        Shape("llama-3.2-1b", "llama.LlamaMLP", 2048, 8192, "silu"),
        Shape("smollm2-135m", "llama.LlamaMLP", 576, 1536, "silu"),
        Shape("qwen2.5-7b", "qwen2.Qwen2MLP", 3584, 18944, "silu"),
        Shape("gemma-2-9b", "gemma2.Gemma2MLP", 3584, 14336, "gelu_pytorch_tanh"),
        Shape("phi-3-mini", "phi3.Phi3MLP", 3072, 8192, "silu"),
        Shape("llama-3-70b", "llama.LlamaMLP", 8192, 28672, "silu"),
        Shape("pythia-6.9b", "gpt_neox.GPTNeoXMLP", 4096, 16384, "gelu"),
        Shape("gpt-neox-20b", "gpt_neox.GPTNeoXMLP", 6144, 24576, "gelu"),
        # for `--by-rule`
        Shape("smollm2-360m", "llama.LlamaMLP", 960, 2560, "silu"),
        Shape("tinyllama-1.1b", "llama.LlamaMLP", 2048, 5632, "silu"),
        Shape("smollm3-3b", "llama.LlamaMLP", 2048, 11008, "silu"),
        Shape("llama-3.2-3b", "llama.LlamaMLP", 3072, 8192, "silu"),
        Shape("llama-2-7b", "llama.LlamaMLP", 4096, 11008, "silu"),
        Shape("llama-2-13b", "llama.LlamaMLP", 5120, 13824, "silu"),
        Shape("yi-34b", "llama.LlamaMLP", 7168, 20480, "silu"),
        Shape("falcon3-7b", "llama.LlamaMLP", 3072, 23040, "silu"),
        Shape("mistral-nemo-12b", "mistral.MistralMLP", 5120, 14336, "silu"),
        Shape("mistral-small-24b", "mistral.MistralMLP", 5120, 32768, "silu"),
        Shape("qwen2.5-0.5b", "qwen2.Qwen2MLP", 896, 4864, "silu"),
        Shape("qwen2.5-1.5b", "qwen2.Qwen2MLP", 1536, 8960, "silu"),
        Shape("qwen2.5-32b", "qwen2.Qwen2MLP", 5120, 27648, "silu"),
        Shape("qwen3-0.6b", "qwen3.Qwen3MLP", 1024, 3072, "silu"),
        Shape("qwen3-1.7b", "qwen3.Qwen3MLP", 2048, 6144, "silu"),
        Shape("qwen3-4b", "qwen3.Qwen3MLP", 2560, 9728, "silu"),
        Shape("qwen3-8b", "qwen3.Qwen3MLP", 4096, 12288, "silu"),
        Shape("qwen3-14b", "qwen3.Qwen3MLP", 5120, 17408, "silu"),
        Shape("qwen3-32b", "qwen3.Qwen3MLP", 5120, 25600, "silu"),
        Shape("granite-3-8b", "granite.GraniteMLP", 4096, 12800, "silu"),
        Shape("stablelm-3b", "stablelm.StableLmMLP", 2560, 6912, "silu"),
        Shape("gemma-2b", "gemma.GemmaMLP", 2048, 16384, "gelu_pytorch_tanh"),
        Shape("gemma-2-2b", "gemma2.Gemma2MLP", 2304, 9216, "gelu_pytorch_tanh"),
        Shape("gemma-2-27b", "gemma2.Gemma2MLP", 4608, 36864, "gelu_pytorch_tanh"),
        Shape("gemma-3-1b", "gemma3.Gemma3MLP", 1152, 6912, "gelu_pytorch_tanh"),
        Shape("gemma-3-4b", "gemma3.Gemma3MLP", 2560, 10240, "gelu_pytorch_tanh"),
        Shape("gemma-3-12b", "gemma3.Gemma3MLP", 3840, 15360, "gelu_pytorch_tanh"),
        Shape("gemma-3-27b", "gemma3.Gemma3MLP", 5376, 21504, "gelu_pytorch_tanh"),
        Shape("phi-4", "phi3.Phi3MLP", 5120, 17920, "silu"),
        Shape("glm-4-9b", "glm.GlmMLP", 4096, 13696, "silu"),
        Shape("unaligned", "llama.LlamaMLP", 1000, 2730, "silu"),
        Shape("pythia-160m", "gpt_neox.GPTNeoXMLP", 768, 3072, "gelu"),
        Shape("pythia-410m", "gpt_neox.GPTNeoXMLP", 1024, 4096, "gelu"),
        Shape("pythia-1.4b", "gpt_neox.GPTNeoXMLP", 2048, 8192, "gelu"),
        Shape("pythia-2.8b", "gpt_neox.GPTNeoXMLP", 2560, 10240, "gelu"),
        Shape("pythia-12b", "gpt_neox.GPTNeoXMLP", 5120, 20480, "gelu"),
        Shape("phi-2", "phi.PhiMLP", 2560, 10240, "gelu_new"),
        Shape("gpt2", "gpt2.GPT2MLP", 768, 3072, "gelu_new"),
        Shape("gpt2-xl", "gpt2.GPT2MLP", 1600, 6400, "gelu_new"),
        Shape("starcoder2-3b", "starcoder2.Starcoder2MLP", 3072, 12288, "gelu_pytorch_tanh"),
        Shape("starcoder2-7b", "starcoder2.Starcoder2MLP", 4608, 18432, "gelu_pytorch_tanh"),
        Shape("minitron-4b", "nemotron.NemotronMLP", 3072, 9216, "relu2"),
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
        activation_function=shape.activation,
        num_attention_heads=1,  # which must divide the hidden size
        num_key_value_heads=1,
    )
    mlp_class = getattr(import_module(f"transformers.models.{model_type}.modeling_{model_type}"), class_name)
    with torch.device(device):
        is_gpt2 = "intermediate_size" in signature(mlp_class).parameters
        mlp = (mlp_class(shape.intermediate, config) if is_gpt2 else mlp_class(config)).to(dtype).eval()
    for layer in mlp.children():
        for parameter in layer.parameters():
            fan_in = getattr(layer, "nx", parameter.shape[-1])  # `Conv1D` stores `[in, out]`
            nn.init.normal_(parameter, std=2 * fan_in**-0.5)
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


def fused_twin(original: nn.Module, strict: bool = True, **options: Any) -> Any:
    """Returns a copy of `original`, fused with `options`, that shares its parameters and buffers.

    Packing moves them for both.

    Raises:
        ValueError: `strict`, and a module cannot be fused.
    """
    shared = {id(tensor): tensor for tensor in (*original.parameters(), *original.buffers())}
    return fuse_model(copy.deepcopy(original, shared), strict=strict, **options)
