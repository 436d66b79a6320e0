"""`hf-fused-mlp audit`: where a model's time goes, and what fusing its MLPs does about it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from hf_fused_mlp.cli.console import console, fail, output
from hf_fused_mlp.cli.loading import DTYPES, load_model
from hf_fused_mlp.integrations import demo
from hf_fused_mlp.profiling.figures import PHASE_FIGURES, form_figures, shown

if TYPE_CHECKING:
    from hf_fused_mlp.profiling.report import AuditReport


def audit(
    model: Annotated[str | None, typer.Argument(help="A directory or hub id; without it, SmolLM2-135M.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="In each prompt; 512 on a GPU, 128 on a CPU.", show_default=False)
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Generated after it; 32 on a GPU, 16 on a CPU.", show_default=False)
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="How often each is timed; 5 on a GPU, 3 on a CPU.", show_default=False),
    ] = None,
    gpu_price: Annotated[float | None, typer.Option(help="Dollars an hour, for the cost of tokens.")] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in from_pretrained; the first GPU, or the CPU.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    html: Annotated[Path | None, typer.Option(dir_okay=False, help="A file for the report as a page.")] = None,
    trace: Annotated[Path | None, typer.Option(file_okay=False, help="A directory for the Chrome traces.")] = None,
) -> None:
    """Profile prefill and decode, original and fused, and say what would make them faster."""
    if gpu_price is not None and not 0 < gpu_price < math.inf:
        fail(f"gpu-price {gpu_price}: expected dollars an hour, more than 0")

    from hf_fused_mlp.profiling.audit import audit as measure
    from hf_fused_mlp.profiling.page import page

    network = load_model(model, dtype, device_map)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
    with console.status("measuring"):
        report = measure(
            network,
            batch=batch,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            gpu_price=gpu_price,
            trace=trace,
        )
    report = replace(report, model=model or demo.NAME)
    if html is not None:
        html.write_text(page(report), encoding="utf-8")
    if as_json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        print_report(report)
        for path in filter(None, (html, trace)):
            output.print(f"written: {path}", soft_wrap=True, markup=False)


def print_report(report: "AuditReport") -> None:
    document = report.to_dict()
    prompts = f"{report.batch} x {report.prompt_tokens} tokens, {report.new_tokens} new"
    output.print(f"[bold]{escape(report.model)}[/], {escape(report.device)}, {report.dtype}; {prompts}")
    for phase in document["phases"]:
        output.print(form_table(report, phase))
        output.print(phase_table(phase))
    for sentence in report.advice:
        output.print(f"- {escape(sentence)}")


def form_table(report: "AuditReport", phase: dict) -> Table:
    """A line a figure and a column a form."""
    table = Table(phase["name"], "original", "fused", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for figure in form_figures(report):
        table.add_row(figure.label, *(shown(phase[form][figure.field], figure.unit) for form in ("original", "fused")))
    return table


def phase_table(phase: dict) -> Table:
    """A line a figure, and what the prediction rests on."""
    table = Table(show_header=False)
    for figure in PHASE_FIGURES:
        outer, _, inner = figure.field.partition(".")
        value = phase[outer][inner] if inner else phase[outer]
        remark = phase["predicted"]["basis"] if outer == "predicted" else ""
        table.add_row(figure.label, shown(value, figure.unit), escape(remark))
    return table
