"""The table and the chart of the README, from the committed JSON files: ``python -m hf_fused_mlp.bench.headline``.

Each line is the time of one forward of a whole model, fused over original, as `bench generate` measured it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hf_fused_mlp.bench.generate import PROBLEM
from hf_fused_mlp.bench.results import Header, Row, read

BENCHMARKS = Path(__file__).parents[2] / "docs/benchmarks"
EXPERTS = "h100-experts-end-to-end.json"
DENSE = "h100-end-to-end.json"


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

    def matches(self, row: Row, impl: str) -> bool:
        return row["impl"] == impl and all(row[name] == getattr(self, name) for name in PROBLEM)

    @property
    def workload(self) -> str:
        """What runs, for a reader who does not know the JSON."""
        requests = "1 request" if self.batch == 1 else f"{self.batch} requests"
        what = f"prefill of {self.prompt} tokens, {requests}" if self.phase == "prefill" else f"decode, {requests}"
        return f"{what}, {'eager' if self.mode == 'eager' else 'torch.compile'}"

    @property
    def form(self) -> str:
        return "MLPs + norms" if self.impl == "fused-norms" else "MLPs"


class Result(NamedTuple):
    """A line with its medians in milliseconds, and the speedup: of pairs of neighbours where there are any."""

    line: Line
    original_ms: float
    fused_ms: float
    speedup: float


# gains and their absence, in the order of the README
LINES = (
    Line(EXPERTS, "qwen3-30b-a3b", "static-compile", "decode", 16, 128),
    Line(EXPERTS, "qwen3-30b-a3b", "eager", "decode", 1, 128, "fused-norms"),
    Line(EXPERTS, "qwen3-30b-a3b", "eager", "prefill", 16, 128),
    Line(DENSE, "llama-3-8b", "eager", "decode", 1, 128, "fused-norms"),
    Line(DENSE, "llama-3-8b", "eager", "prefill", 1, 2048, "fused-norms"),
    Line(DENSE, "llama-3-8b", "static-compile", "decode", 1, 128),
    Line(DENSE, "llama-3-8b", "static-compile", "decode", 8, 128),
    Line(DENSE, "pythia-6.9b", "eager", "decode", 1, 128),
)


def results(folder: Path = BENCHMARKS) -> Iterator[Result]:
    """Every line of `LINES` with its times."""
    files = {name: read(folder / name)[1] for name in (EXPERTS, DENSE)}
    for line in LINES:
        original, fused = (
            next(row for row in files[line.file] if line.matches(row, impl)) for impl in ("original", line.impl)
        )
        times = original["median_ms"], fused["median_ms"]
        yield Result(line, *times, fused["paired_speedup"] or times[0] / times[1])


def table(folder: Path = BENCHMARKS) -> str:
    """The README's table."""
    lines = ["| model | workload | fused | original, ms | fused, ms | speedup |", "|---|---|---|---:|---:|---:|"]
    for result in results(folder):
        line = result.line
        times = f"{result.original_ms:.1f} | {result.fused_ms:.1f} | **{result.speedup:.2f}x**"
        lines.append(f"| {line.model} | {line.workload} | {line.form} | {times} |")
    return "\n".join(lines)


def device(folder: Path = BENCHMARKS) -> str:
    """What both files were measured on."""

    def system(header: Header) -> str:
        names = ("torch", "triton", "transformers")
        return ", ".join((header["device"], *(f"{name} {header[name]}" for name in names)))

    (found,) = {system(read(folder / name)[0]) for name in (EXPERTS, DENSE)}
    return found


def draw(file: Path, folder: Path = BENCHMARKS) -> None:
    """Bars of the same speedups, on no background, in greys and blues that read on white and on black."""
    import matplotlib
    from matplotlib.figure import Figure

    grey, blue, light = "#808080", "#3B82C4", "#8DB9DF"
    settings: dict[Any, Any] = {
        "svg.hashsalt": "hf-fused-mlp",
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": grey,
    }
    found = list(results(folder))[::-1]  # bars are drawn upwards
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        axis = figure.subplots()
        names = [f"{result.line.model}: {result.line.workload}" for result in found]
        colors = [light if result.line.impl == "fused-norms" else blue for result in found]
        bars = axis.barh(names, [result.speedup for result in found], color=colors)
        axis.bar_label(bars, [f"{result.speedup:.2f}x  {result.line.form}" for result in found], padding=3, color=grey)
        axis.axvline(1, color=grey, linewidth=0.8, linestyle=":")
        axis.set_xlim(0, 1.4 * max(result.speedup for result in found))
        axis.tick_params(colors=grey)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(grey)
        figure.suptitle("Speedup over the original, whole models on an H100, bf16", color=grey, fontsize=10)
        figure.savefig(file, metadata={"Date": None}, transparent=True)


if __name__ == "__main__":
    draw(BENCHMARKS / "headline.svg")
    print(table())
    print(device())
