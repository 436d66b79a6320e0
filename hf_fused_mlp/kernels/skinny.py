"""``out = act(x @ gate.T) * (x @ weight.T)`` for a few tokens, on the tensor cores, with the weights as left operand.

Without a gate, ``out = act(x @ weight.T)``. Picked for the up launch of 2 to 128 tokens, 64 without a gate. The long
side of the product is the weights', so they fill the instruction's 64 rows, and the tokens, padded to 16, its columns.
Launches: 1. Bytes: the weights once for every `block_m` tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fused_mlp.kernels._common import activate, add_bias, launch
from hf_fused_mlp.types import LinearKey, TileConfig

CANDIDATES = tuple(
    TileConfig("skinny", block_m=block_m, block_n=block_n, block_k=block_k, num_warps=4, num_stages=num_stages)
    for block_m in (16, 32, 64, 128)
    for block_n, block_k, num_stages in ((64, 128, 3), (64, 128, 4), (64, 64, 4), (64, 64, 6), (128, 64, 4))
)


def supports(key: LinearKey) -> str | None:
    """Why the kernel cannot or should not run `key`, or None."""
    if key.dtype.itemsize > 4:
        return "sums in fp32, which is not enough for fp64"
    return None if 2 <= key.m <= 128 else "made for M of 2 to 128"


@triton.jit(do_not_specialize=["M"])
def _skinny_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    gate_ptr,
    gate_bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_n, pid_m = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)

    # 64-bit sums stay scalar; what varies inside a block is 32-bit
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n, mask_m = offs_n < N, offs_m < M
    offs_w = tl.arange(0, BLOCK_N)[:, None] * K + offs_k[None, :]
    offs_x = tl.arange(0, BLOCK_M)[None, :] * stride_xm + offs_k[:, None]
    x_ptr += pid_m * BLOCK_M * stride_xm
    weight_ptr += pid_n * BLOCK_N * K
    if gate_ptr is not None:
        gate_ptr += pid_n * BLOCK_N * K

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc_gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        mask_w = mask_n[:, None] & mask_k[None, :]
        x = tl.load(x_ptr + offs_x + k, mask=mask_k[:, None] & mask_m[None, :], other=0.0)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + offs_w + k, mask=mask_w, other=0.0)
            acc_gate = tl.dot(gate, x, acc_gate, input_precision="ieee")
        weight = tl.load(weight_ptr + offs_w + k, mask=mask_w, other=0.0)
        acc = tl.dot(weight, x, acc, input_precision="ieee")

    out = add_bias(acc, bias_ptr, offs_n, mask_n, 1)
    if gate_ptr is not None:
        out = activate(add_bias(acc_gate, gate_bias_ptr, offs_n, mask_n, 1), ACTIVATION) * out
    else:
        out = activate(out, ACTIVATION)
    offs_out = offs_m[None, :] * N + offs_n[:, None]
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_m[None, :])


def skinny(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    config: TileConfig,
) -> Tensor:
    """The equation above for `x` `[M, K]`, contiguous `weight` and `gate` `[N, K]`, biases `[N]`; gives `[M, N]`."""
    M, N, K = x.shape[0], weight.shape[0], x.shape[1]
    if config.block_m * x.stride(0) >= 2**31:  # a tile's offsets are 32-bit
        x = x.contiguous()
    stride_xm = x.stride(0) if M > 1 else K  # of one row, the stride may be anything
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    tile = config.block_m, config.block_n, config.block_k
    launch(
        _skinny_kernel,
        (x.dtype, x.device, N, K, stride_xm, bias is None, gate is None, gate_bias is None, activation, config),
        (-(-N // config.block_n), -(-M // config.block_m), 1),
        (x, weight, bias, gate, gate_bias, out, M, N, K, stride_xm, activation, *tile),
        tensors=(x, weight, bias, gate, gate_bias),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
