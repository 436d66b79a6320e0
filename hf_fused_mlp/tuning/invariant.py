"""Plans whose order of summation does not depend on the token count: `fuse_model(model, batch_invariant=True)`.

One kernel runs both launches at every token count, one token included. It multiplies `BLOCK_K` elements of a row after
the other into one accumulator, by the instruction that it uses for any tile; only the tile's other sides go by how
many tokens there are. cuBLAS has no part in it: it chooses kernels, and splits K, by token count.
"""

from typing import NamedTuple

from hf_fused_mlp.kernels import gemm
from hf_fused_mlp.modes import why_variant
from hf_fused_mlp.types import TORCH, LinearKey, Plan, ProblemKey, TileConfig

BLOCK_K = 64


class Tile(NamedTuple):
    """Tokens, rows of weights, those of a gate included, warps, and stages at most."""

    block_m: int
    rows: int
    warps: int
    stages: int

    def needed(self, m: int, n: int) -> int:
        """The number of tiles in the product of `m` tokens and `n` rows."""
        return -(-m // self.block_m) * -(-n // self.rows)


# the largest first
TILES = (Tile(128, 256, 8, 4), Tile(128, 128, 8, 4), Tile(64, 128, 4, 6), Tile(64, 64, 4, 8), Tile(64, 32, 4, 8))


def invariant_plan(key: ProblemKey) -> Plan | None:
    """The plan for `key`; None if no kernel has such sums for its dtype or storage."""
    up, down = _linear(key.up), _linear(key.down) if key.out else TORCH
    return None if up is None or down is None else Plan(up, down)


def _linear(key: LinearKey) -> TileConfig | None:
    if why_variant(key.storage, key.dtype, key.gpu):
        return None
    planes = 2 if key.gated else 1
    if gemm.supports(key) is not None:  # for reasons that are the weights', not the tokens'
        stage_bytes = (1 + planes) * 64 * BLOCK_K * key.dtype.itemsize
        stages = min(4, max(1, key.gpu.shared_memory // stage_bytes))
        return TileConfig("skinny", 64, 64, BLOCK_K, num_warps=4, num_stages=stages)
    widest = 256 if key.gpu.capability >= (9, 0) else 128  # older tensor cores hold the sums in registers, which spill
    fitting = [tile for tile in TILES if 32 * planes <= tile.rows <= widest]
    tiles = [tile for tile in fitting if tile.block_m <= max(64, key.m)]
    # the largest tile of which there are enough for all multiprocessors, or the smallest
    filling = [tile for tile in tiles if tile.needed(key.m, planes * key.n) >= key.gpu.num_sms]
    block_m, rows, warps, stages = (filling or tiles[-1:])[0]
    stage_bytes = (block_m + rows) * BLOCK_K * key.dtype.itemsize
    stages = min(stages, max(1, key.gpu.shared_memory // stage_bytes - 1))  # one for the output
    return TileConfig("gemm", block_m, rows // planes, BLOCK_K, num_warps=warps, num_stages=stages, group_m=8)
