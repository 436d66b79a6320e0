"""SVG plots of the `bench` results, one panel per shape or phase. The same JSON gives the same bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_fused_mlp.bench.generate import PHASES, pairs
from hf_fused_mlp.bench.results import Header, Row, by_problem

COLUMNS = 3
GREY = "#808080"  # reads on white and on black
RATIOS = (0.5, 0.75, 1, 1.2, 1.5, 2, 3, 5, 10)  # ticks of a logarithmic axis
# Okabe and Ito's colour-blind safe palette; markers differ too
STYLES: dict[str, dict[str, Any]] = {
    "fused": {"color": "#0072B2", "marker": "o", "linewidth": 2.2, "zorder": 4},
    "eager": {"color": GREY, "marker": "x"},
    "compile": {"color": "#E69F00", "marker": "s"},
    "compile-max-autotune": {"color": "#D55E00", "marker": "D"},
    "liger": {"color": "#009E73", "marker": "^"},
    "liger-mlp": {"color": "#56B4E9", "marker": "v"},
    "quack": {"color": "#CC79A7", "marker": "P"},
    "packed-gemm": {"color": "#7A5C00", "marker": "d"},
    "two-gemms": {"color": GREY, "linestyle": "--"},
    "batch-invariant": {"color": "#0072B2", "marker": "*", "linestyle": "-."},
    "fp8": {"color": "#0072B2", "marker": "o", "linestyle": ":"},
    "torchao-fp8": {"color": "#56B4E9", "marker": "<", "linestyle": ":"},
}
FORMS = {  # of whole models
    "fused": "#0072B2",
    "fused-norms": "#56B4E9",
    "fused-fp8-mlps": "#E69F00",
    "fused-fp8": "#D55E00",
}
REFERENCE: dict[str, Any] = {"color": GREY, "linewidth": 0.8, "linestyle": ":"}
# (shape, dtype) -> implementation -> points
Panels = dict[tuple[str, str | None], dict[str, list[tuple[int, float]]]]


@dataclass(frozen=True)
class Plot:
    """One SVG file: `value(row, eager_row)` over M, for `lowest <= M <= highest`.

    `reference` is a horizontal line: its name, and a function from the header to its height.
    """

    name: str
    title: str
    label: str
    value: Callable[[Row, Row | None], float | None]
    lowest: int = 1
    highest: int = 1 << 62
    reference: tuple[str, Callable[[Header], float]] | None = None
    from_zero: bool = True  # else a logarithmic axis, for ratios


def speedup(row: Row, eager: Row | None) -> float | None:
    """Speedup over eager; None for eager itself, which is the reference line."""
    return eager["median_us"] / row["median_us"] if eager and row is not eager else None


def weight_tbps(row: Row, eager: Row | None) -> float:
    """Terabytes of weights read a second, each weight counted once."""
    return _weights(row) * getattr(torch, row["dtype"]).itemsize / row["median_us"] / 1e6


def tflops(row: Row, eager: Row | None) -> float:
    """Teraflops a second of the GEMMs."""
    return 2 * row["m"] * _weights(row) / row["median_us"] / 1e6


def _weights(row: Row) -> int:
    return (2 if row["kind"] == "plain" else 3) * row["hidden"] * row["intermediate"]


PLOTS = (
    Plot(
        "speedup", "Speed over eager", "times eager", speedup, reference=("eager", lambda header: 1), from_zero=False
    ),
    Plot(
        "decode",
        "Few tokens: weights read a second",
        "TB/s",
        weight_tbps,
        highest=64,
        reference=("a large copy", lambda header: header["copy_tbps"]),
    ),
    Plot("prefill", "Many tokens: arithmetic a second", "TFLOP/s", tflops, lowest=512),
)


def draw(folder: Path, header: Header, rows: list[Row]) -> list[Path]:
    """Draws every plot that `rows` have data for into `folder` and returns the files.

    Raises:
        OSError: the folder cannot be written to.
    """
    colors = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = {"svg.hashsalt": "hf-fused-mlp", "font.family": "DejaVu Sans", "font.size": 9}
    settings |= dict.fromkeys(colors, GREY)
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(settings):
        if header.get("timed") == "end-to-end":
            figures = {"end-to-end": _models(header, rows)}
        else:
            panels = {plot: _panels(plot, rows) for plot in PLOTS}
            figures = {plot.name: _figure(plot, header, found) for plot, found in panels.items() if found}
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, transparent=True)
    return [folder / f"{name}.svg" for name in figures]


def _panels(plot: Plot, rows: list[Row]) -> Panels:
    panels: Panels = {}
    for (shape, dtype, m), entries in by_problem(rows).items():
        for name in STYLES if plot.lowest <= m <= plot.highest else ():
            value = plot.value(entries[name], entries.get("eager")) if name in entries else None
            if value is not None:
                panels.setdefault((shape, dtype), {}).setdefault(name, []).append((m, value))
    return panels


def _figure(plot: Plot, header: Header, panels: Panels) -> Figure:
    lines = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(3.3 * COLUMNS, 1.1 + 2.2 * lines), layout="constrained")
    axes = list(figure.subplots(lines, COLUMNS, sharex=True, sharey=True, squeeze=False).flat)
    artists: dict[str, Artist] = {}
    for index, ((shape, dtype), series) in enumerate(panels.items()):
        axis = axes[index]
        if plot.reference is not None:
            name, height = plot.reference
            artists[name] = axis.axhline(height(header), **REFERENCE)
        for name, points in series.items():
            style: dict[str, Any] = {"linewidth": 1.2, "markersize": 3.5} | STYLES[name]
            (artists[name],) = axis.plot(*zip(*sorted(points), strict=True), **style)
        axis.set_title(f"{shape}, {dtype}", fontsize=9)
        axis.set_ylabel(plot.label if index % COLUMNS == 0 else "")
        axis.set_xlabel("tokens, M" if index + COLUMNS >= len(panels) else "")
    _scale(axes[0], plot, sorted({m for series in panels.values() for points in series.values() for m, _ in points}))
    for index, axis in enumerate(axes):
        axis.grid(color=GREY, alpha=0.3, linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelbottom=index + COLUMNS >= len(panels))
        axis.set_visible(index < len(panels))
    figure.suptitle(f"{plot.title} ({header['device']})", fontweight="bold")
    names = [name for name in dict.fromkeys((*STYLES, *artists)) if name in artists]
    figure.legend([artists[name] for name in names], names, loc="outside lower center", ncols=5, frameon=False)
    return figure


def _models(header: Header, rows: list[Row]) -> Figure:
    """One panel per phase, one bar per workload: the speedup of fused, and how busy the GPU was."""
    forms = list(pairs(rows))[::-1]  # bars are drawn upwards
    figure = Figure(figsize=(3.3 * COLUMNS, 1.2 + 0.15 * len(forms)), layout="constrained")
    for axis, phase in zip(figure.subplots(1, len(PHASES), sharex=True, sharey=True), PHASES, strict=True):
        found = [(*problem, original, fused) for problem, original, fused in forms if problem[2] == phase]
        names, gains, busy = [], [], []
        for model, mode, _, batch, prompt, original, fused in found:
            names.append(f"{model}, {mode}, {batch} x {prompt}: {fused['impl']}")
            gains.append(original["median_ms"] / fused["median_ms"])
            busy.append(f"{gains[-1]:.2f}x, GPU {original['gpu_busy']:.0%}")
        bars = axis.barh(names, gains, color=[FORMS[fused["impl"]] for *_, fused in found])
        axis.bar_label(bars, busy, padding=3, fontsize=8)
        axis.axvline(1, **REFERENCE)
        axis.set_xlim(0, 1.6 * max(gains, default=1))
        axis.set_title(phase, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"generate, fused over original ({header['device']})", fontweight="bold")
    return figure


def _scale(axis: Axes, plot: Plot, tokens: list[int]) -> None:
    """Sets the scales that all panels share."""
    axis.set_xscale("log", base=2)
    every = -(-len(tokens) // 8)
    axis.set_xticks(tokens[::every], [f"{m // 1024}k" if m >= 1024 else str(m) for m in tokens[::every]])
    axis.minorticks_off()
    if plot.from_zero:
        axis.set_ylim(bottom=0)
    else:
        axis.set_yscale("log")
        ticks = [tick for tick in RATIOS if axis.get_ylim()[0] <= tick <= axis.get_ylim()[1]]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
