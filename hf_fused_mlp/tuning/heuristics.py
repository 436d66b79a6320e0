"""The plan for a problem that nothing was measured for, from what was measured nearby.

Each choice repeats what won on an H100 in bf16 (docs/notes-kernels.md). The kernels for few tokens are bound by
memory, and so are picked on every GPU that can run them; the one for many is picked on Hopper only, and elsewhere
PyTorch's GEMMs with one kernel for the rest.
"""

from dataclasses import replace

from hf_fused_mlp.kernels import fp8_gemm, gemm, skinny, transposed_gemv
from hf_fused_mlp.types import SCALE_BLOCK, TORCH, LinearKey, Plan, ProblemKey, TileConfig, bucket, next_power_of_two


def heuristic_plan(key: ProblemKey) -> Plan:
    """The plan by rule; every key has one."""
    key = bucket(key)
    return Plan(up=_linear(key.up), down=_linear(key.down) if key.out else TORCH)


def _linear(key: LinearKey) -> TileConfig:
    if key.gpu.capability < (8, 0) or key.dtype.itemsize > 4:
        return TORCH
    if key.storage == "fp8":
        return _fp8(key)
    half = key.dtype.itemsize == 2  # fp32 without tf32 is what the library is best at
    if key.storage == "transposed":
        return _transposed(key, half)
    if key.m == 1 or (key.m == 2 and half):
        return TileConfig("gemv", block_k=2048 if key.k > 2048 else 1024, num_warps=4)
    bare = key.activation == "identity" and not key.gated
    if skinny.supports(key) is None and key.m <= (128 if key.gated else 64 if bare else 32):
        return _skinny(key)
    if key.gpu.capability == (9, 0) and not bare and gemm.supports(key) is None:
        tile = TileConfig("gemm", 128, 128 if key.gated else 256, 64, num_warps=8, num_stages=4, group_m=8)
        # a gate's second GEMM and activation outweigh a last round of few tiles, an activation alone does not
        if key.gated or _rounds_filled(key, tile) > 0.8:
            return tile
    return TileConfig("elementwise") if key.gated else TORCH


def _transposed(key: LinearKey, half: bool) -> TileConfig:
    """For floats stored as `[K, N]`; nothing was measured for these yet (docs/notes-kernels.md)."""
    if key.gated:
        return TileConfig("elementwise")
    if transposed_gemv.supports(key) is None:
        narrowest, *_, block_n = (row_bytes // key.dtype.itemsize for row_bytes in transposed_gemv.ROW_BYTES)
        while block_n > narrowest and -(-key.n // block_n) < key.gpu.num_sms:
            block_n //= 2
        block_k = max(128, next_power_of_two(-(-key.k // transposed_gemv.MOST_STEPS)))
        return TileConfig("transposed_gemv", block_n=block_n, block_k=block_k, num_warps=8 if block_k == 128 else 16)
    if half and key.m <= (64 if key.activation == "identity" else 32):
        return replace(_skinny(key), kernel="transposed_skinny")
    return TORCH


def _fp8(key: LinearKey) -> TileConfig:
    """For weights in FP8; nothing was measured for these yet but prototypes (docs/notes-kernels.md)."""
    if key.m == 1:
        return TileConfig(
            "fp8_gemv", block_n=1, block_k=max(SCALE_BLOCK, min(4096, next_power_of_two(key.k))), num_warps=4
        )
    if key.dtype.itemsize == 2 and key.m <= 64:
        block_m, block_n = max(16, key.m), 64
        split_k = _split_k(key, block_n)
        stage_bytes = (2 * block_m + block_n * (2 if key.gated else 1)) * SCALE_BLOCK
        stages = min(6, max(1, key.gpu.shared_memory // stage_bytes))
        return TileConfig("fp8_skinny", block_m, block_n, SCALE_BLOCK, num_stages=stages, split_k=split_k)
    return TileConfig("fp8_gemm" if fp8_gemm.supports(key) is None else "fp8_dequantized")


def _rounds_filled(key: LinearKey, tile: TileConfig) -> float:
    """The share of the multiprocessors that is busy while they work through the tiles."""
    tiles = -(-key.m // tile.block_m) * -(-key.n // tile.block_n)
    return tiles / (-(-tiles // key.gpu.num_sms) * key.gpu.num_sms)


def _split_k(key: LinearKey, block_n: int) -> int:
    """Into how many parts K is split so that tiles of so many rows fill the GPU; with a gate it is not."""
    split_k = 1
    while split_k < 4 and not key.gated and -(-key.n // block_n) * split_k < key.gpu.num_sms:
        split_k *= 2
    return split_k


def _skinny(key: LinearKey) -> TileConfig:
    """All tokens in one tile, so that weights are read once, unless many multiprocessors would be idle.

    Then K is split, or with a gate the tokens are.
    """
    block_m, block_n = max(16, key.m), 64
    programs, split_k = -(-key.n // block_n), _split_k(key, block_n)
    while block_m > 16 and key.gated and 2 * programs <= key.gpu.num_sms:
        block_m, programs = block_m // 2, programs * 2
    block_k, num_stages = (256, 3) if split_k == 2 and block_m <= 32 else (128, 4)
    stage_bytes = (block_m + block_n * (2 if key.gated else 1)) * block_k * key.dtype.itemsize
    num_stages = min(num_stages, max(1, key.gpu.shared_memory // stage_bytes))
    return TileConfig("skinny", block_m, block_n, block_k, num_warps=4, num_stages=num_stages, split_k=split_k)
