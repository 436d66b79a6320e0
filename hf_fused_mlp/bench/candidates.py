"""`hf-fused-mlp bench candidates`: every tile configuration that the tuner may choose for an MLP, timed."""

from dataclasses import asdict
from typing import Any

import torch

from hf_fused_mlp.bench.measuring import rounded
from hf_fused_mlp.bench.results import Row
from hf_fused_mlp.bench.shapes import Shape, build
from hf_fused_mlp.fuse import fuse_model


@torch.no_grad()
def measure(shape: Shape, m: int, dtype: torch.dtype) -> list[Row]:
    """Times each configuration of the up and the down launch of one shape at M tokens.

    Returns:
        One row for each configuration, fastest first within a launch; `kernel` is `torch` for PyTorch's own GEMM.
    """
    from hf_fused_mlp.ops.dispatch import problem_key  # these two import Triton
    from hf_fused_mlp.tuning.tuner import time_candidates

    mlp: Any = fuse_model(build(shape, dtype), strict=True)
    key = problem_key(m, mlp.operands())
    rows = []
    for launch, linear_key in (("up", key.up), ("down", key.down)):
        timings = sorted(time_candidates(linear_key).items(), key=lambda item: item[1].median_us)
        for config, timing in timings:
            rows.append({"shape": shape.name, "m": m, "launch": launch, **asdict(config), **rounded(timing)})
    return rows


def table(rows: list[Row]) -> str:
    """One line per launch: the time of PyTorch's GEMM and the three fastest configurations of our kernels."""
    launches: dict[tuple, list[Row]] = {}
    for row in rows:
        launches.setdefault((row["shape"], row["m"], row["launch"]), []).append(row)
    lines = ["| shape | M | launch | PyTorch, us | fastest of ours: M x N x K tile, us |", "|---|---:|---|---:|---|"]
    for launch, entries in launches.items():
        library = next(entry["median_us"] for entry in entries if entry["kernel"] == "torch")
        ours = [entry for entry in entries if entry["kernel"] != "torch"][:3]
        fastest = "; ".join(f"{describe(entry)}: {entry['median_us']:.1f}" for entry in ours)
        lines.append(f"| {' | '.join(map(str, launch))} | {library:.1f} | {fastest} |")
    return "\n".join(lines)


def describe(config: Row) -> str:
    """Kernel, tile, warps and stages of a configuration."""
    tile = "x".join(str(config[name]) for name in ("block_m", "block_n", "block_k"))
    return f"{config['kernel']} {tile}, {config['num_warps']} warps, {config['num_stages']} stages"
