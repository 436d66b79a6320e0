"""Writes the README's table and chart from the committed JSON files: ``python -m hf_fused_mlp.bench.headline``.

Each line compares one forward of a whole model, fused and original, as `bench generate` measured it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hf_fused_mlp.bench.generate import PROBLEM
from hf_fused_mlp.bench.results import Header, Row, read

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "docs/benchmarks"
EXPERTS = "h100-experts-end-to-end.json"
EXPERTS_EAGER = "h100-experts-eager.json"
DENSE = "h100-end-to-end.json"
FP8 = "h100-fp8-end-to-end.json"
# name and colour of each fused form; the colours read on white and on black
FORMS = {
    "fused": ("MLPs", "#3B82C4"),
    "fused-norms": ("MLPs + norms", "#8DB9DF"),
    "fused-fp8-mlps": ("MLPs (FP8)", "#E3B27F"),
    "fused-fp8": ("all linear layers (FP8)", "#C9803B"),
}
FP8_NOTE = (
    "Eager speedups are medians of paired rounds. "
    "FP8 rows compare FP8 weights to the original in bf16, in a run of their own."
)
WRITEUP = "h100-writeup.json"
LAYER = "h100-experts.json"
LAYER_TOKENS = 1, 16, 1024, 4096


@dataclass(frozen=True)
class Line:
    """One workload: its row in a JSON file, and the fused form that it compares."""

    file: str
    model: str
    mode: str
    phase: str
    batch: int
    prompt: int
    impl: str = "fused"

    def matches(self, row: Row) -> bool:
        return all(row[name] == getattr(self, name) for name in PROBLEM)

    @property
    def workload(self) -> str:
        """What runs, for a reader who does not know the JSON."""
        requests = "1 request" if self.batch == 1 else f"{self.batch} requests"
        what = f"prefill of {self.prompt} tokens, {requests}" if self.phase == "prefill" else f"decode, {requests}"
        return f"{what}, {'eager' if self.mode == 'eager' else 'torch.compile'}"

    @property
    def form(self) -> str:
        return FORMS[self.impl][0]


class Result(NamedTuple):
    """A line with its median times, and the speedup: from neighbouring forwards where they took turns."""

    line: Line
    original_ms: float
    fused_ms: float
    speedup: float


# gains, and rows without one, in the order of the README
LINES = (
    Line(EXPERTS, "qwen3-30b-a3b", "static-compile", "decode", 16, 128),
    Line(EXPERTS_EAGER, "qwen3-30b-a3b", "eager", "decode", 64, 128, "fused-norms"),
    Line(EXPERTS_EAGER, "qwen3-30b-a3b", "eager", "decode", 1, 128, "fused-norms"),
    Line(EXPERTS_EAGER, "qwen3-30b-a3b", "eager", "prefill", 1, 4096, "fused-norms"),
    Line(DENSE, "llama-3-8b", "eager", "decode", 1, 128, "fused-norms"),
    Line(DENSE, "llama-3-8b", "eager", "prefill", 1, 2048, "fused-norms"),
    Line(FP8, "llama-3-8b", "static-compile", "decode", 1, 128, "fused-fp8"),
    Line(FP8, "llama-3-8b", "static-compile", "decode", 1, 128, "fused-fp8-mlps"),
    Line(DENSE, "llama-3-8b", "static-compile", "decode", 1, 128),
    Line(DENSE, "llama-3-8b", "static-compile", "decode", 8, 128),
    Line(DENSE, "pythia-6.9b", "eager", "decode", 1, 128),
)
FILES = {line.file for line in LINES}


def results(folder: Path = BENCHMARKS) -> Iterator[Result]:
    """Yields the times of every line of `LINES`.

    Raises:
        KeyError: a file has no row for a line.
    """
    files = {name: read(folder / name)[1] for name in FILES}
    for line in LINES:
        rows = {row["impl"]: row for row in files[line.file] if line.matches(row)}
        original, fused = rows["original"], rows[line.impl]
        times = original["median_ms"], fused["median_ms"]
        yield Result(line, *times, fused["paired_speedup"] or times[0] / times[1])


def table(folder: Path = BENCHMARKS) -> str:
    """The README's table, with a note on FP8, and two layers compared with other implementations."""
    lines = ["| model | workload | fused part | original, ms | fused, ms | speedup |", "|---|---|---|---:|---:|---:|"]
    for result in results(folder):
        line = result.line
        times = f"{result.original_ms:.1f} | {result.fused_ms:.1f} | **{result.speedup:.2f}x**"
        lines.append(f"| {line.model} | {line.workload} | {line.form} | {times} |")
    return "\n".join((*lines, "", FP8_NOTE, one_layer_of_experts(folder), one_mlp(folder)))


