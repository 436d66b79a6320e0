"""The plan for a problem that nothing was measured for, from what was measured nearby.

Each choice repeats what won on an H100 (docs/notes-kernels.md). Where nothing of ours won, or nothing was measured,
the choice is the unfused one, so that a guess costs no speed.
"""

import torch

from hf_fused_mlp.types import TORCH, LinearKey, Plan, ProblemKey, TileConfig

_HALF = (torch.float16, torch.bfloat16)


def heuristic_plan(key: ProblemKey) -> Plan:
    """The plan by rule; every key has one."""
    return Plan(up=_linear(key.up), down=_linear(key.down))


def _linear(key: LinearKey) -> TileConfig:
    if key.m == 1:
        return _gemv(key)
    if not key.gated or key.dtype not in _HALF:
        return TORCH
    if key.m <= 128:
        return TileConfig("skinny", max(16, key.m), block_n=64, block_k=128 if key.m <= 64 else 64, num_stages=4)
    # measured on Hopper only; elsewhere the library's GEMM is the safe choice
    if key.gpu.capability == (9, 0) and key.one_block and key.n % 8 == 0 and key.k % 8 == 0:
        return TileConfig("gemm", 128, 128, 64, num_warps=8, num_stages=4, group_m=8)
    return TORCH


def _gemv(key: LinearKey) -> TileConfig:
    if key.gated and key.k > 2048:
        return TileConfig("gemv", block_n=1, block_k=4096, num_warps=4)
    block_k = 2048 if key.k > 2048 else 1024
    return TileConfig("gemv", block_n=2, block_k=block_k, num_warps=4)
