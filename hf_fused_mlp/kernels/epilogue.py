"""``out = act(x @ weight.T + bias)`` by one GEMM of PyTorch's, which adds the bias and activates in its epilogue.

Picked for plain MLPs with biases and tanh GELU or ReLU, in 16 bits, whichever way their weights are stored, unless a
kernel for few tokens reads them faster. It takes as long as the GEMM alone, and eager's activation is saved.
Launches: 1. Bytes: x, weights and bias read, out written.
Source: PyTorch's `torch._addmm_activation`, which is cuBLASLt's epilogue, or without it a GEMM and the activation.
"""

import torch

from hf_fused_mlp.kernels._launch import Linear
from hf_fused_mlp.types import LinearCall, LinearKey, TileConfig

ACTIVATIONS = "gelu_tanh", "relu"


def supports(key: LinearKey) -> str | None:
    """Why the kernel cannot or should not run `key`, or None."""
    if key.storage == "fp8":
        return "made for weights that PyTorch's GEMMs take, not for those with scales"
    if key.dtype not in (torch.float16, torch.bfloat16):
        return f"made for fp16 and bf16, not {key.dtype}"
    if key.gated or key.activation not in ACTIVATIONS:
        return f"the library's GEMM ends with {' or '.join(ACTIVATIONS)}, not with a gate or {key.activation!r}"
    if not key.bias:
        return "made for MLPs with biases"
    return None if hasattr(torch, "_addmm_activation") else "this version of PyTorch has no such GEMM"


def candidates(key: LinearKey) -> list[TileConfig]:
    """There is nothing to choose."""
    return [TileConfig("epilogue")]


def epilogue(call: LinearCall, config: TileConfig) -> Linear:
    """The GEMM of the equation above; nothing of `config` is read. Without a bias, it adds zeros."""
    sizes, rows, is_gelu = (*call.lead, call.n), (call.m, call.k), call.activation == "gelu_tanh"
    is_flat = len(call.lead) == 1

    def run(x, weight, gate):
        weight, _, bias = weight
        if bias is None:
            bias = x.new_zeros(call.n)
        out = torch._addmm_activation(bias, x if is_flat else x.view(rows), weight.t(), use_gelu=is_gelu)
        return out if is_flat else out.view(sizes)

    return run