def one_layer_of_experts(folder: Path = BENCHMARKS) -> str:
    """A sentence with the speedups over Transformers' `grouped_mm`."""
    us: dict[int, dict[str, float]] = {}
    for row in read(folder / LAYER)[1]:
        if (row["shape"], row["routing"]) == ("qwen3-30b-a3b", "uniform"):
            us.setdefault(row["m"], {})[row["impl"]] = row["median_us"]
    speedups = [f"{us[m]['grouped_mm'] / us[m]['fused']:.2f}x ({m})" for m in LAYER_TOKENS]
    return f"A layer of Qwen3-30B-A3B's experts alone, over `grouped_mm`, by number of tokens: {', '.join(speedups)}."


def one_mlp(folder: Path = BENCHMARKS) -> str:
    """A sentence with the times of one MLP, by implementation."""
    rows = {row["impl"]: row for row in read(folder / WRITEUP)[1]}
    us = {name: f"{row['median_us']:.0f}" for name, row in rows.items()}
    size = "{hidden} x {intermediate} takes {us} us for {m} tokens".format(us=us["fused"], **rows["fused"])
    eager, compiled, liger = (us[name] for name in ("eager", "compile", "liger"))
    return f"One dense GeGLU MLP of {size}; eager {eager} us, `torch.compile` {compiled} us, Liger {liger} us."


def device(folder: Path = BENCHMARKS) -> str:
    """The GPU and the versions of all files."""

    def system(header: Header) -> str:
        names = ("torch", "triton", "transformers")
        return ", ".join((header["device"], *(f"{name} {header[name]}" for name in names)))

    (found,) = {system(read(folder / name)[0]) for name in FILES}
    return found


def draw(file: Path, folder: Path = BENCHMARKS) -> None:
    """Draws the speedups as bars with their labels above them, so that labels are readable on a narrow screen."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    grey = "#808080"
    settings: dict[Any, Any] = {
        "svg.hashsalt": "hf-fused-mlp",
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": grey,
    }
    found = list(results(folder))[::-1]  # bars are drawn upwards
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5, 0.9 + 0.46 * len(found)), layout="constrained")
        axis = figure.subplots()
        speedups = [result.speedup for result in found]
        bars = axis.barh(range(len(found)), speedups, 0.4, color=[FORMS[result.line.impl][1] for result in found])
        axis.bar_label(bars, [f"{speedup:.2f}x" for speedup in speedups], padding=4, color=grey, fontweight="bold")
        for place, (line, *_) in enumerate(found):
            axis.annotate(f"{line.model}, {line.workload}", (0, place + 0.26), (2, 2), textcoords="offset points")
            axis.vlines(1, place - 0.28, place + 0.26, color=grey, linewidth=0.8, linestyle=":")
        axis.set_xlim(0, 1.15 * max(speedups))
        axis.set_ylim(-0.4, len(found) - 0.3)
        axis.set_yticks([])
        axis.tick_params(colors=grey)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(grey)
        forms = dict.fromkeys(FORMS[impl] for impl in FORMS if any(result.line.impl == impl for result in found))
        handles = [Patch(color=color, label=name) for name, color in forms]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle("Speedup over the original, whole models, H100", color=grey, fontsize=11)
        figure.savefig(file, metadata={"Date": None}, transparent=True)


def update(readme: Path) -> None:
    """Replaces the table between the two comments in `readme`."""
    page = readme.read_text(encoding="utf-8")
    marked = f"<!-- headline -->\n{table()}\n<!-- /headline -->"
    page = re.sub(r"<!-- headline -->.*<!-- /headline -->", lambda _: marked, page, flags=re.DOTALL)
    readme.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    draw(BENCHMARKS / "headline.svg")
    update(ROOT / "README.md")
    print(device())
