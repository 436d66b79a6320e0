"""Which of a report's numbers are shown, in what order and unit; the terminal's tables and the page share this."""

from dataclasses import dataclass

from hf_fused_mlp.profiling.report import AuditReport

# what a value is multiplied by, and how it is written then; many microseconds are written as "ms" or "s"
UNITS = {
    "": (1, "{}"),
    "us": (1, "{} us"),
    "ms": (1e-3, "{} ms"),
    "s": (1e-6, "{} s"),
    "percent": (100, "{} %"),
    "gain": (1, "{}x"),
    "dollars": (1, "${}"),
}


@dataclass(frozen=True)
class Figure:
    """`field` is one of a `Form`, or of a `Phase`; `unit` a key of `UNITS`."""

    label: str
    field: str
    unit: str = ""


def form_figures(report: AuditReport) -> list[Figure]:
    """Those that at least one form of the report has."""
    launches, kernels = ("launches", "kernels") if report.on_gpu else ("operators", "operators")
    figures = (
        Figure("time of a step, median", "wall_us", "us"),
        Figure("shortest", "wall_min_us", "us"),
        Figure("longest", "wall_max_us", "us"),
        Figure("tokens per second", "tokens_per_s"),
        Figure("per 1 M tokens", "dollars_per_1m_tokens", "dollars"),
        Figure("GPU busy", "gpu_busy_share", "percent"),
        Figure("MLPs' share of the GPU's time", "mlp_gpu_share", "percent"),
        Figure("MLPs' share of the wall-clock time", "mlp_wall_share", "percent"),
        Figure("MLPs' share of the host's time", "mlp_host_share", "percent"),
        Figure(f"{launches} per call of an MLP", "launches_per_mlp"),
        Figure(f"different {kernels} in it", "kernels_per_mlp"),
    )
    forms = [form for phase in report.phases for form in (phase.original, phase.fused)]
    # on a CPU the host's time is the wall-clock time
    same = () if report.on_gpu else ("mlp_host_share",)
    return [
        figure
        for figure in figures
        if figure.field not in same and any(getattr(form, figure.field) is not None for form in forms)
    ]


PHASE_FIGURES = (
    Figure("tokens in a step", "tokens"),
    Figure("bound", "bound"),
    Figure("operations per byte of MLP weights", "flops_per_byte"),
    Figure("gain, predicted", "predicted.gain", "gain"),
    Figure("gain, measured", "measured_gain", "gain"),
    Figure("gain, if MLPs took no time", "gain_limit", "gain"),
)


def shown(value: float | str | None, unit: str = "") -> str:
    """The value of `to_dict` as people read it, every digit kept; `-` for None."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if unit == "us" and value >= 1e3:
        unit = "ms" if value < 1e6 else "s"
    scale, form = UNITS[unit]
    return form.format(f"{value * scale:,.10g}")
