"""`hf-fused-mlp bench block`: wall-clock time of many forward passes of one Llama MLP.

The published claim is that fusing saves 12 % to 18 % of eager's time; `verdict` says for which M it holds on this GPU.
"""

import random
import time
from collections.abc import Callable

import torch

from hf_fused_mlp.bench.measuring import judged, name_of
from hf_fused_mlp.bench.results import Row, by_problem
from hf_fused_mlp.bench.shapes import Shape, build, fused_twin

CLAIM = (12.0, 18.0)  # percent of eager's time, according to the claim
ROUNDS = 10


def shape_of(hidden: int, intermediate: int | None) -> Shape:
    """A Llama MLP of these sizes; `intermediate` defaults to `4 * hidden`."""
    wide = intermediate or 4 * hidden
    return Shape(f"block-{hidden}x{wide}", "llama.LlamaMLP", hidden, wide, "silu")


@torch.no_grad()
def measure(shape: Shape, m: int, dtype: torch.dtype, passes: int, names: list[str]) -> list[Row]:
    """Times `passes` forward passes of `shape` on `[M, H]` tokens, host time included.

    Args:
        names: keys of `IMPLEMENTATIONS`.

    Returns:
        One row for each implementation that is available here, in milliseconds per pass.

    Raises:
        AssertionError: the fused MLP is outside its tolerance.
    """
    torch.compiler.reset()
    eager = build(shape, dtype).requires_grad_(False)
    x = torch.randn(m, shape.hidden, device=next(eager.parameters()).device, dtype=dtype)
    timings = wall_clock(judged(names, eager, fused_twin(eager), x, f"{shape.name}, M = {m}"), passes)
    sizes = {"shape": shape.name, "hidden": shape.hidden, "intermediate": shape.intermediate}
    common = sizes | {"dtype": name_of(dtype), "m": m}
    return [common | {"impl": name, "passes": passes} | timing for name, timing in timings.items()]


def wall_clock(calls: dict[str, Callable[[], object]], passes: int) -> dict[str, dict[str, float]]:
    """Times `passes` calls of each entry, in milliseconds per pass.

    The passes are split into up to `ROUNDS` rounds in which the calls take turns in random order, because a GPU slows
    down as it warms up. The first round is not counted.

    Returns:
        For each name the mean over all passes, and the means of the fastest and the slowest round.
    """
    count = min(ROUNDS, passes)
    rounds = [passes // count + (i < passes % count) for i in range(count)]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for size in (rounds[0], *rounds):
        for name in random.sample(list(calls), len(calls)):
            times[name].append(_milliseconds(calls[name], size))
    found = {}
    for name, (_, *counted) in times.items():
        each = [ms / size for ms, size in zip(counted, rounds, strict=True)]
        values = {"ms_per_pass": sum(counted) / passes, "ms_fastest_round": min(each), "ms_slowest_round": max(each)}
        found[name] = {field: round(value, 5) for field, value in values.items()}
    return found


def _milliseconds(call: Callable[[], object], passes: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(passes):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def block_table(rows: list[Row], device: str) -> str:
    """One line per token count with the percentage of time that fusing saves, and the verdict."""
    names = list(dict.fromkeys(row["impl"] for row in rows))
    others = [name for name in names if name != "fused"]
    columns = ["M", *(f"{name}, ms" for name in names), *(f"fused over {name}" for name in others)]
    lines = [f"| {' | '.join(columns)} |", f"|{'---:|' * len(columns)}"]
    for (_, _, m), entries in by_problem(rows).items():
        ms = {name: row["ms_per_pass"] for name, row in entries.items()}
        cells = [f"{ms[name]:.4f}" if name in ms else "-" for name in names]
        cells += [f"{saved(ms, name):.1f} %" if {name, "fused"} <= ms.keys() else "-" for name in others]
        lines.append(f"| {' | '.join((str(m), *cells))} |")
    return "\n".join((*lines, "", verdict(rows, device)))


def saved(ms: dict[str, float], over: str) -> float:
    """Percent of the time of `over` that fusing saves, rounded as shown; negative if fused is slower."""
    return round(100 * (1 - ms["fused"] / ms[over]), 1)


def verdict(rows: list[Row], device: str) -> str:
    """Says in one line for which token counts the claim holds."""
    low, high = CLAIM
    claimed = f"{low:.0f} % to {high:.0f} %"
    lengths: dict[str, list[str]] = {claimed: [], "more": [], "less": []}
    for (_, _, m), entries in by_problem(rows).items():
        if {"fused", "eager"} <= entries.keys():
            percent = saved({name: row["ms_per_pass"] for name, row in entries.items()}, "eager")
            group = "less" if percent < low else "more" if percent > high else claimed
            lengths[group].append(str(m))
    if not any(lengths.values()):
        return f"fused and eager were not both measured, so there is no verdict on the claim of {claimed}"
    parts = [f"{group} at M = {', '.join(ms)}" for group, ms in lengths.items() if ms]
    if not lengths[claimed]:
        parts.insert(0, f"{claimed} nowhere")
    sizes = ", ".join(dict.fromkeys(f"{row['hidden']} x {row['intermediate']} {row['dtype']}" for row in rows))
    return f"On {device}, of eager's time for an MLP of {sizes}, fusing saves {'; '.join(parts)}."
