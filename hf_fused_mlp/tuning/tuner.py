"""Measuring every candidate for one launch. Never called from a forward."""

import torch
from triton.runtime.errors import OutOfResources

from hf_fused_mlp.kernels import FAMILIES, linear
from hf_fused_mlp.tuning.timing import GRAPHS_UP_TO, Timing, round_robin, round_robin_graphs, weight_copies
from hf_fused_mlp.types import TORCH, LinearKey, TileConfig


def candidates(key: LinearKey) -> list[TileConfig]:
    """Every configuration that may run `key`, the library's among them."""
    own = [config for family in FAMILIES.values() if family.supports(key) is None for config in family.candidates(key)]
    return [TORCH, *own]


@torch.no_grad()
def time_candidates(key: LinearKey, rounds: int = 10) -> dict[TileConfig, Timing]:
    """Times `candidates(key)` in turn on random data; a configuration that the GPU has no room for is left out."""
    planes = 2 if key.gated else 1
    device = torch.device("cuda")
    x = torch.randn(key.m, key.k, device=device, dtype=key.dtype)
    block = torch.randn(planes, key.n, key.k, device=device, dtype=key.dtype) * key.k**-0.5
    blocks = [block.clone() for _ in range(weight_copies(block.nbytes) if key.m <= GRAPHS_UP_TO else 1)]

    def calls(config: TileConfig):
        return [
            lambda block=block: linear(
                x, block[-1], None, block[0] if key.gated else None, None, key.activation, config
            )
            for block in blocks
        ]

    runnable = {config: calls(config) for config in candidates(key) if _runs(calls(config)[0])}
    if key.m <= GRAPHS_UP_TO:
        return round_robin_graphs(runnable, rounds)
    return round_robin({config: copies[0] for config, copies in runnable.items()}, rounds)


def _runs(call) -> bool:
    try:
        call()
    except OutOfResources:
        return False
    return True
