"""Measurements as Markdown tables."""

from hf_fused_mlp.cli.peers import IMPLEMENTATIONS
from hf_fused_mlp.cli.results import Row, by_problem


def speedup_table(rows: list[Row], over: str) -> str:
    """A line a shape and a column a token count: how many times faster fused is than the implementation `over`.

    `peers` stands for the fastest whole MLP of another make; bare GEMMs are none.
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
    """A line a problem: median microseconds of each implementation, and how much faster fused is."""
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


def candidates_table(rows: list[Row]) -> str:
    """For each launch, PyTorch's time and the three fastest configurations of ours."""
    launches: dict[tuple, list[Row]] = {}
    for entry in rows:
        launches.setdefault((entry["shape"], entry["m"], entry["launch"]), []).append(entry)
    lines = ["| shape | M | launch | PyTorch, us | fastest of ours: M x N x K tile, us |", "|---|---:|---|---:|---|"]
    for launch, entries in launches.items():
        library = next(entry["median_us"] for entry in entries if entry["kernel"] == "torch")
        ours = [entry for entry in entries if entry["kernel"] != "torch"][:3]
        fastest = "; ".join(f"{describe(entry)}: {entry['median_us']:.1f}" for entry in ours)
        lines.append(f"| {' | '.join(map(str, launch))} | {library:.1f} | {fastest} |")
    return "\n".join(lines)


def describe(config: Row) -> str:
    tile = "x".join(str(config[name]) for name in ("block_m", "block_n", "block_k"))
    return f"{config['kernel']} {tile}, {config['num_warps']} warps, {config['num_stages']} stages"
