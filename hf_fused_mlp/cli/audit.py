"""`hf-fused-mlp audit`: where a model's time goes, and whether fusing its MLPs is worth it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hf_fused_mlp.cli.console import console, fail, output
from hf_fused_mlp.cli.loading import DTYPES, load_model
from hf_fused_mlp.integrations import demo
from hf_fused_mlp.profiling.figures import agreed_digits, form_figures, phase_figures, shown, shown_speedup
from hf_fused_mlp.profiling.report import LABELS, AuditReport, Phase


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
        typer.Option(min=1, help="How often to time each form; 9 on a GPU, 3 on a CPU.", show_default=False),
    ] = None,
    gpu_price: Annotated[
        float | None, typer.Option(help="Dollars per hour, for the cost of a million tokens.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in from_pretrained; the first GPU, or the CPU.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    html: Annotated[Path | None, typer.Option(dir_okay=False, help="A file for the report as an HTML page.")] = None,
    trace: Annotated[Path | None, typer.Option(file_okay=False, help="A directory for the Chrome traces.")] = None,
) -> None:
    """Profile prefill and decode, and say whether to fuse."""
    if gpu_price is not None and not 0 < gpu_price < math.inf:
        fail(f"gpu-price {gpu_price}: expected dollars per hour, more than 0")

    from hf_fused_mlp.profiling.audit import audit as measure
    from hf_fused_mlp.profiling.page import page

    network = load_model(model, dtype, device_map)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
    with progress() as bar:
        task = bar.add_task("", total=1.0)
        report = measure(
            network,
            batch=batch,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            gpu_price=gpu_price,
            trace=trace,
            progress=lambda step, done: bar.update(task, description=step, completed=done),
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


def progress() -> Progress:
    """A progress bar with the name of the step, in a terminal only."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def print_report(report: AuditReport) -> None:
    document = report.to_dict()
    prompts = f"{report.batch} x {report.prompt_tokens} tokens, {report.new_tokens} new"
    output.print(f"[bold]{escape(report.model)}[/], {escape(report.device)}, {report.dtype}; {prompts}\n")
    verdict = report.verdict
    output.print(f"[bold]{escape(verdict.headline)}[/]")
    if verdict.speedup is not None:
        output.print(f"A whole request: {shown_speedup(verdict.speedup)}")
    output.print(f"{escape(verdict.reason)}\n")
    for phase, values in zip(report.phases, document["phases"], strict=True):
        output.print(form_table(report, phase, values))
        output.print(phase_table(report, values))
    if report.advice:
        output.print("\nWhat would help more:")
    for sentence in report.advice:
        output.print(f"- {escape(sentence)}")


def form_table(report: AuditReport, phase: Phase, values: dict) -> Table:
    """One line per figure and one column per form; `values` is `phase` of the document."""
    table = Table(phase.name, *(LABELS[form] for form in phase.forms), title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for figure in form_figures(report):
        cells = []
        for name, form in phase.forms.items():
            if figure.unit == "speedup":
                cells.append(shown_speedup(form.speedup))
            else:
                digits = figure.digits or agreed_digits(values[name])
                cells.append(shown(values[name][figure.field], figure.unit, digits))
        table.add_row(figure.label, *cells)
    return table


def phase_table(report: AuditReport, phase: dict) -> Table:
    """One line per figure, and the basis of the prediction."""
    table = Table(show_header=False)
    table.add_row("bound", phase["bound"], "")
    for figure in phase_figures(report):
        outer, _, inner = figure.field.partition(".")
        value = phase[outer][inner] if inner else phase[outer]
        remark = phase["predicted"]["basis"] if outer == "predicted" else ""
        table.add_row(figure.label, shown(value, figure.unit, figure.digits or 3), escape(remark))
    return table
