"""``out = act(x @ gate.T) * (x @ weight.T)`` for one token and FP8 weights: dot products on the CUDA cores.

Without a gate, ``out = act(x @ weight.T)``. Picked at M = 1, for the up and the down launch. The token is not
quantized, which is more accurate. A program multiplies a few rows of each weight. They all have the same scales, so
the token is multiplied by the scales.
Launches: 1. Bytes: the weights once, half of what they are in 16 bits; x from L2. Exact products but for the scales,
fp32 sums.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fused_mlp.kernels._common import activate, add_bias
from hf_fused_mlp.kernels._fp8 import from_fp8, load_scale, scale_for_kernels, weight_reader, why_not_fp8
from hf_fused_mlp.kernels._launch import Linear, allocator, launcher
from hf_fused_mlp.types import GPU, SCALE_BLOCK, LinearCall, LinearKey, TileConfig, next_power_of_two

MOST_STEPS = 64  # of the unrolled loop


def supports(key: LinearKey) -> str | None:
    """Why the kernel cannot or should not run `key`, or None."""
    if key.dtype == torch.float64:
        return "sums in fp32, which is not enough for fp64"
    return why_not_fp8(key.storage) or (None if key.m == 1 else "made for M = 1")


def candidates(key: LinearKey) -> list[TileConfig]:
    """Configurations for the tuner: one to four rows at once, and the length of the pieces of a row."""
    row = max(SCALE_BLOCK, min(next_power_of_two(key.k), 8192))
    pieces = {min(row, block_k) for block_k in (1024, 2048, 4096, 8192)}
    return [
        TileConfig("fp8_gemv", block_n=block_n, block_k=block_k, num_warps=num_warps)
        for block_n in (1, 2, 4)
        for block_k in sorted(pieces)
        for num_warps in (4, 8)
        if block_n * block_k <= 8192 and 32 * block_k >= key.k
    ]


@triton.jit
def _fp8_gemv_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    gate_ptr,
    gate_scale_ptr,
    gate_bias_ptr,
    out_ptr,
    N,
    K: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`BLOCK_N` divides `SCALE_BLOCK`, and `SCALE_BLOCK` divides `BLOCK_K`."""
    NUM_SCALES: tl.constexpr = (K + SCALE_BLOCK - 1) // SCALE_BLOCK  # of a row
    SCALES: tl.constexpr = BLOCK_K // SCALE_BLOCK  # of a row in a tile
    n = tl.program_id(0).to(tl.int64) * BLOCK_N
    if OVERLAP:
        gdc_launch_dependents()

    offs_n = n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_s = tl.arange(0, SCALES)
    offs_k = offs_s[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :]
    offs_w = tl.arange(0, BLOCK_N)[:, None, None] * K + offs_k[None, :, :]
    weight_ptr += n * K
    scale_ptr += n // SCALE_BLOCK * NUM_SCALES
    if gate_ptr is not None:
        gate_ptr += n * K
        gate_scale_ptr += n // SCALE_BLOCK * NUM_SCALES

    acc = tl.zeros((BLOCK_N, SCALES, SCALE_BLOCK), tl.float32)
    acc_gate = tl.zeros((BLOCK_N, SCALES, SCALE_BLOCK), tl.float32)
    for k in tl.static_range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        mask_w = mask_n[:, None, None] & mask_k[None, :, :]
        offs_scale = k // SCALE_BLOCK + offs_s
        mask_s = offs_scale < NUM_SCALES
        weight = tl.load(weight_ptr + offs_w + k, mask=mask_w, other=0.0)
        scale = load_scale(scale_ptr + offs_scale, mask_s)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + offs_w + k, mask=mask_w, other=0.0)
            gate_scale = load_scale(gate_scale_ptr + offs_scale, mask_s)
        if OVERLAP and k == 0:
            gdc_wait()
        x = tl.load(x_ptr + offs_k + k, mask=mask_k, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            acc_gate += from_fp8(gate, tl.float32) * (x * gate_scale[:, None])[None, :, :]
        acc += from_fp8(weight, tl.float32) * (x * scale[:, None])[None, :, :]

    out = add_bias(tl.sum(tl.sum(acc, 2), 1)[None, :], bias_ptr, offs_n, mask_n, 0)
    if gate_ptr is not None:
        gate = add_bias(tl.sum(tl.sum(acc_gate, 2), 1)[None, :], gate_bias_ptr, offs_n, mask_n, 0)
        out = activate(gate, ACTIVATION, False) * out
    else:
        out = activate(out, ACTIVATION, False)
    tl.store(out_ptr + offs_n[None, :], out.to(out_ptr.dtype.element_ty), mask=mask_n[None, :])


def fp8_gemv(call: LinearCall, config: TileConfig) -> Linear:
    """The launch of the equation above."""
    if SCALE_BLOCK % config.block_n or config.block_k % SCALE_BLOCK:
        raise ValueError(f"{config}: rows of one block of scales and whole blocks along K are read at once")
    empty = allocator((*call.lead, call.n), call.dtype, call.device)
    readable = weight_reader(call.device)
    tile = config.block_n, config.block_k
    launch = launcher(
        _fp8_gemv_kernel,
        call.device,
        (-(-call.n // config.block_n), 1, 1),
        (call.n, call.k, SCALE_BLOCK, call.activation, *tile, GPU.of(call.device).can_overlap),
        overlap=call.overlap,
        num_warps=config.num_warps,
    )

    def run(x, weight, gate):
        (weight, scale, bias), (gate, gate_scale, gate_bias) = weight, gate
        scales = scale_for_kernels(scale), scale_for_kernels(gate_scale)
        out = empty()
        launch((x, readable(weight), scales[0], bias, readable(gate), scales[1], gate_bias, out))
        return out

    return run
