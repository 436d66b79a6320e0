"""The plans for routed experts that a tuner should try, and those that a file of plans may name."""

from collections.abc import Iterable
from types import ModuleType

import torch

from hf_fused_mlp.kernels.experts import fp8_grouped, grouped, pairs
from hf_fused_mlp.types import SCALE_BLOCK, ExpertsCall, ExpertsKey, ExpertsPlan, TileConfig, next_power_of_two

FP8_KERNELS = dict.fromkeys(fp8_grouped.ACTIVATIONS, fp8_grouped)  # the ways to multiply in one kernel
KERNELS: dict[str, ModuleType] = {"pairs": pairs, "grouped": grouped, **FP8_KERNELS}
# by order, the kernel, and the rows of one expert that a tile may have; what tensor cores multiply has at least 16
ORDERS = {"pairs": ("pairs", (1,)), "sorted": ("grouped", (16, 32, 64, 128)), "gathered": ("grouped", (64, 128, 256))}
MOST_PAIRS = 256  # beyond, reading an expert once for each of its pairs is hopeless
MOST_PIECES = 128  # of a dot product, for each of which there is code
LARGEST_TILE = 1 << 15  # elements of an accumulator: more do not fit into registers
LARGEST_BLOCK = 1 << 14  # elements of `pairs`, which multiplies what registers hold


def unsupported(key: ExpertsKey, plan: ExpertsPlan) -> str | None:
    """Why `plan` cannot or should not run `key`, or None if it can."""
    is_fp8 = key.storage == "fp8"
    if is_fp8 and (key.layout != "planes" or key.bias):
        return f"no kernel reads weights in FP8 as {key.layout}" + (" with biases" if key.bias else "")
    if plan.order not in ORDERS:
        return f"unknown order {plan.order!r}; known are {', '.join(ORDERS)}"
    kernel, rows = ORDERS[plan.order]
    if plan.rows not in rows:
        return f"{plan.rows} rows a tile; expected one of {', '.join(map(str, rows))}"
    planes, item_bytes = 2 if key.gated else 1, 1 if is_fp8 else key.dtype.itemsize
    kernels = list(FP8_KERNELS) if is_fp8 and kernel == "grouped" else [kernel]
    for name, n, k, width, tile in (
        ("up", key.intermediate, key.hidden, planes, plan.up),
        ("down", key.hidden, key.intermediate, 1, plan.down),
    ):
        if tile.kernel not in kernels:
            return f"{name}: {tile.kernel!r} does not run in the order {plan.order!r}; expected {' or '.join(kernels)}"
        if kernel == "pairs":
            together = next_power_of_two(key.top_k) if name == "down" else 1
            if together * tile.block_n * tile.block_k > LARGEST_BLOCK or k > MOST_PIECES * tile.block_k:
                return f"{name}: blocks of {tile.block_n} x {tile.block_k} are too large or too small"
            if is_fp8 and tile.block_k % SCALE_BLOCK:
                return f"{name}: blocks of {tile.block_k} along K; FP8 is read in whole blocks of {SCALE_BLOCK}"
        elif k * item_bytes % 16 or n * item_bytes % 16:
            return f"{name}: tensor descriptors need rows of a multiple of 16 bytes, not {n} and {k} elements"
        elif tile.block_n < 16 or tile.block_k < 16 or plan.rows * width * tile.block_n > LARGEST_TILE:
            return f"{name}: tiles of {plan.rows} x {tile.block_n} x {tile.block_k} are too large or too small"
    return fp8_grouped.unsupported(plan) if is_fp8 and kernel == "grouped" else None


