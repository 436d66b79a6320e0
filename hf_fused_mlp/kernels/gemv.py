"""``out = act(x @ gate.T) * (x @ weight.T)`` for one token: dot products on the CUDA cores, at the speed of memory.

Without a gate, ``out = act(x @ weight.T)``. Picked at M = 1, for the up and the down launch, in fp16, bf16 and fp32.
Launches: 1. Bytes: the weights once; `x` from L2. Exact products, fp32 sums. The loop over K is unrolled: many loads
are under way at once, and few registers held. An overlapped launch has its first weights loaded when `x` is ready.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fused_mlp.kernels._common import activate, add_bias, launch
from hf_fused_mlp.types import GPU, LinearKey, TileConfig, next_power_of_two


def supports(key: LinearKey) -> str | None:
    """Why the kernel cannot or should not run `key`, or None."""
    if key.dtype.itemsize > 4:
        return "sums in fp32, which is not enough for fp64"
    return None if key.m == 1 else "each token reads all the weights; for M = 1 only"


def candidates(key: LinearKey) -> list[TileConfig]:
    """What a tuner should try: a whole row at once, or pieces that are unrolled at most 32 times."""
    row = min(next_power_of_two(key.k), 16384)
    tiles = {(1, 1024, 4), (1, 2048, 4), (1, 2048, 8), (1, 4096, 4), (2, 1024, 4), (2, 2048, 8), (1, row, 8)}
    return [
        TileConfig("gemv", block_n=block_n, block_k=block_k, num_warps=num_warps)
        for block_n, block_k, num_warps in sorted(tiles)
        if block_k <= row and 32 * block_k >= key.k
    ]


@triton.jit
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    gate_ptr,
    gate_bias_ptr,
    out_ptr,
    N,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    pid_n = tl.program_id(0).to(tl.int64)
    if OVERLAP:
        gdc_launch_dependents()

    # 64-bit sums stay scalar; what varies inside a block is 32-bit
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    offs_w = tl.arange(0, BLOCK_N)[:, None] * K + offs_k[None, :]
    weight_ptr += pid_n * BLOCK_N * K
    if gate_ptr is not None:
        gate_ptr += pid_n * BLOCK_N * K

    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    acc_gate = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in tl.static_range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        mask = mask_n[:, None] & mask_k[None, :]
        weight = tl.load(weight_ptr + offs_w + k, mask=mask, other=0.0)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + offs_w + k, mask=mask, other=0.0)
        if OVERLAP and k == 0:
            gdc_wait()
        x = tl.load(x_ptr + k + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
        if gate_ptr is not None:
            acc_gate += gate.to(tl.float32) * x
        acc += weight.to(tl.float32) * x

    # [BLOCK_N, 1], so that the bias broadcasts as in the other families
    out = add_bias(tl.sum(acc, 1, keep_dims=True), bias_ptr, offs_n, mask_n, 1)
    if gate_ptr is not None:
        gate = add_bias(tl.sum(acc_gate, 1, keep_dims=True), gate_bias_ptr, offs_n, mask_n, 1)
        out = activate(gate, ACTIVATION, False) * out
    else:
        out = activate(out, ACTIVATION, False)
    tl.store(out_ptr + offs_n[:, None], out.to(out_ptr.dtype.element_ty), mask=mask_n[:, None])


def gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    config: TileConfig,
    overlap: bool = False,
) -> Tensor:
    """The equation above for `x` `[1, K]`, contiguous `weight` and `gate` `[N, K]`, biases `[N]`; gives `[1, N]`."""
    N, K = weight.shape
    gpu = GPU.of(x.device)
    out = torch.empty((1, N), dtype=x.dtype, device=x.device)
    launch(
        _gemv_kernel,
        (x.dtype, x.device, N, K, bias is None, gate is None, gate_bias is None, activation, config),
        (-(-N // config.block_n), 1, 1),
        (x, weight, bias, gate, gate_bias, out, N, K, activation, config.block_n, config.block_k, gpu.can_overlap),
        tensors=(x, weight, bias, gate, gate_bias),
        overlap=overlap,
        num_warps=config.num_warps,
    )
    return out
