"""The steps around the grouped GEMMs of routed experts: pairs are sorted by expert before, and summed after.

A pair is a token with one of its experts: number `token * top_k + j`. The sort is stable and counts: chunks of pairs
are counted by expert, then each pair is placed, after those of its expert that come before it. Ids that are no
expert's, which expert parallelism gives to tokens of other ranks, are not placed, and their outputs count as zero.
Nothing is read by the host, so all of it can be captured in a CUDA graph. There are as many tiles as may be needed.
With `overlap`, launches begin while the one before is finishing, and wait for it before they read what it wrote.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fused_mlp.kernels._launch import allocator, launcher
from hf_fused_mlp.types import ExpertsCall, next_power_of_two

SUM_BLOCK = 1024
COPY_BLOCK = 2048
TILE_STEP = 16
ONE_CHUNK = 64  # pairs that one program sorts alone
RANK_STEP = 32


@triton.jit
def _experts_of(ids_ptr, pair, num_pairs, num_experts, NONE: tl.constexpr):
    """The experts of pairs, `NONE` where there is none."""
    e = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1)
    return tl.where((e >= 0) & (e < num_experts), e, NONE).to(tl.int32)


@triton.jit
def _count_kernel(
    ids_ptr, counts_ptr, num_pairs, num_experts, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, OVERLAP: tl.constexpr
):
    """`counts_ptr` is `[chunks, EXPERTS]`: how many pairs of each chunk an expert has."""
    if OVERLAP:
        gdc_launch_dependents()
    chunk = tl.program_id(0)
    e = _experts_of(ids_ptr, chunk * CHUNK + tl.arange(0, CHUNK), num_pairs, num_experts, EXPERTS)
    counts = tl.histogram(e, EXPERTS, mask=e < EXPERTS)
    tl.store(counts_ptr + chunk * EXPERTS + tl.arange(0, EXPERTS), counts)


@triton.jit
def _place_kernel(
    ids_ptr,
    counts_ptr,
    sorted_ptr,
    positions_ptr,
    tiles_ptr,
    num_pairs,
    num_experts,
    num_chunks,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    RANK_STEP: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    TILE_STEP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Writes a chunk's pairs in the order of experts, and `TILES` entries of the table of tiles.

    Without `counts_ptr` there is one chunk. `positions_ptr`, if given, holds the place of each pair in that order,
    or -1. The table begins with the number of tiles; entry `i`, at `4 * (i + 1)`, is the expert of tile `i`, its first
    row and the end of the expert's rows.
    """
    if OVERLAP:
        gdc_launch_dependents()
    chunk = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    offs = tl.arange(0, CHUNK)
    pair = chunk * CHUNK + offs
    e = _experts_of(ids_ptr, pair, num_pairs, num_experts, EXPERTS)
    rank = tl.zeros((CHUNK,), tl.int32)  # how many pairs of this chunk come before, to the same expert
    for first in tl.range(0, CHUNK, RANK_STEP):
        others = first + tl.arange(0, RANK_STEP)
        same = e[:, None] == _experts_of(ids_ptr, chunk * CHUNK + others, num_pairs, num_experts, EXPERTS)[None, :]
        rank += tl.sum((same & (others[None, :] < offs[:, None])).to(tl.int32), 1)

    before = tl.zeros((EXPERTS,), tl.int32)
    if counts_ptr is None:
        counts = tl.histogram(e, EXPERTS, mask=e < EXPERTS)
    else:
        if OVERLAP:
            gdc_wait()
        counts = tl.zeros((EXPERTS,), tl.int32)
        for first in tl.range(0, num_chunks, STEP):
            row = first + tl.arange(0, STEP)
            some = tl.load(
                counts_ptr + row[:, None] * EXPERTS + experts[None, :], mask=(row < num_chunks)[:, None], other=0
            )
            counts += tl.sum(some, 0)
            before += tl.sum(tl.where((row < chunk)[:, None], some, 0), 0)
    ends = tl.cumsum(counts, 0)
    starts = ends - counts
    position = tl.gather(starts + before, tl.minimum(e, EXPERTS - 1), 0) + rank
    tl.store(sorted_ptr + position, pair, mask=e < EXPERTS)
    if positions_ptr is not None:
        tl.store(positions_ptr + pair, tl.where(e < EXPERTS, position, -1), mask=pair < num_pairs)

    tiles = (counts + ROWS - 1) // ROWS
    tile_ends = tl.cumsum(tiles, 0)
    if chunk == 0:
        tl.store(tiles_ptr, tl.sum(tiles, 0))
    for first in tl.range(0, TILES, TILE_STEP):
        tile = chunk * TILES + first + tl.arange(0, TILE_STEP)
        owner = tl.sum((tile_ends[None, :] <= tile[:, None]).to(tl.int32), 1)
        mine = (owner[:, None] == experts[None, :]).to(tl.int32)
        row = tile * ROWS + tl.sum(mine * (starts - (tile_ends - tiles) * ROWS)[None, :], 1)
        entry = tiles_ptr + 4 * (tile + 1)
        tl.store(entry, owner, mask=owner < EXPERTS)
        tl.store(entry + 1, row, mask=owner < EXPERTS)
        tl.store(entry + 2, tl.sum(mine * ends[None, :], 1), mask=owner < EXPERTS)


