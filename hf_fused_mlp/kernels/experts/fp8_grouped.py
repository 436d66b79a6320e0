"""Routed experts in FP8 for more tokens: as `grouped`, with weights that have a scale for each block of 128 x 128.

A step along K is one block of scales, whose product is multiplied by the scale before it is added. Gate and up of an
expert have an accumulator each, so that scales are numbers. The plan chooses the format of the tokens, for up and for
down: see `ACTIVATIONS`. A launch before quantizes the tokens, and for many tokens also gathers the rows. The up launch
quantizes its output where it is computed.
Launches: 4 or 5, and one more if tokens are quantized or gathered. Bytes: the weights of the experts that are hit,
once for each tile.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fused_mlp.kernels._common import grouped_tile
from hf_fused_mlp.kernels._fp8 import LARGEST, from_fp8, load_scale, scale_for_kernels, scaled_to, scales_to
from hf_fused_mlp.kernels._launch import Tiling, allocator, launcher
from hf_fused_mlp.kernels.experts import routing
from hf_fused_mlp.kernels.experts._common import combine, reader
from hf_fused_mlp.kernels.experts.grouped import programs_a_multiprocessor
from hf_fused_mlp.types import (
    FP8,
    GPU,
    SCALE_BLOCK,
    ExpertsCall,
    ExpertsPlan,
    TileConfig,
    next_power_of_two,
    scale_blocks,
)

# by the name of a kernel, what its left or right operand becomes, with a scale for each 1 x 128 elements, and the
# number that the largest of them becomes; the weights are converted to that dtype, or that of x
ACTIVATIONS: dict[str, tuple[torch.dtype, float] | None] = {
    "w8a16": None,  # as it is: accurate; two or three instructions for a weight in bf16
    "w8a16_scaled": (torch.float16, 1024.0),  # accurate; half an instruction for a weight
    "w8a8": (FP8, LARGEST),  # as Transformers quantizes it; no conversions, and twice the arithmetic
}
BLOCKS = 8  # of scales in a program of the kernel that quantizes


@triton.jit
def _quantize_kernel(
    x_ptr,
    positions_ptr,
    out_ptr,
    scale_ptr,
    K,
    scale_rows,
    stride_xm,
    TOP_K: tl.constexpr,
    LARGEST: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``out[token] * scale = x[token]``, or with positions the same in the rows of each of a token's pairs.

    `out_ptr` is `[rows, K]`, `scale_ptr` `[ceil(K / SCALE_BLOCK), scale_rows]`.
    """
    token = tl.program_id(0).to(tl.int64)
    offs_s = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    offs_k = offs_s[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :]
    mask_s, mask_k = offs_s * SCALE_BLOCK < K, offs_k < K
    x = tl.load(x_ptr + token * stride_xm + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    x, scale = scaled_to(x, LARGEST)
    x = x.to(out_ptr.dtype.element_ty)
    scale_ptr += offs_s.to(tl.int64) * scale_rows
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    if positions_ptr is None:
        tl.store(out_ptr + token * K + offs_k, x, mask=mask_k)
        tl.store(scale_ptr + token, scale, mask=mask_s)
    else:
        for j in tl.static_range(TOP_K):
            row = tl.load(positions_ptr + token * TOP_K + j).to(tl.int64)
            tl.store(out_ptr + row * K + offs_k, x, mask=mask_k & (row >= 0))
            tl.store(scale_ptr + row, scale, mask=mask_s & (row >= 0))


@triton.jit
def _scaled_product(w, w_scale, x, x_scale, LEFT: tl.constexpr, PRECISION: tl.constexpr):
    """``w @ x`` if LEFT, else ``x @ w.T``, times the scale of the weights and, unless None, those of the tokens."""
    if w.dtype != x.dtype:
        w = from_fp8(w, x.dtype)
    product = tl.dot(w, x, input_precision=PRECISION) if LEFT else tl.dot(x, w.T, input_precision=PRECISION)
    if x_scale is None:
        return product * w_scale
    else:
        return product * tl.expand_dims(x_scale * w_scale, 0 if LEFT else 1)


@triton.jit
def _fp8_grouped_kernel(
    w_desc,
    x_desc,
    x_ptr,
    x_scale_ptr,
    w_scale_ptr,
    sorted_ptr,
    tiles_ptr,
    weights_ptr,
    out_ptr,
    out_scale_ptr,
    N,
    K,
    x_rows,
    out_rows,
    stride_xm,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    LARGEST: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    SHORT: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Up: ``out[row]`` for sorted rows. Down, where there are routing weights: ``out[pair] = weight * ...``.

    Rows come from `x_desc` in sorted order, or without it from `x_ptr` by token. Their scales, if there are any, are
    `[ceil(K / BLOCK_K), x_rows]`, and those of the output, if it is quantized, `[N / BLOCK_N, out_rows]`: room for a
    tile's rows from any row on. `BLOCK_K` is a block of scales, of whose rows `BLOCK_N` is a divisor.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    PLANES: tl.constexpr = 2 if GATED else 1
    AXIS: tl.constexpr = 1 if LEFT else 0  # of the tokens
    num_tiles = tl.load(tiles_ptr)
    num_n = tl.cdiv(N, BLOCK_N)
    num_k = tl.cdiv(K, BLOCK_K)
    # flattened, the loop of a gated tile would spill registers
    for t in tl.range(tl.program_id(0), num_tiles * num_n, NUM_PROGRAMS, flatten=not (LEFT or GATED)):
        if LEFT:
            tile, pid_n = t // num_n, t % num_n
        else:
            tile, pid_n = grouped_tile(t, num_tiles, num_n, GROUP_M)
        entry = tiles_ptr + 4 * (tile + 1)
        e, first, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        n = pid_n * BLOCK_N
        rows = first + tl.arange(0, BLOCK_M)
        mask_m = rows < end
        x_place, factor = rows, None
        if x_desc is None:
            x_place = tl.load(sorted_ptr + rows, mask=mask_m, other=0) // TOP_K
        if weights_ptr is not None:  # loaded before the product, which hides that it takes two loads in a row
            rows = tl.load(sorted_ptr + rows, mask=mask_m, other=0)  # where out is written: from here on, pairs
            factor = tl.load(weights_ptr + rows, mask=mask_m, other=0.0).to(tl.float32)
        w_place = w_scale_ptr + (e.to(tl.int64) * tl.cdiv(PLANES * N, BLOCK_K) + n // BLOCK_K) * num_k
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32) if LEFT else tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc_gate = acc
        for step in range(0, num_k):
            k = step * BLOCK_K
            x_scale = None
            if x_scale_ptr is not None:
                x_scale = tl.load(x_scale_ptr + step * x_rows + x_place)
            scale = load_scale(w_place + step + (PLANES - 1) * (N // BLOCK_K) * num_k, True)
            if x_desc is not None:
                x = x_desc.load([first, k])
                if LEFT:
                    x = x.T
            else:
                offs_k = k + tl.arange(0, BLOCK_K)
                x = tl.load(
                    x_ptr + x_place.to(tl.int64)[None, :] * stride_xm + offs_k[:, None],
                    mask=mask_m[None, :] & (offs_k < K)[:, None],
                    other=0.0,
                )
            if GATED:
                gate_scale = load_scale(w_place + step, True)
                gate = tl.reshape(w_desc.load([2 * e, n, k]), (BLOCK_N, BLOCK_K))
                acc_gate += _scaled_product(gate, gate_scale, x, x_scale, LEFT, PRECISION)
            w = tl.reshape(w_desc.load([PLANES * e + PLANES - 1, n, k]), (BLOCK_N, BLOCK_K))
            acc += _scaled_product(w, scale, x, x_scale, LEFT, PRECISION)

        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        out = combine(acc_gate, acc, GATED, ACTIVATION, LIMIT, UP_OFFSET, SHORT)
        if out_scale_ptr is not None:
            out_scale = scales_to(out, 1 - AXIS, LARGEST)
            out *= tl.expand_dims(1.0 / out_scale, 1 - AXIS)
            tl.store(out_scale_ptr + pid_n * out_rows + rows, out_scale, mask=mask_m)
        if factor is not None:
            out *= tl.expand_dims(factor, 1 - AXIS)
        offs = tl.expand_dims(rows.to(tl.int64) * N, 1 - AXIS) + tl.expand_dims(offs_n, AXIS)
        mask = tl.expand_dims(mask_m, 1 - AXIS) & tl.expand_dims(mask_n, AXIS)
        tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def rule_of_thumb(call: ExpertsCall) -> ExpertsPlan:
    """A plan for shapes that none was measured for, and too many pairs to leave them unsorted."""
    gpu = GPU.of(call.device)
    rows = call.pairs / call.experts  # of one expert, on average
    if call.dtype == torch.float32:
        return plan_of(call, 16, "w8a16", (32, 4, 2), (32, 4, 2))
    if gpu.capability < (8, 9):
        # TODO: measure on a GPU without FP8; wider tiles spill registers there, where bytes are decoded by integers
        tile = (64, 8, 3) if rows <= 8 else (32, 8, 3)
        return plan_of(call, 16 if rows <= 8 else 32 if rows < 24 else 64, "w8a16", tile, tile)
    if rows < 24:
        return plan_of(call, 16 if rows <= 8 else 32, "w8a8", (128, 4, 3), (128, 4, 3))
    # taller tiles spill registers: they hold an accumulator each of gate and up, and a product
    up = (128, 8, 3) if rows < 128 else (128, 4, 2)
    return plan_of(call, 64, "w8a8", up, (128, 4, 3), order="gathered")


def plan_of(
    call: ExpertsCall, rows: int, kernel: str, *tiles: tuple[int, int, int], order: str | None = None
) -> ExpertsPlan:
    """Tiles of (block_n, num_warps, num_stages), with as many stages as the GPU has shared memory for.

    Without an `order`, up to 64 rows are sorted, and more are gathered.
    """
    shared = GPU.of(call.device).shared_memory
    quantized = ACTIVATIONS[kernel]
    of_x = (call.dtype if quantized is None else quantized[0]).itemsize
    planes = (2 if call.form.gated else 1), 1
    configs = [
        TileConfig(
            kernel,
            block_n=block_n,
            block_k=SCALE_BLOCK,
            num_warps=num_warps,
            num_stages=max(1, min(num_stages, shared // ((plane * block_n + rows * of_x) * SCALE_BLOCK))),
            group_m=4,
        )
        for plane, (block_n, num_warps, num_stages) in zip(planes, tiles, strict=True)
    ]
    return ExpertsPlan(order or ("sorted" if rows <= 64 else "gathered"), rows, *configs)


def unsupported(plan: ExpertsPlan) -> str | None:
    """Why the tiles of `plan` cannot be read with their scales, or None if they can."""
    for tile in (plan.up, plan.down):
        if tile.block_k != SCALE_BLOCK or SCALE_BLOCK % tile.block_n:
            return f"{tile}: a step is one block of scales, and the rows of a tile must share their scales"
    if ACTIVATIONS[plan.down.kernel] is not None and plan.up.block_n != SCALE_BLOCK:
        return f"{plan.up}: what down reads with scales is quantized in whole blocks"
    return None


def fp8_grouped(call: ExpertsCall, plan: ExpertsPlan):
    """All launches: a function of x, ids, weights, up, down, no biases and scales that gives `[tokens, hidden]`.

    Orders, and which launches overlap, are those of `grouped`.
    """
    form, H, I = call.form, call.hidden, call.intermediate
    rows, up, down = plan.rows, plan.up, plan.down
    gpu = GPU.of(call.device)
    left = plan.order == "sorted"
    quantized, h_quantized = ACTIVATIONS[up.kernel], ACTIVATIONS[down.kernel]
    if reason := unsupported(plan):
        raise ValueError(reason)
    padded = (call.pairs // rows + 2) * rows  # of scales of sorted rows: the last tile's are read in whole
    overlap = gpu.can_overlap and left
    sort, add = routing.sort(call, rows, positions=not left, overlap=overlap), routing.add(call, overlap)
    readable = reader(call)
    prepare = None
    if quantized is not None:
        prepare = _quantize(call, call.tokens if left else padded, not left, *quantized)
    elif not left:
        gather = routing.gather(call)
        prepare = lambda x, positions: (gather(x, positions), None)  # noqa: E731
    empty_h = allocator((call.pairs, I), call.dtype if h_quantized is None else h_quantized[0], call.device)
    empty_scale = None
    if h_quantized is not None:
        empty_scale = allocator((scale_blocks(I), padded), torch.float32, call.device)
    empty_y = allocator((call.pairs, H), call.dtype, call.device)

    def launch(gated: bool, gate: tuple, n: int, k: int, tile: TileConfig, x_rows: int, stride: int, tiling: Any):
        planes, programs = 2 if gated else 1, gpu.num_sms * programs_a_multiprocessor(tile)
        w_tiling: Tiling = [planes * call.experts, n, k], [n * k, k, 1], [1, tile.block_n, tile.block_k]
        return launcher(
            _fp8_grouped_kernel,
            call.device,
            (programs, 1, 1),
            (
                *(n, k, x_rows, padded, stride, call.top_k, gated, *gate),
                *(1.0 if h_quantized is None else h_quantized[1], left),
                *(rows, tile.block_n, tile.block_k, tile.group_m),
                "ieee" if call.dtype == torch.float32 else "tf32",
                *(gpu.is_nvidia and call.dtype != torch.float32, programs, overlap),
            ),
            (w_tiling, tiling),
            overlap=overlap,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    gate = form.activation, form.limit, form.up_offset
    x_tiling: Tiling | None = None if left else ([call.pairs, H], [H, 1], [rows, up.block_k])
    x_rows, stride = (call.tokens if left else padded), (call.stride_xm if quantized is None else H)
    launch_up = launch(form.gated, gate, I, H, up, x_rows, stride, x_tiling)
    h_tiling = [call.pairs, I], [I, 1], [rows, down.block_k]
    launch_down = launch(False, ("identity", 0.0, 0.0), H, I, down, padded, I, h_tiling)

    def run(x, ids, weights, up, down, up_bias, down_bias, up_scale, down_scale):
        in_order, positions, table = sort(ids)
        up_scale, down_scale = scale_for_kernels(up_scale), scale_for_kernels(down_scale)
        x_scale = None
        if prepare is not None:
            x, x_scale = prepare(x, positions)
        h, h_scale = empty_h(), None if empty_scale is None else empty_scale()
        by_token, by_row = (x, None) if left else (None, x)
        launch_up((by_token, x_scale, up_scale, in_order, table, None, h, h_scale), (readable(up), by_row))
        y = empty_y()
        launch_down((None, h_scale, down_scale, in_order, table, weights, y, None), (readable(down), h))
        return add(y, ids)

    return run


def _quantize(call: ExpertsCall, columns: int, gathers: bool, dtype: torch.dtype, largest: float) -> Callable:
    """One launch: a function of x and the positions of pairs that gives `[rows, hidden]` in `dtype` and scales.

    Rows are tokens, or if it `gathers` pairs, sorted; scales are `[ceil(hidden / SCALE_BLOCK), columns]`.
    """
    rows, num_blocks = call.pairs if gathers else call.tokens, scale_blocks(call.hidden)
    empty = allocator((rows, call.hidden), dtype, call.device)
    empty_scale = allocator((num_blocks, columns), torch.float32, call.device)
    some = min(BLOCKS, next_power_of_two(num_blocks))
    overlap = GPU.of(call.device).can_overlap and not gathers
    values = call.hidden, columns, call.stride_xm, call.top_k, largest, SCALE_BLOCK, some, overlap
    grid = call.tokens, -(-num_blocks // some), 1
    launch = launcher(_quantize_kernel, call.device, grid, values, overlap=overlap, num_warps=4)

    def run(x, positions):
        data, scale = empty(), empty_scale()
        launch((x, positions, data, scale))
        return data, scale

    return run
