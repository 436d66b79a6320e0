"""Which numbers of a report to show, in what order and unit. The tables of the terminal and the page share this."""

from dataclasses import dataclass
from math import floor, log10
from typing import Any

from hf_fused_mlp.profiling.intervals import CONFIDENCE, direction
from hf_fused_mlp.profiling.report import HOST_BOUND_BELOW, AuditReport, Speedup

# a factor and a format for each unit; large numbers of microseconds are shown as "ms" or "s"
UNITS = {
    "": (1, "{}"),
    "us": (1, "{} us"),
    "ms": (1e-3, "{} ms"),
    "s": (1e-6, "{} s"),
    "percent": (100, "{} %"),
    "dollars": (1, "${}"),
}


@dataclass(frozen=True)
class Figure:
    """`field` is one of a `Form`, or of a `Phase`; `unit` a key of `UNITS`, `"gain"` or `"speedup"`.

    `digits` is the number of significant digits; None: as many as the rounds agree on.
    """

    label: str
    field: str
    unit: str = ""
    meaning: str = ""
    digits: int | None = 3


def form_figures(report: AuditReport) -> list[Figure]:
    """The figures that at least one form of the report has."""
    launches, kernels = ("kernel launches", "kernels") if report.on_gpu else ("operators", "operators")
    of_wall = "the product of the two above" if report.on_gpu else "part of a step spent in the forwards of MLPs"
    figures = (
        Figure("time of a step", "wall_us", "us", "median of the rounds, wall clock, without the profiler", None),
        Figure("shortest round", "wall_min_us", "us", digits=None),
        Figure("longest round", "wall_max_us", "us", digits=None),
        Figure("speedup", "speedup", "speedup", f"over eager in the same round, and its {CONFIDENCE:.0%} interval"),
        Figure("tokens per second", "tokens_per_s", digits=None),
        Figure(
            "per 1 M tokens", "dollars_per_1m_tokens", "dollars", "price per hour divided by tokens per hour", None
        ),
        Figure("GPU busy", "gpu_busy_share", "percent", "part of the time in which any kernel runs", 2),
        Figure(
            "MLPs' share of GPU time",
            "mlp_gpu_share",
            "percent",
            "part of the busy time taken by the kernels of MLPs",
            2,
        ),
        Figure("MLPs' share of the step", "mlp_wall_share", "percent", of_wall, 2),
        Figure("MLPs' share of host time", "mlp_host_share", "percent", "Python and PyTorch, launching kernels", 2),
        Figure(f"{launches} per MLP", "launches_per_mlp", "", "in one call, averaged over all MLPs"),
        Figure(f"different {kernels}", "kernels_per_mlp", "", "in one call of an MLP"),
    )
    forms = [form for phase in report.phases for form in phase.forms.values()]
    # on a CPU the host's time is the wall-clock time
    same = () if report.on_gpu else ("mlp_host_share",)
    return [
        figure
        for figure in figures
        if figure.field not in same and any(getattr(form, figure.field) is not None for form in forms)
    ]


BOUNDS = {
    "host-bound": f"The GPU waits for the host: it is busy less than {HOST_BOUND_BELOW:.0%} of the time, so faster "
    "kernels would only wait longer.",
    "memory-bound": "Reading weights takes longer than computing with them.",
    "compute-bound": "Computing takes longer than reading the weights.",
}


def phase_figures(report: AuditReport) -> list[Figure]:
    """The figures of a phase; speedups only if a fused form was measured."""
    tokens = Figure("tokens in a step", "tokens")
    intensity = Figure("operations per byte", "flops_per_byte", "", "of MLP weights; if low, memory is the limit", 4)
    if not any("fused" in phase.forms for phase in report.phases):
        return [tokens, intensity]
    return [
        tokens,
        intensity,
        Figure("speedup, predicted", "predicted.gain", "gain", "the MLPs' share, shortened by what tuning measured"),
        Figure("speedup, measured", "measured_gain", "gain", "of fused, without norms"),
        Figure("speedup, if MLPs took no time", "gain_limit", "gain", "no kernel for MLPs can gain more"),
    ]


def shown(value: float | str | None, unit: str = "", digits: int = 3) -> str:
    """Formats a value of `to_dict` with that many significant digits; `-` for None."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if unit == "gain":
        return f"{value:.2f}x"
    if unit == "us" and value >= 1e3:
        unit = "ms" if value < 1e6 else "s"
    scale, form = UNITS[unit]
    value *= scale
    if not unit and isinstance(value, int):
        return f"{value:,}"
    decimals = digits - 1 - floor(log10(abs(value))) if value else 0
    text = f"{round(value, decimals):,.{max(0, decimals)}f}"
    return form.format(text.rstrip("0").rstrip(".") if not unit and "." in text else text)


def agreed_digits(form: dict[str, Any]) -> int:
    """How many significant digits of a form's time its rounds agree on: two to four."""
    spread = form["wall_max_us"] - form["wall_min_us"]
    if not spread:
        return 2
    return max(2, min(4, 1 + floor(log10(form["wall_us"])) - floor(log10(spread))))


def shown_ratio(value: float, speedup: Speedup) -> str:
    """Formats one of the numbers of `speedup`, with one more decimal if the interval is narrow."""
    return f"{value:.{3 if speedup.high - speedup.low < 0.01 else 2}f}x"


def speedup_template(speedup: Speedup) -> str:
    """The words for a speedup, with `{median}`, `{low}` and `{high}` to fill in."""
    match direction(speedup):
        case "unknown":
            return "{median} (too few rounds)"
        case "the same":
            return "no measurable difference ({low} to {high})"
    return "{median} ({low} to {high})"


def shown_speedup(speedup: Speedup | None) -> str:
    """Formats a speedup as `1.12x (1.10x to 1.14x)`, or says that there is no measurable difference; `-` for None."""
    if speedup is None:
        return "-"
    ratios = {name: shown_ratio(getattr(speedup, name), speedup) for name in ("median", "low", "high")}
    return speedup_template(speedup).format(**ratios)
