"""The rows of `bench mlp` and `bench training` as Markdown tables."""

from statistics import geometric_mean

from hf_fused_mlp.bench.peers import IMPLEMENTATIONS
from hf_fused_mlp.bench.results import Row, by_problem

FEW_COLUMNS = 1, 16, 128, 1024


def speedup_table(rows: list[Row], over: str) -> str:
    """One line per shape, one column per token count: the time of `over` divided by the time of the fused MLP.

    Args:
        over: a key of `IMPLEMENTATIONS`, or `peers` for the fastest peer; bare GEMMs are not a peer.
    """
    tokens = sorted({row["m"] for row in rows})
    lines = [f"| fused over {over}, M = | {' | '.join(map(str, tokens))} |", f"|---|{'---:|' * len(tokens)}"]
    ratios: dict[tuple[str, str | None], dict[int, str]] = {}
    for (shape, dtype, m), entries in by_problem(rows).items():
        us = {name: entry["median_us"] for name, entry in entries.items()}
        other = _best_peer(us) if over == "peers" else us.get(over)
        ratios.setdefault((shape, dtype), {})[m] = _ratio(other, us.get("fused"))
    several = len({dtype for _, dtype in ratios}) > 1
    for (shape, dtype), by_tokens in ratios.items():
        name = f"{shape}, {dtype}" if several else shape
        lines.append(f"| {' | '.join((name, *(by_tokens.get(m, '-') for m in tokens)))} |")
    return "\n".join(lines)


def markdown_table(rows: list[Row]) -> str:
    """One line per problem: median microseconds of each implementation, and the speedups of the fused MLP."""
    present = {row["impl"] for row in rows}
    names = [name for name in IMPLEMENTATIONS if name in present]
    columns = ["shape", "dtype", "M", *(f"{name}, us" for name in names), "fused over eager", "fused over best peer"]
    lines = [f"| {' | '.join(columns)} |", f"|---|---|{'---:|' * (len(columns) - 2)}"]
    for problem, entries in by_problem(rows).items():
        us = {name: entry["median_us"] for name, entry in entries.items()}
        cells = [f"{us[name]:.1f}" if name in us else "-" for name in names]
        cells += [_ratio(us.get("eager"), us.get("fused")), _ratio(_best_peer(us), us.get("fused"))]
        lines.append(f"| {' | '.join(map(str, (*problem, *cells)))} |")
    return "\n".join(lines)


def lowest_table(rows: list[Row]) -> str:
    """One line a shape: the time of eager divided by the time of the fused MLP, over all its token counts.

    The geometric mean, the lowest and where it is, and a few token counts; the last line is of all points.
    """
    ratios: dict[tuple[str, str | None], dict[int, float]] = {}
    for (shape, dtype, m), entries in by_problem(rows).items():
        if {"eager", "fused"} <= entries.keys():
            ratio = entries["eager"]["median_us"] / entries["fused"]["median_us"]
            ratios.setdefault((shape, dtype), {})[m] = ratio
    if not ratios:
        return ""
    tokens = [m for m in FEW_COLUMNS if all(m in by_tokens for by_tokens in ratios.values())]
    several = len({dtype for _, dtype in ratios}) > 1
    lines = [
        f"| {' | '.join(('fused over eager', 'mean', 'lowest', *(f'M = {m}' for m in tokens)))} |",
        f"|---|---:|---:|{'---:|' * len(tokens)}",
    ]
    for (shape, dtype), by_tokens in ratios.items():
        lowest = min(by_tokens, key=lambda m: by_tokens[m])
        cells = [f"{geometric_mean(by_tokens.values()):.2f}x", f"{by_tokens[lowest]:.2f}x at {lowest}"]
        cells += [f"{by_tokens[m]:.2f}x" for m in tokens]
        lines.append(f"| {f'{shape}, {dtype}' if several else shape} | {' | '.join(cells)} |")
    points = [ratio for by_tokens in ratios.values() for ratio in by_tokens.values()]
    below = ", ".join(f"{sum(ratio < limit for ratio in points)} below {limit:.2f}x" for limit in (1.0, 0.98))
    cells = [f"**{len(points)} points: {below}**", f"{geometric_mean(points):.2f}x", f"{min(points):.2f}x"]
    return "\n".join([*lines, f"| {' | '.join([*cells, *('' for _ in tokens)])} |"])


def _best_peer(us: dict[str, float]) -> float | None:
    return min((us[name] for name, row in IMPLEMENTATIONS.items() if row.role == "peer" and name in us), default=None)


def _ratio(other: float | None, fused: float | None) -> str:
    return f"{other / fused:.2f}x" if other and fused else "-"
