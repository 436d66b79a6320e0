"""Routed experts for few tokens: a program for each row of each pair of token and expert, nothing sorted.

``h[pair] = act(x[token] @ gate[e].T) * (x[token] @ up[e].T)``, then ``out[token]`` is the sum over its experts of
``weight * (h[pair] @ down[e].T)``, in a fixed order. Dot products on the CUDA cores, at memory speed; picked up to
about 32 pairs, and for shapes that no tensor descriptor has, at any number. Any layout; fp16, bf16 and fp32, with fp32
sums. Weights in FP8 are converted in registers, and tokens are not quantized, which is more accurate.
Launches: 2. Bytes: the weights of each pair's expert once.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fused_mlp.kernels._fp8 import from_fp8, load_scale, scale_for_kernels
from hf_fused_mlp.kernels._launch import allocator, launcher
from hf_fused_mlp.kernels.experts._common import combine, reader
from hf_fused_mlp.types import GPU, SCALE_BLOCK, ExpertsCall, TileConfig, next_power_of_two, scale_blocks


@triton.jit
def _sums_of_products(
    x_ptr,
    w_ptr,
    scale_ptr,
    first,
    offs_n,
    mask_n,
    stride_n,
    stride_k,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
):
    """The products of rows of a weight with x, `[BLOCK_N]`; `first` is the weight's first row in the scales."""
    if scale_ptr is None:
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for k in tl.static_range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
            mask = mask_n[:, None] & (offs_k < K)[None, :]
            w = tl.load(w_ptr + offs_n[:, None] * stride_n + offs_k[None, :] * stride_k, mask=mask, other=0.0)
            acc += w.to(tl.float32) * x[None, :]
        return tl.sum(acc, 1)
    else:
        NUM_SCALES: tl.constexpr = (K + SCALE_BLOCK - 1) // SCALE_BLOCK  # of a row
        SCALES: tl.constexpr = BLOCK_K // SCALE_BLOCK  # of a row in a block: a dimension, so each is loaded once
        scaled = tl.zeros((BLOCK_N, SCALES, SCALE_BLOCK), tl.float32)
        for k in tl.static_range(0, K, BLOCK_K):
            offs_s = k // SCALE_BLOCK + tl.arange(0, SCALES)
            offs_k = offs_s[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :]
            x = tl.load(x_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
            mask = mask_n[:, None, None] & (offs_k < K)[None, :, :]
            w = tl.load(w_ptr + offs_n[:, None, None] * stride_n + offs_k[None, :, :], mask=mask, other=0.0)
            place = ((first + offs_n) // SCALE_BLOCK * NUM_SCALES)[:, None] + offs_s[None, :]
            scale = load_scale(scale_ptr + place, mask_n[:, None] & (offs_s < NUM_SCALES)[None, :])
            scaled += from_fp8(w, tl.float32) * (x[None, :, :] * scale[:, :, None])
        return tl.sum(tl.sum(scaled, 2), 1)


@triton.jit
def _up_kernel(
    x_ptr,
    ids_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    h_ptr,
    num_experts,
    N,
    stride_xm,
    stride_e,
    stride_p,
    stride_n,
    stride_k,
    scale_e,
    bias_e,
    bias_p,
    bias_n,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`h_ptr` is `[pairs, N]`; gate, if there is one, is the first plane of a weight, up the last."""
    num_n = tl.cdiv(N, BLOCK_N)
    pair = (tl.program_id(0) // num_n).to(tl.int64)
    if OVERLAP:
        gdc_launch_dependents()
    e = tl.load(ids_ptr + pair).to(tl.int64)
    if (e >= 0) & (e < num_experts):
        offs_n = (tl.program_id(0) % num_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        x_ptr += (pair // TOP_K) * stride_xm
        w_ptr += e * stride_e
        row = 0
        if scale_ptr is not None:
            scale_ptr += e * scale_e
        if GATED:
            first = _sums_of_products(
                x_ptr, w_ptr, scale_ptr, row, offs_n, mask_n, stride_n, stride_k, K, BLOCK_N, BLOCK_K, SCALE_BLOCK
            )
            w_ptr += stride_p
            row += N
        out = _sums_of_products(
            x_ptr, w_ptr, scale_ptr, row, offs_n, mask_n, stride_n, stride_k, K, BLOCK_N, BLOCK_K, SCALE_BLOCK
        )
        if not GATED:
            first = out
        if bias_ptr is not None:
            place = bias_ptr + e * bias_e + offs_n * bias_n
            if GATED:
                first += tl.load(place, mask=mask_n, other=0.0).to(tl.float32)
                place += bias_p
            out += tl.load(place, mask=mask_n, other=0.0).to(tl.float32)
        out = combine(first, out, GATED, ACTIVATION, LIMIT, UP_OFFSET, False)
        tl.store(h_ptr + pair * N + offs_n, out.to(h_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _down_kernel(
    h_ptr,
    ids_ptr,
    weights_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    num_experts,
    N,
    stride_e,
    stride_n,
    stride_k,
    scale_e,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`out_ptr` is `[tokens, N]`. All pairs of a token, `PAIRS` with padding, are in one block: weights that depend on
    one another for nothing are loaded at once, and the first of them before h is ready."""
    num_n = tl.cdiv(N, BLOCK_N)
    token = (tl.program_id(0) // num_n).to(tl.int64)
    offs_n = (tl.program_id(0) % num_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_j = tl.arange(0, PAIRS)
    pairs = token * TOP_K + offs_j
    e = tl.load(ids_ptr + pairs, mask=offs_j < TOP_K, other=-1).to(tl.int64)
    known = (e >= 0) & (e < num_experts)
    e = tl.where(known, e, 0)
    scale = tl.load(weights_ptr + pairs, mask=known, other=0.0).to(tl.float32)
    rows = (e * stride_e)[:, None] + (offs_n * stride_n)[None, :]
    mask = known[:, None] & mask_n[None, :]
    if scale_ptr is None:
        acc = tl.zeros((PAIRS, BLOCK_N, BLOCK_K), tl.float32)
        for k in tl.static_range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < K
            w = tl.load(
                w_ptr + rows[:, :, None] + (offs_k * stride_k)[None, None, :],
                mask=mask[:, :, None] & mask_k[None, None, :],
                other=0.0,
            )
            if OVERLAP and k == 0:
                gdc_wait()
            h = tl.load(h_ptr + pairs[:, None] * K + offs_k[None, :], mask=known[:, None] & mask_k[None, :], other=0.0)
            acc += w.to(tl.float32) * (h.to(tl.float32) * scale[:, None])[:, None, :]
        out = tl.sum(tl.sum(acc, 2), 0)
    else:
        NUM_SCALES: tl.constexpr = (K + SCALE_BLOCK - 1) // SCALE_BLOCK
        SCALES: tl.constexpr = BLOCK_K // SCALE_BLOCK
        scales = (e * scale_e)[:, None] + (offs_n // SCALE_BLOCK * NUM_SCALES)[None, :]
        scaled = tl.zeros((PAIRS, BLOCK_N, SCALES, SCALE_BLOCK), tl.float32)
        for k in tl.static_range(0, K, BLOCK_K):
            offs_s = k // SCALE_BLOCK + tl.arange(0, SCALES)
            offs_k = offs_s[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :]
            mask_k = offs_k < K
            w = tl.load(
                w_ptr + rows[:, :, None, None] + offs_k[None, None, :, :],
                mask=mask[:, :, None, None] & mask_k[None, None, :, :],
                other=0.0,
            )
            of_w = load_scale(
                scale_ptr + scales[:, :, None] + offs_s[None, None, :],
                mask[:, :, None] & (offs_s < NUM_SCALES)[None, None, :],
            )
            if OVERLAP and k == 0:
                gdc_wait()
            h = tl.load(
                h_ptr + pairs[:, None, None] * K + offs_k[None, :, :],
                mask=known[:, None, None] & mask_k[None, :, :],
                other=0.0,
            )
            factor = (of_w * scale[:, None, None])[:, :, :, None]
            scaled += from_fp8(w, tl.float32) * (h.to(tl.float32)[:, None, :, :] * factor)
        out = tl.sum(tl.sum(tl.sum(scaled, 3), 2), 0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + e[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
        out += tl.sum(scale[:, None] * bias.to(tl.float32), 0)
    tl.store(out_ptr + token * N + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask_n)


def programs_of_a_token(call: ExpertsCall, up: TileConfig, down: TileConfig) -> int:
    """The number of programs per token of the larger of the two launches."""
    return max(call.top_k * -(-call.intermediate // up.block_n), -(-call.hidden // down.block_n))


def pairs(call: ExpertsCall, up: TileConfig, down: TileConfig):
    """The two launches: a function of x, ids, weights, up, down, biases and scales that gives `[tokens, hidden]`."""
    if call.storage == "fp8" and (up.block_k % SCALE_BLOCK or down.block_k % SCALE_BLOCK):
        raise ValueError(f"{up}, {down}: whole blocks of scales along K are read at once")
    form, H, I, m, k = call.form, call.hidden, call.intermediate, call.tokens, call.top_k
    width = (2 if form.gated else 1) * I
    expert, plane, column = call.bias_strides
    if form.layout == "planes":
        strides, down_strides = (width * H, I * H, H, 1), (H * I, I, 1)
    else:
        strides, down_strides = (width * H, plane, column, width), (H * I, 1, H)
    empty_h = allocator((m * k, I), call.dtype, call.device)
    empty = allocator((m, H), call.dtype, call.device)
    can_overlap = GPU.of(call.device).can_overlap
    readable = reader(call)
    gate = form.gated, form.activation, form.limit, form.up_offset
    launch_up = launcher(
        _up_kernel,
        call.device,
        (m * k * -(-I // up.block_n), 1, 1),
        (
            call.experts,
            I,
            call.stride_xm,
            *strides,
            scale_blocks(width) * scale_blocks(H),
            expert,
            plane,
            column,
            H,
            k,
            *gate,
            up.block_n,
            up.block_k,
            SCALE_BLOCK,
            can_overlap,
        ),
        num_warps=up.num_warps,
    )
    launch_down = launcher(
        _down_kernel,
        call.device,
        (m * -(-H // down.block_n), 1, 1),
        (
            *(call.experts, H, *down_strides, scale_blocks(H) * scale_blocks(I), I, k, next_power_of_two(k)),
            *(down.block_n, down.block_k, SCALE_BLOCK, can_overlap),
        ),
        overlap=can_overlap,
        num_warps=down.num_warps,
    )

    def run(x, ids, weights, up, down, up_bias, down_bias, up_scale=None, down_scale=None):
        h = empty_h()
        launch_up((x, ids, readable(up), scale_for_kernels(up_scale), up_bias, h))
        out = empty()
        launch_down((h, ids, weights, readable(down), scale_for_kernels(down_scale), down_bias, out))
        return out

    return run