@triton.jit
def _gather_kernel(x_ptr, positions_ptr, rows_ptr, K, stride_xm, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """``rows[positions[token * TOP_K + j]] = x[token]``: a token is read once and written for each of its pairs."""
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token * stride_xm + offs, mask=offs < K)
    for j in tl.static_range(TOP_K):
        row = tl.load(positions_ptr + token * TOP_K + j).to(tl.int64)
        tl.store(rows_ptr + row * K + offs, x, mask=(offs < K) & (row >= 0))


@triton.jit
def _sum_kernel(
    y_ptr, ids_ptr, out_ptr, num_experts, N, TOP_K: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """``out[token] = sum over j of y[token * TOP_K + j]``, in the order of j, without pairs that have no expert."""
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    if OVERLAP:
        gdc_wait()
    for j in tl.static_range(TOP_K):
        e = tl.load(ids_ptr + token * TOP_K + j)
        mask = (offs < N) & (e >= 0) & (e < num_experts)
        acc += tl.load(y_ptr + (token * TOP_K + j) * N + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * N + offs, acc.to(out_ptr.dtype.element_ty), mask=offs < N)


def most_tiles(call: ExpertsCall, rows: int) -> int:
    """The largest possible number of tiles of that many rows: the whole ones, and a last one for each expert."""
    return min(call.pairs, call.pairs // rows + call.experts)


def sort(call: ExpertsCall, rows: int, positions: bool, overlap: bool):
    """A function of ids that gives the sorted pairs, their positions and the table of tiles of `rows` rows.

    Two launches, or one for few pairs. Without `positions`, it gives None for them.
    """
    experts = next_power_of_two(max(16, call.experts))
    step = max(16, min(64, 16384 // experts))
    # each chunk reads the counts of all: 128 of them, until a chunk has 256 pairs, and then 256
    chunk = max(
        ONE_CHUNK, min(256, next_power_of_two(-(-call.pairs // 128))), next_power_of_two(-(-call.pairs // 256))
    )
    chunks = -(-call.pairs // chunk)
    tiles = -(-most_tiles(call, rows) // (chunks * TILE_STEP)) * TILE_STEP
    empty_counts = allocator((chunks, experts), torch.int32, call.device)
    empty_sorted = allocator((call.pairs,), torch.int32, call.device)
    empty_tiles = allocator((4 * (chunks * tiles + 1),), torch.int32, call.device)
    sizes = call.pairs, call.experts
    count = launcher(_count_kernel, call.device, (chunks, 1, 1), (*sizes, experts, chunk, overlap), num_warps=4)
    values = *sizes, chunks, experts, chunk, step, RANK_STEP, rows, tiles, TILE_STEP, overlap
    place = launcher(_place_kernel, call.device, (chunks, 1, 1), values, overlap=overlap and chunks > 1, num_warps=8)

    def run(ids):
        counts = None
        if chunks > 1:
            counts = empty_counts()
            count((ids, counts))
        in_order, table = empty_sorted(), empty_tiles()
        places = empty_sorted() if positions else None
        place((ids, counts, in_order, places, table))
        return in_order, places, table

    return run


def gather(call: ExpertsCall):
    """One launch: a function of x and the positions of pairs that gives `[pairs, hidden]`, sorted."""
    empty = allocator((call.pairs, call.hidden), call.dtype, call.device)
    block = min(COPY_BLOCK, next_power_of_two(call.hidden))
    values = call.hidden, call.stride_xm, call.top_k, block
    grid = call.tokens, -(-call.hidden // block), 1
    launch = launcher(_gather_kernel, call.device, grid, values, num_warps=4)

    def run(x, positions):
        rows = empty()
        launch((x, positions, rows))
        return rows

    return run


def add(call: ExpertsCall, overlap: bool):
    """One launch: a function of the experts' outputs `[pairs, hidden]` and ids that gives `[tokens, hidden]`."""
    empty = allocator((call.tokens, call.hidden), call.dtype, call.device)
    block = min(SUM_BLOCK, next_power_of_two(call.hidden))
    grid = call.tokens, -(-call.hidden // block), 1
    values = call.experts, call.hidden, call.top_k, block, overlap
    launch = launcher(_sum_kernel, call.device, grid, values, overlap=overlap, num_warps=4)

    def run(y, ids):
        out = empty()
        launch((y, ids, out))
        return out

    return run
