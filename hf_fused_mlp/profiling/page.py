"""A report as one HTML page that needs nothing else: no script, no network."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hf_fused_mlp.profiling.figures import PHASE_FIGURES, form_figures, shown
from hf_fused_mlp.profiling.report import AuditReport

BAR_WIDTH = 640
# Okabe and Ito's colours, which the colour-blind tell apart
PARTS = {"MLPs": "#0072B2", "everything else": "#E69F00", "the GPU waits": "#DDDDDD"}


def page(report: AuditReport) -> str:
    """The page. Its numbers are those of `to_dict`, which it holds too, and each says where it is found there."""
    document = report.to_dict()

    def number(path: str, unit: str = "") -> Markup:
        value = _at(document, path)
        if value is None:
            return Markup("-")
        return Markup('<data value="{}" data-path="{}">{}</data>').format(value, path, shown(value, unit))

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
        bars=bars,
        colors=PARTS,
        width=BAR_WIDTH,
        form_figures=form_figures(report),
        phase_figures=PHASE_FIGURES,
    )


def bars(phase: dict[str, Any]) -> dict[str, list[tuple[str, float, float]]]:
    """For each form the parts of its step: name, left edge and width, the longer step as wide as the plot."""
    forms = {name: phase[name] for name in ("original", "fused")}
    scale = BAR_WIDTH / max(form["wall_us"] for form in forms.values())
    drawn = {}
    for name, form in forms.items():
        busy = 1.0 if form["gpu_busy_share"] is None else form["gpu_busy_share"]
        shares = form["mlp_wall_share"], busy - form["mlp_wall_share"], 1 - busy
        widths = [max(0.0, share) * form["wall_us"] * scale for share in shares]
        drawn[name] = [(part, sum(widths[:i]), widths[i]) for i, part in enumerate(PARTS) if widths[i]]
    return drawn


def _at(document: Any, path: str) -> Any:
    for key in path.split("."):
        document = document[int(key) if isinstance(document, list) else key]
    return document