def first_plans(call: ExpertsCall) -> list[ExpertsPlan]:
    """Plans for the tuner to try first: one for each order and each suitable number of rows."""
    gated, rows = call.form.gated, call.pairs / call.experts
    plans = []
    if call.pairs <= MOST_PAIRS and call.form.layout == "planes":
        plans.append(ExpertsPlan("pairs", 1, *(next(iter(_pairs(call, name))) for name in ("up", "down"))))
    if call.storage == "fp8":
        return plans + _first_fp8_plans(call, rows)
    if call.dtype == torch.float32:
        return [*plans, *(_plan("sorted", height, (32, 32, 4, 2), (64, 32, 4, 2)) for height in (16, 32))]
    for height, up, down in (
        (16, (64, 128, 4, 3), (64, 128, 4, 4)),
        (32, (64, 128, 4, 3), (64, 128, 4, 4)),
        (64, (64, 64, 4, 4), (128, 64, 4, 4)),
    ):
        if height <= 4 * max(4, rows) and rows <= 4 * height:
            plans.append(_plan("sorted", height, up, down))
    for height, width in ((64, 256), (128, 256), (256, 128)):
        if height / 4 <= rows:
            plans.append(_plan("gathered", height, (width // 2 if gated else width, 64, 8, 4), (width, 64, 8, 4)))
    return plans


def tiles(call: ExpertsCall, plan: ExpertsPlan, launch: str) -> list[TileConfig]:
    """The tiles that a tuner should try in place of those of a plan's `launch`, "up" or "down"."""
    if plan.order == "pairs":
        return list(_pairs(call, launch))
    if call.storage == "fp8":
        return _fp8_tiles(call, plan, launch)
    halved = launch == "up" and call.form.gated  # a tile has so many rows of gate, too
    if call.dtype == torch.float32:
        sizes: list[tuple[int, int, int, int]] = [(32, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 3)]
    elif plan.order == "sorted":
        sizes = [(64, 128, 4, 3), (128, 64, 4, 4), (128, 128, 4, 3), (64, 256, 4, 3), (128, 64, 8, 4)]
    else:
        width = 32768 // max(128, plan.rows)
        sizes = [(width, 64, 8, 4), (width, 64, 8, 3), (width // 2, 64, 8, 4), (width // 2, 64, 4, 3)]
    made = [_tile(n // 2 if halved else n, k, warps, stages) for n, k, warps, stages in sizes]
    if plan.order == "gathered":
        made += [_tile(made[0].block_n, 64, 8, made[0].num_stages, group) for group in (1, 8, 16)]
    return made


def _first_fp8_plans(call: ExpertsCall, rows: float) -> list[ExpertsPlan]:
    """Plans for each way to multiply, with heights of tiles that suit `rows` pairs per expert."""
    if call.dtype == torch.float32:
        return [fp8_grouped.plan_of(call, height, "w8a16", (32, 4, 2), (32, 4, 2)) for height in (16, 32)]
    plans = []
    tile = SCALE_BLOCK, 4, 3
    for order, height in (("sorted", 16), ("sorted", 32), ("sorted", 64), ("gathered", 64)):
        if height <= 4 * max(4, rows) and rows <= 8 * height:
            plans += [fp8_grouped.plan_of(call, height, kernel, tile, tile, order=order) for kernel in FP8_KERNELS]
    if rows >= 32:
        plans += [fp8_grouped.plan_of(call, 128, kernel, (128, 8, 4), (128, 8, 6)) for kernel in FP8_KERNELS]
    return plans


def _fp8_tiles(call: ExpertsCall, plan: ExpertsPlan, launch: str) -> list[TileConfig]:
    if call.dtype == torch.float32:
        kernels, sizes = ["w8a16"], [(32, 4, 2), (64, 4, 2)]
    else:
        kernels = list(FP8_KERNELS)
        sizes = [(128, 4, 2), (128, 4, 4), (128, 8, 3), (128, 8, 4), (64, 4, 3), (64, 4, 5), (64, 8, 4)]
    plans = [fp8_grouped.plan_of(call, plan.rows, kernel, size, size) for kernel in kernels for size in sizes]
    return [getattr(candidate, launch) for candidate in plans]


def _pairs(call: ExpertsCall, launch: str) -> Iterable[TileConfig]:
    k, least = (call.hidden if launch == "up" else call.intermediate), SCALE_BLOCK if call.storage == "fp8" else 16
    together = next_power_of_two(call.top_k) if launch == "down" else 1
    for block_n, size, warps in ((2, 2048, 4), (1, 1024, 4), (1, 2048, 4), (2, 1024, 4), (1, 4096, 8), (4, 4096, 8)):
        block_k = min(max(size // together, least), max(least, next_power_of_two(k)))
        if k <= 64 * block_k:
            yield TileConfig("pairs", block_n=block_n, block_k=block_k, num_warps=warps)


def _plan(order: str, rows: int, up: tuple[int, int, int, int], down: tuple[int, int, int, int]) -> ExpertsPlan:
    return ExpertsPlan(order, rows, _tile(*up), _tile(*down))


def _tile(block_n: int, block_k: int, num_warps: int, num_stages: int, group_m: int = 4) -> TileConfig:
    return TileConfig(
        "grouped", block_n=block_n, block_k=block_k, num_warps=num_warps, num_stages=num_stages, group_m=group_m
    )
