"""Routed experts for more tokens: one persistent GEMM over all experts for up, and one for down.

A tile is some rows of one expert's pairs, in sorted order, times some rows of its weights. Up to 64 rows the weights
are the left operand, whose 64 rows the tensor cores want, and tokens are gathered by pointers; beyond, the sorted
rows were gathered before and come through tensor descriptors. As for dense MLPs, gate and up of an expert are a block
with one accumulator. Down's outputs are multiplied by their routing weights and stored by pair; a last launch adds
them. Picked from about 32 pairs on; fp16 and bf16, and fp32 with exact products.
Launches: 5, or 6 with the rows gathered before. Bytes: the weights of the experts that are hit, once for each tile.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fused_mlp.kernels._common import grouped_tile
from hf_fused_mlp.kernels._launch import Tiling, allocator, launcher
from hf_fused_mlp.kernels.experts import routing
from hf_fused_mlp.kernels.experts._common import combine
from hf_fused_mlp.types import GPU, ExpertsCall, ExpertsPlan, TileConfig


@triton.jit
def _weight_tile(
    w_desc, e, n, k, GATED: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """`ROWS` rows of the weights of expert `e` as `[ROWS, BLOCK_K]`, with a gate half of them of each plane."""
    if LAYOUT == "planes":
        if GATED:
            return tl.reshape(w_desc.load([2 * e, n, k]), (ROWS, BLOCK_K))
        else:
            return tl.reshape(w_desc.load([e, n, k]), (ROWS, BLOCK_K))
    elif LAYOUT == "interleaved" and GATED:
        return tl.reshape(w_desc.load([e, k, 2 * n]), (BLOCK_K, ROWS)).T
    elif GATED:
        return tl.reshape(w_desc.load([e, k, 0, n]), (BLOCK_K, ROWS)).T
    else:
        return tl.reshape(w_desc.load([e, k, n]), (BLOCK_K, ROWS)).T


@triton.jit
def _halves(acc, LAYOUT: tl.constexpr, LEFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Gate and up of an accumulator over both planes."""
    if LEFT:
        if LAYOUT == "interleaved":
            return tl.split(tl.permute(tl.reshape(acc, (BLOCK_N, 2, BLOCK_M)), (0, 2, 1)))
        else:
            return tl.split(tl.permute(tl.reshape(acc, (2, BLOCK_N, BLOCK_M)), (1, 2, 0)))
    else:
        if LAYOUT == "interleaved":
            return tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))
        else:
            return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))


