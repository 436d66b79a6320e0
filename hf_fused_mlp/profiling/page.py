"""A report as one self-contained HTML page, without scripts or network."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hf_fused_mlp.profiling.figures import (
    BOUNDS,
    agreed_digits,
    form_figures,
    phase_figures,
    shown,
    shown_ratio,
    speedup_template,
)
from hf_fused_mlp.profiling.report import LABELS, AuditReport, Speedup

# for each part of a step, its class in the style sheet
PARTS = {"MLPs": "mlps", "everything else": "rest", "the GPU waits": "waits"}
RATIOS = ("median", "low", "high")  # for a speedup


def page(report: AuditReport) -> str:
    """Renders the page. It contains `to_dict`, and each number on it names its place there."""
    document = report.to_dict()

    def data(path: str, text: str) -> Markup:
        return Markup('<data value="{}" data-path="{}">{}</data>').format(_at(document, path), path, text)

    def number(path: str, unit: str = "", digits: int | None = 3) -> Markup:
        value = _at(document, path)
        if value is None:
            return Markup("-")
        if unit == "speedup":
            speedup = Speedup(**value)
            ratios = {name: data(f"{path}.{name}", shown_ratio(value[name], speedup)) for name in RATIOS}
            return Markup(speedup_template(speedup)).format(**ratios)
        # the rounds of a form say how many digits are meaningful
        digits = agreed_digits(_at(document, path.rpartition(".")[0])) if digits is None else digits
        return data(path, shown(value, unit, digits))

    environment = Environment(
        loader=PackageLoader("hf_fused_mlp.profiling", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("page.html.jinja").render(
        report=document,
        number=number,
        shown=shown,
        bars=bars,
        labels=LABELS,
        classes=PARTS,
        bounds=BOUNDS,
        form_figures=form_figures(report),
        phase_figures=phase_figures(report),
    )


def bars(phase: dict[str, Any]) -> dict[str, list[tuple[str, float, float]]]:
    """For each form the parts of its step: name, microseconds, and percent of the longest step."""
    forms = {name: phase[name] for name in LABELS if phase[name] is not None}
    longest = max(form["wall_us"] for form in forms.values())
    drawn = {}
    for name, form in forms.items():
        busy = 1.0 if form["gpu_busy_share"] is None else form["gpu_busy_share"]
        shares = form["mlp_wall_share"], busy - form["mlp_wall_share"], 1 - busy
        times = [max(0.0, share) * form["wall_us"] for share in shares]
        drawn[name] = [(part, us, 100 * us / longest) for part, us in zip(PARTS, times, strict=True) if us]
    return drawn


def _at(document: Any, path: str) -> Any:
    for key in path.split("."):
        document = document[int(key) if isinstance(document, list) else key]
    return document
