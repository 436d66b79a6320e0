"""``out = act(x @ gate.T) * (x @ weight.T)`` for FP8 weights, which one kernel dequantizes for PyTorch's GEMMs.

Without a gate, ``out = act(x @ weight.T)``. Picked for many tokens where the library has no block-scaled GEMM for the
GPU or the shape, and in fp32. Nothing is kept: memory is needed for one weight as floats at a time.
Launches: 1 for each weight and 1 for the product, besides the GEMMs. Bytes: the weights once in FP8, and written and
read as floats.
"""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.kernels._fp8 import from_fp8, load_scale, scale_for_kernels, weight_reader, why_not_fp8
from hf_fused_mlp.kernels._launch import Linear, allocator, launcher
from hf_fused_mlp.kernels.elementwise import Rows, act_mul
from hf_fused_mlp.types import SCALE_BLOCK, LinearCall, LinearKey, TileConfig, scale_blocks

BLOCK_N = 32  # rows in a program, a divisor of `SCALE_BLOCK`


def supports(key: LinearKey) -> str | None:
    """Why the kernel cannot or should not run `key`, or None."""
    if key.dtype.itemsize > 4:
        return "computes in fp32, which is not enough for fp64"
    return why_not_fp8(key.storage)


def candidates(key: LinearKey) -> list[TileConfig]:
    """There is nothing to choose; for few tokens the other kernels are far faster."""
    return [TileConfig("fp8_dequantized")] if key.m >= 64 or key.dtype.itemsize > 2 else []


@triton.jit
def _dequantize_kernel(weight_ptr, scale_ptr, out_ptr, N, K, SCALE_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """``out = weight * scale``, `[N, K]`: some rows of one block of scales."""
    pid_k, n = tl.program_id(0), tl.program_id(1).to(tl.int64) * BLOCK_N
    offs_n, offs_k = n + tl.arange(0, BLOCK_N), pid_k * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    offs = offs_n[:, None] * K + offs_k[None, :]
    weight = from_fp8(tl.load(weight_ptr + offs, mask=mask, other=0.0), tl.float32)
    out = weight * load_scale(scale_ptr + n // SCALE_BLOCK * tl.cdiv(K, SCALE_BLOCK) + pid_k, True)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def fp8_dequantized(call: LinearCall, config: TileConfig) -> Linear:
    """The launches of the equation above; nothing of `config` is read."""
    N, K = call.n, call.k
    empty = allocator((N, K), call.dtype, call.device)
    readable = weight_reader(call.device)

    def dequantizer():
        grid = scale_blocks(K), -(-N // BLOCK_N), 1
        return launcher(_dequantize_kernel, call.device, grid, (N, K, SCALE_BLOCK, BLOCK_N), num_warps=4)

    # one for each weight: a launcher takes all addresses to be aligned as the first
    dequantize, dequantize_gate = dequantizer(), dequantizer()
    multiply = act_mul(Rows(call.m, N, (N, N), call.dtype, call.device), call.activation)
    activate = ACTIVATIONS[call.activation].function

    def product(x, matrix, launch) -> Tensor:
        weight, scale, bias = matrix
        floats = empty()
        launch((readable(weight), scale_for_kernels(scale), floats))
        return F.linear(x, floats, bias)

    def run(x, weight, gate):
        if gate[0] is None:
            return activate(product(x, weight, dequantize))
        gate = product(x, gate, dequantize_gate)
        return multiply(gate, product(x, weight, dequantize), gate)

    return run