@triton.jit
def _finish(
    gate,
    up,
    e,
    rows,
    mask_m,
    scale,
    n,
    bias_ptr,
    out_ptr,
    N,
    bias_e,
    bias_p,
    bias_n,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    LEFT: tl.constexpr,
    SHORT: tl.constexpr,
):
    """From sums of products to results in memory: bias, activation, the routing weight in `scale` if there is one."""
    AXIS: tl.constexpr = 1 if LEFT else 0
    offs_n = n + tl.arange(0, up.shape[1 - AXIS])
    mask_n = offs_n < N
    if bias_ptr is not None:
        place = bias_ptr + e.to(tl.int64) * bias_e + offs_n * bias_n
        if GATED:
            gate += tl.expand_dims(tl.load(place, mask=mask_n, other=0.0).to(tl.float32), AXIS)
            place += bias_p
        up += tl.expand_dims(tl.load(place, mask=mask_n, other=0.0).to(tl.float32), AXIS)
    out = combine(gate, up, GATED, ACTIVATION, LIMIT, UP_OFFSET, SHORT)
    if scale is not None:
        out *= tl.expand_dims(scale, 1 - AXIS)
    offs = tl.expand_dims(rows.to(tl.int64) * N, 1 - AXIS) + tl.expand_dims(offs_n, AXIS)
    mask = tl.expand_dims(mask_m, 1 - AXIS) & tl.expand_dims(mask_n, AXIS)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grouped_kernel(
    w_desc,
    x_desc,
    x_ptr,
    sorted_ptr,
    tiles_ptr,
    bias_ptr,
    weights_ptr,
    out_ptr,
    N,
    K,
    stride_xm,
    bias_e,
    bias_p,
    bias_n,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
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

    Rows come from `x_desc` in sorted order, or without it from `x_ptr` by token. LEFT says that the weights are the
    left operand of the product. Without a gate, tokens on the left, a tile is stored in two halves, which need half of
    the shared memory.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    ROWS: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    num_tiles = tl.load(tiles_ptr)
    num_n = tl.cdiv(N, BLOCK_N)
    for t in tl.range(tl.program_id(0), num_tiles * num_n, NUM_PROGRAMS, flatten=not LEFT):
        if LEFT:
            tile, pid_n = t // num_n, t % num_n
        else:
            tile, pid_n = grouped_tile(t, num_tiles, num_n, GROUP_M)
        entry = tiles_ptr + 4 * (tile + 1)
        e, first, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        n = pid_n * BLOCK_N
        rows = first + tl.arange(0, BLOCK_M)
        mask_m = rows < end
        scale = None
        if x_desc is None:
            token = (tl.load(sorted_ptr + rows, mask=mask_m, other=0) // TOP_K).to(tl.int64)
        if weights_ptr is not None:  # loaded before the product, which hides that it takes two loads in a row
            rows = tl.load(sorted_ptr + rows, mask=mask_m, other=0)  # where out is written: from here on, pairs
            scale = tl.load(weights_ptr + rows, mask=mask_m, other=0.0).to(tl.float32)
        acc = tl.zeros((ROWS, BLOCK_M), tl.float32) if LEFT else tl.zeros((BLOCK_M, ROWS), tl.float32)
        for k in range(0, K, BLOCK_K):
            w = _weight_tile(w_desc, e, n, k, GATED, LAYOUT, ROWS, BLOCK_K)
            if x_desc is not None:
                x = x_desc.load([first, k])
                if LEFT:
                    x = x.T
            else:
                offs_k = k + tl.arange(0, BLOCK_K)
                x = tl.load(
                    x_ptr + token[None, :] * stride_xm + offs_k[:, None],
                    mask=mask_m[None, :] & (offs_k < K)[:, None],
                    other=0.0,
                )
            if LEFT:
                acc = tl.dot(w, x, acc, input_precision=PRECISION)
            else:
                acc = tl.dot(x, w.T, acc, input_precision=PRECISION)

        if GATED or LEFT:
            if GATED:
                gate, up = _halves(acc, LAYOUT, LEFT, BLOCK_M, BLOCK_N)
            else:
                gate, up = acc, acc
            _finish(
                gate, up, e, rows, mask_m, scale, n, bias_ptr, out_ptr, N, bias_e, bias_p, bias_n,
                GATED, ACTIVATION, LIMIT, UP_OFFSET, LEFT, SHORT,
            )  # fmt: skip
        else:
            HALF: tl.constexpr = BLOCK_N // 2
            one, two = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
            _finish(
                one, one, e, rows, mask_m, scale, n, bias_ptr, out_ptr, N, bias_e, bias_p, bias_n,
                GATED, ACTIVATION, LIMIT, UP_OFFSET, LEFT, SHORT,
            )  # fmt: skip
            _finish(
                two, two, e, rows, mask_m, scale, n + HALF, bias_ptr, out_ptr, N, bias_e, bias_p, bias_n,
                GATED, ACTIVATION, LIMIT, UP_OFFSET, LEFT, SHORT,
            )  # fmt: skip


def _weight_tiling(call: ExpertsCall, gated: bool, n: int, k: int, tile: TileConfig) -> Tiling:
    """Of a stack of weights, each `[n, k]` or two of them as the layout says."""
    planes, layout, block_n, block_k = 2 if gated else 1, call.form.layout, tile.block_n, tile.block_k
    if layout == "planes":
        return [planes * call.experts, n, k], [n * k, k, 1], [planes, block_n, block_k]
    if gated and layout == "transposed":
        return [call.experts, k, 2, n], [2 * n * k, 2 * n, n, 1], [1, block_k, 2, block_n]
    return [call.experts, k, planes * n], [planes * n * k, planes * n, 1], [1, block_k, planes * block_n]


def grouped(call: ExpertsCall, plan: ExpertsPlan):
    """All launches: a function of x, ids, weights, up, down and their biases that gives `[tokens, hidden]`.

    The order `"sorted"` has the weights on the left and finds tokens by pointers; `"gathered"`, the reverse, wants at
    least 64 rows a tile. Sorted, launches overlap, and each waits for the one before, which had waited for its own;
    gathered, calls are long, and took 1 to 16 % longer with it on an H100 (docs/notes-kernels.md).
    """
    form, H, I, rows = call.form, call.hidden, call.intermediate, plan.rows
    gpu = GPU.of(call.device)
    left = plan.order == "sorted"
    precision = "ieee" if call.dtype == torch.float32 else "tf32"
    overlap = gpu.can_overlap and left
    sort, add = routing.sort(call, rows, positions=not left, overlap=overlap), routing.add(call, overlap)
    gather = None if left else routing.gather(call)
    empty_h = allocator((call.pairs, I), call.dtype, call.device)
    empty_y = allocator((call.pairs, H), call.dtype, call.device)

    def launch(gated, gate, n, k, tile, x_tiling, bias):
        programs = gpu.num_sms * programs_a_multiprocessor(tile)
        blocks = (
            rows,
            tile.block_n,
            tile.block_k,
            tile.group_m,
            precision,
            gpu.is_nvidia and call.dtype != torch.float32,
            programs,
            overlap,
        )
        return launcher(
            _grouped_kernel,
            call.device,
            (programs, 1, 1),
            (n, k, call.stride_xm, *bias, call.top_k, gated, form.layout, *gate, left, *blocks),
            (_weight_tiling(call, gated, n, k, tile), x_tiling),
            overlap=overlap,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    gate = form.activation, form.limit, form.up_offset
    x_tiling = None if left else ([call.pairs, H], [H, 1], [rows, plan.up.block_k])
    launch_up = launch(form.gated, gate, I, H, plan.up, x_tiling, call.bias_strides)
    h_tiling = [call.pairs, I], [I, 1], [rows, plan.down.block_k]
    launch_down = launch(False, ("identity", 0.0, 0.0), H, I, plan.down, h_tiling, (H, 0, 1))

    def run(x, ids, weights, up, down, up_bias, down_bias):
        in_order, positions, table = sort(ids)
        h = empty_h()
        if gather is None:
            launch_up((x, in_order, table, up_bias, None, h), (up, None))
        else:
            launch_up((None, in_order, table, up_bias, None, h), (up, gather(x, positions)))
        y = empty_y()
        launch_down((None, in_order, table, down_bias, weights, y), (down, h))
        return add(y, ids)

    return run


def programs_a_multiprocessor(tile: TileConfig) -> int:
    """The number of programs at once. With eight warps, the accumulator leaves no room for another program."""
    return 1 if tile.num_warps > 4 else 2
