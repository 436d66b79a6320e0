"""`hf-fused-mlp bench --block`: the time of many forward passes of one MLP, as whoever runs them waits for it.

The published claim is that fusing saves 12 % to 18 % of it; what it says of lengths and GPUs is what is measured here.
"""

import random
import time
from collections.abc import Callable

import torch

from hf_fused_mlp.cli.results import Row, by_problem
from hf_fused_mlp.cli.shapes import Shape, build, fused_twin

CLAIM = (12.0, 18.0)  # percent of eager's time that fusing saves
TOKENS = "1,16,128,512,2048,4096,8192,16384"
NAMES = "fused,eager,compile"
ROUNDS = 10


def shape_of(hidden: int, intermediate: int | None) -> Shape:
    """A Llama MLP of these sizes, four times as wide inside unless said otherwise."""
    wide = intermediate or 4 * hidden
    return Shape(f"block-{hidden}x{wide}", "llama.LlamaMLP", hidden, wide, "silu")


@torch.no_grad()
def measure(
    shape: Shape, m: int, dtype: torch.dtype, passes: int, judge: Callable[..., dict[str, Callable]]
) -> list[Row]:
    """The rows of `passes` forward passes of `shape` at `m` tokens, one for each implementation that answers here.

    `judge` is, with the names of the implementations, `judged` of `bench`.
    """
    torch.compiler.reset()
    eager = build(shape, dtype).requires_grad_(False)
    x = torch.randn(m, shape.hidden, device=next(eager.parameters()).device, dtype=dtype)
    timings = wall_clock(judge(eager, fused_twin(eager), x, f"{shape.name}, M = {m}"), passes)
    sizes = {"shape": shape.name, "hidden": shape.hidden, "intermediate": shape.intermediate}
    common = sizes | {"dtype": str(dtype).removeprefix("torch."), "m": m}
    return [common | {"impl": name, "passes": passes} | timing for name, timing in timings.items()]


def wall_clock(calls: dict[str, Callable[[], object]], passes: int) -> dict[str, dict[str, float]]:
    """Milliseconds a pass of each call, the host's time included: of all `passes`, and of the extreme rounds.

    The passes are split into rounds in which the calls take turns in random order, since a card that gets warm slows
    down; a round before them does not count.
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
    """A line a token count, percentages being the time that fusing saves; and a line about the claim."""
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
    """Percent of the time of `over` that fused saves; negative where it takes longer. Rounded as it is shown."""
    return round(100 * (1 - ms["fused"] / ms[over]), 1)


def verdict(rows: list[Row], device: str) -> str:
    """For which token counts the claim holds, in one line."""
    low, high = CLAIM
    claimed = f"{low:.0f} % to {high:.0f} %"
    lengths: dict[str, list[str]] = {claimed: [], "more": [], "less": []}
    for (_, _, m), entries in by_problem(rows).items():
        if {"fused", "eager"} <= entries.keys():
            percent = saved({name: row["ms_per_pass"] for name, row in entries.items()}, "eager")
            group = "less" if percent < low else "more" if percent > high else claimed
            lengths[group].append(str(m))
    if not any(lengths.values()):
        return f"fused and eager were not both measured, so nothing is said about the claim of {claimed}"
    parts = [f"{group} at M = {', '.join(ms)}" if ms else f"{group} nowhere" for group, ms in lengths.items()]
    sizes = ", ".join(dict.fromkeys(f"{row['hidden']} x {row['intermediate']} {row['dtype']}" for row in rows))
    return f"On {device}, of eager's time for an MLP of {sizes}, fusing saves {'; '.join(parts)}."
