"""`hf-fused-mlp list`: which MLPs of a model type would be fused, and why others would not. Needs no weights."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from hf_fused_mlp.cli.console import fail, output, progress

if TYPE_CHECKING:
    from hf_fused_mlp.cli.model_types import Entry

COLORS = {"fusable": "green", "skipped": "yellow", "not built": "red"}


def list_mlps(
    model_type: Annotated[
        str | None, typer.Option(help="As in a config.json, such as llama.", show_default=False)
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="All model types of the installed Transformers; takes a minute or two.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="With --all: print docs/coverage.md instead.")
    ] = False,
) -> None:
    """List the MLPs of a model type's default model, whether they would be fused, and why not."""
    if every == (model_type is not None):
        fail("give either --model-type, such as --model-type llama, or --all")
    if as_markdown and (as_json or not every):
        fail("--markdown is a page about all model types; give it with --all, and without --json")

    import transformers

    from hf_fused_mlp.cli.coverage import coverage_page, summary
    from hf_fused_mlp.cli.model_types import MODEL_TYPES, examine

    if model_type is not None and model_type not in MODEL_TYPES:
        near = ", ".join(get_close_matches(model_type.lower(), MODEL_TYPES))
        hint = f"did you mean {near}?" if near else "--all lists those that there are"
        fail(f"Transformers {transformers.__version__} has no model type {model_type!r}; {hint}")

    names = progress(MODEL_TYPES, "building models") if model_type is None else [model_type]
    entries = [examine(name)[0] for name in names]
    if not every and entries[0].error:
        fail(f"{model_type}: {entries[0].error}")
    if as_json:
        listed = [asdict(entry) for entry in entries]
        print(json.dumps({"transformers": transformers.__version__, "model_types": listed}, indent=1))
    elif as_markdown:
        print(coverage_page(entries))
    elif every:
        output.print(table(entries))
        output.print(summary(entries))
    elif entries[0].mlps:
        output.print(table(entries))
    else:
        output.print(f"{model_type}: {entries[0].model_class} has no MLP module", markup=False)


def table(entries: "list[Entry]") -> Table:
    """One line for each class, state and reason."""
    out = Table("model type", "class", "MLPs", "state", "remark")
    out.columns[2].justify = "right"
    for column in out.columns:
        column.overflow = "fold"
    for entry in entries:
        for class_name, count, state, remark in lines(entry):
            state = f"[{COLORS[state]}]{state}[/]" if state in COLORS else state
            out.add_row(escape(entry.model_type), escape(class_name), count, state, escape(remark))
    return out


def lines(entry: "Entry") -> Iterator[tuple[str, str, str, str]]:
    if entry.error:
        yield "", "", "not built", entry.error
    elif not entry.mlps:
        yield "", "0", "no MLPs", ""
    for mlp in entry.mlps:
        yield mlp.class_name, str(mlp.count), mlp.state, mlp.reason or ""
