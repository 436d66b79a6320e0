"""`hf-fused-mlp validate`: compares a model with fused MLPs to the original, layer by layer."""

import json
import pydoc_data.topics
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from hf_fused_mlp.cli.console import console, fail, output, require_directory
from hf_fused_mlp.cli.loading import DTYPES, load_model, load_tokenizer
from hf_fused_mlp.integrations import demo

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_fused_mlp.numerics.report import LayerNumerics, NumericsReport

# prose and code that ship with Python
TOPICS = ("lambda", "with", "typesseq")


def validate(
    model: Annotated[str | None, typer.Argument(help="A directory or hub id; without it, SmolLM2-135M.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="The model to compare with, loaded unfused; default: the same model.")
    ] = None,
    no_reference: Annotated[
        bool, typer.Option("--no-reference", help="Load one model, and compare it with its own original form.")
    ] = False,
    text: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A text file; default: Python's help topics.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="How much of the text to use.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=0, help="The length of the greedy answers; 0 for none.")] = 32,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in from_pretrained; the first GPU, or the CPU.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Compare each fused MLP with float64, and the model with the original: exit code 0 passed, 1 failed, 2 bad usage.

    Loads two models, one of them fused, and needs memory for both. With --no-reference it loads one.
    """
    if reference is not None and no_reference:
        fail("--reference and --no-reference exclude each other; leave one out")
    if reference is not None:
        require_directory(reference)  # before the other model is loaded

    from hf_fused_mlp import numerics

    network = load_model(model, dtype, device_map, use_fused_mlp=True)
    # a reference in another dtype would round differently
    same = str(network.dtype).removeprefix("torch.")
    original = None if no_reference else load_model(reference or model, same, device_map)
    ids = encode(text, load_tokenizer(model), network, tokens)
    with console.status("validating"):
        report = numerics.validate(network, ids, reference=original, new_tokens=new_tokens)
    if as_json:
        print(json.dumps({"model": model or demo.NAME} | report.to_dict(), indent=1))
    else:
        print_report(report)
    if not report.passed:
        raise typer.Exit(1)


def encode(
    text: Path | None, tokenizer: "PreTrainedTokenizerBase", network: "PreTrainedModel", tokens: int
) -> "Tensor":
    """The first token ids of the text, limited to the positions of the model."""
    words = "".join(pydoc_data.topics.topics[topic] for topic in TOPICS) if text is None else read(text)
    positions = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    ids = tokenizer(words, return_tensors="pt")["input_ids"]
    return ids[:, : min(tokens, positions or tokens)]


def read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        fail(f"{text}: not a text in UTF-8 ({error})")


def print_report(report: "NumericsReport") -> None:
    output.print(layer_table(report))
    for line in report.summary():
        output.print(line, soft_wrap=True, markup=False)
    for line in report.warnings:
        output.print(f"[yellow]warning:[/] {escape(line)}", soft_wrap=True)
    for line in report.failures:
        output.print(f"[red]failed:[/] {escape(line)}", soft_wrap=True)
    color = "green" if report.passed else "red"
    output.print(f"[{color}]{escape(report.verdict())}[/]", soft_wrap=True)


def layer_table(report: "NumericsReport") -> Table:
    """One line per layer; if all pass, one per class and path, with the errors of the worst layer."""
    from hf_fused_mlp.numerics.report import severity

    title = f"errors over the RMS of each token's output; {report.dtype}, {escape(report.device)}"
    table = Table("MLP", "fused RMS", "original", "largest", "original", "verdict", title=title, title_justify="left")
    table.columns[0].overflow = "fold"
    for column in table.columns[1:5]:
        column.justify = "right"
    groups = report.grouped().values() if report.passed else [[layer] for layer in report.layers]
    for layers in groups:
        worst = max(layers, key=severity)
        name = worst.name if len(layers) == 1 else f"{len(layers)} x {worst.class_name}"
        verdict = "[red]failed[/]" if worst.failure else "[green]passed[/]"
        table.add_row(escape(name), *figures(worst), verdict)
    return table


def figures(layer: "LayerNumerics") -> list[str]:
    if layer.fused is None or layer.original is None:
        return ["-"] * 4
    pairs = zip(astuple(layer.fused), astuple(layer.original), strict=True)
    (largest, rms) = ([f"{value:.1e}" for value in pair] for pair in pairs)
    return rms + largest
