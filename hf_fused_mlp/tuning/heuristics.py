"""The plan for a problem that nothing was measured for, from what was measured nearby.

Each choice repeats what won on an H100 in bf16 (docs/notes-kernels.md). The kernels for few tokens are bound by
memory, and so are picked on every GPU that can run them; the one for many is picked on Hopper only.
"""

from hf_fused_mlp.kernels import gemm
from hf_fused_mlp.types import TORCH, LinearKey, Plan, ProblemKey, TileConfig, next_power_of_two


def heuristic_plan(key: ProblemKey) -> Plan:
    """The plan by rule; every key has one."""
    return Plan(up=_linear(key.up), down=_linear(key.down))


def _linear(key: LinearKey) -> TileConfig:
    if key.gpu.capability < (8, 0) or key.dtype.itemsize > 4:
        return TORCH
    if key.m == 1:
        return _gemv(key)
    # a bare product, and fp32 without tf32, are what the library is best at
    if (key.activation == "identity" and not key.gated) or key.dtype.itemsize > 2:
        return TORCH
    if key.m <= (128 if key.gated else 64):
        return _skinny(key)
    if key.gated and key.gpu.capability == (9, 0) and gemm.supports(key) is None:
        return TileConfig("gemm", 128, 128, 64, num_warps=8, num_stages=4, group_m=8)
    return TORCH


def _gemv(key: LinearKey) -> TileConfig:
    """A whole row a program where rows are long, two where they are short."""
    block_k = min(next_power_of_two(key.k), 4096 if key.gated else 2048)
    return TileConfig("gemv", block_n=1 if block_k > 1024 else 2, block_k=block_k, num_warps=4)


def _skinny(key: LinearKey) -> TileConfig:
    """All tokens in one tile, so that weights are read once, unless half of the multiprocessors would be idle."""
    block_m, block_n, block_k = max(16, key.m), 64, 128
    programs = -(-key.n // block_n)
    while block_m > 16 and 2 * programs <= key.gpu.num_sms:
        block_m, programs = block_m // 2, programs * 2
    stage_bytes = (block_m + block_n * (2 if key.gated else 1)) * block_k * key.dtype.itemsize
    num_stages = min(4 if block_m <= 32 else 3, max(1, key.gpu.shared_memory // stage_bytes))
    return TileConfig("skinny", block_m, block_n, block_k, num_warps=4, num_stages=num_stages)
