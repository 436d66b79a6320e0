"""The rows of `bench mlp` and `bench training` as Markdown tables."""

from hf_fused_mlp.bench.peers import IMPLEMENTATIONS
from hf_fused_mlp.bench.results import Row, by_problem


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


def _best_peer(us: dict[str, float]) -> float | None:
    return min((us[name] for name, row in IMPLEMENTATIONS.items() if row.role == "peer" and name in us), default=None)


def _ratio(other: float | None, fused: float | None) -> str:
    return f"{other / fused:.2f}x" if other and fused else "-"
