"""The kernels for routed experts, one file for each way to run them, and the rule that chooses."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from hf_fused_mlp.kernels.experts import fp8_grouped, grouped, pairs
from hf_fused_mlp.types import FP8, GPU, SCALE_BLOCK, ExpertsCall, ExpertsPlan, TileConfig, next_power_of_two

FEW_PAIRS = 32
FEW_BYTES = 1 << 29  # of their weights; sorting takes as long as reading so much, and finds experts that are shared
LARGE_EXPERT = 1 << 25  # bytes of gate and up that do not stay in the L2 until a second tile reads them
MOST_PROGRAMS = (1 << 31) - 1  # in the first dimension of a grid, by CUDA
MOST_SORTED = 1 << 18  # pairs at once: the program that sorts holds them in registers, and h and y take memory


def describe_experts(x: Tensor, ids: Tensor, up: Tensor, down: Tensor, form) -> ExpertsCall:
    """All about a call but addresses. `x` `[M, H]` has contiguous rows, at least one; the rest is contiguous."""
    m, hidden = x.shape
    intermediate = down.shape[1 if form.layout != "planes" else 2]
    stride = x.stride(0) if m > 1 else hidden  # the stride of a single row may be anything
    sizes = m, ids.shape[1], up.shape[0], hidden, intermediate, stride
    return ExpertsCall(*sizes, form, x.dtype, x.device, "fp8" if up.dtype == FP8 else "float")


def rule_of_thumb(call: ExpertsCall) -> ExpertsPlan:
    """A plan for shapes that none was measured for."""
    H, I = call.hidden, call.intermediate
    of_weight = 1 if call.storage == "fp8" else call.dtype.itemsize
    fits = H * of_weight % 16 == 0 and I * of_weight % 16 == 0
    up_bytes = (2 if call.form.gated else 1) * H * I * of_weight
    few = call.pairs <= min(FEW_PAIRS, call.experts // 4)  # more would share experts
    few = call.tokens == 1 or (few and call.pairs * (up_bytes + H * I * of_weight) <= FEW_BYTES)
    few = few and call.form.layout == "planes"  # dot products along the columns of a transposed stack are slow
    if few or not fits or min(H, I) < 16:
        return without_sorting(call)
    if call.storage == "fp8":
        return fp8_grouped.rule_of_thumb(call)
    rows = call.pairs / call.experts  # of one expert, on average; the tallest tile should not be mostly empty
    if call.dtype == torch.float32:
        return _grouped(call, "sorted", 16, (32, 32, 4, 2), (64, 32, 4, 2))
    if rows < 24:
        return _grouped(call, "sorted", 16 if rows <= 8 else 32, (64, 128, 4, 3), (64, 128, 4, 4))
    if rows < 48:
        return _grouped(call, "sorted", 64, (64, 64, 4, 4), (128, 64, 4, 4))
    up, down = (128 if call.form.gated else 256, 64, 8, 4), (256, 64, 8, 4 if call.form.layout == "planes" else 3)
    if 96 < rows <= 192 and up_bytes > LARGE_EXPERT:  # all of an expert in one tile
        return _grouped(call, "gathered", 256, (up[0] // 2, 64, 8, 4), (128, 64, 8, 4))
    if rows < 112:  # bound by memory, where tiles of fewer weights are better balanced
        up = up[0] // 2, 64, 8, 4
    return _grouped(call, "gathered", 128, up, down)


def without_sorting(call: ExpertsCall) -> ExpertsPlan:
    """The plan that runs everything, and any number of tokens slowly."""
    up, down = (1, 2048), (2, 2048) if call.intermediate <= 4096 else (1, 1024)
    if call.form.layout != "planes":  # a row is read along the columns of several
        up = down = 16, 128
    elif call.storage == "fp8":
        up = down = 2, 1024
    least = SCALE_BLOCK if call.storage == "fp8" else 16  # FP8 is read in whole blocks of scales
    return ExpertsPlan("pairs", 1, _row(up, call.hidden, 1, least), _row(down, call.intermediate, call.top_k, least))


def _row(block: tuple[int, int], k: int, pairs: int, least: int) -> TileConfig:
    """For dot products of length `k`, those of so many pairs in one program: pieces that registers hold, at most 64 of
    them, for each of which there is code."""
    block_n, size = block
    block_k = max(size // next_power_of_two(pairs), next_power_of_two(-(-k // 64)), least)
    return TileConfig("pairs", block_n=block_n, block_k=min(block_k, max(least, next_power_of_two(k))), num_warps=4)


def _grouped(call: ExpertsCall, order: str, rows: int, *tiles: tuple[int, int, int, int]) -> ExpertsPlan:
    """Tiles of (block_n, block_k, num_warps, num_stages), with as many stages as the GPU has shared memory for."""
    shared = GPU.of(call.device).shared_memory
    planes = (2 if call.form.gated else 1), 1
    configs = [
        TileConfig(
            "grouped",
            block_n=block_n,
            block_k=block_k,
            num_warps=num_warps,
            num_stages=max(1, min(num_stages, shared // ((plane * block_n + rows) * block_k * call.dtype.itemsize))),
            group_m=4,
        )
        for plane, (block_n, block_k, num_warps, num_stages) in zip(planes, tiles, strict=True)
    ]
    return ExpertsPlan(order, rows, *configs)


def prepare_experts(plan: ExpertsPlan, call: ExpertsCall) -> Callable[..., Tensor]:
    """The function that runs `plan` on calls like this one: of x, ids, weights, up, down and their biases and scales.

    Scales may be left out.
    """
    if plan.order == "pairs":
        most = MOST_PROGRAMS // pairs.programs_of_a_token(call, plan.up, plan.down)
    else:
        most = MOST_SORTED // call.top_k
    most = max(16, most // 16 * 16)  # a multiple of 16, so that addresses of parts stay aligned
    if call.tokens > most:
        return _in_parts(plan, call, most)
    if plan.order == "pairs":
        return pairs.pairs(call, plan.up, plan.down)
    return (fp8_grouped.fp8_grouped if call.storage == "fp8" else grouped.grouped)(call, plan)


def _in_parts(plan: ExpertsPlan, call: ExpertsCall, tokens: int) -> Callable[..., Tensor]:
    """The same, for `tokens` at a time."""
    whole, rest = divmod(call.tokens, tokens)
    runs = [prepare_experts(plan, replace(call, tokens=tokens))] * whole
    runs += [prepare_experts(plan, replace(call, tokens=rest))] if rest else []

    def run(x, ids, weights, *stacks):
        parts = zip(runs, x.split(tokens), ids.split(tokens), weights.split(tokens), strict=True)
        return torch.cat([part(*given, *stacks) for part, *given in parts])

    return run
