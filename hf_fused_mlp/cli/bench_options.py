"""What the `hf-fused-mlp bench` commands share: their options, and where their rows come from."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_fused_mlp.bench.names import DEFAULT, IMPLEMENTATIONS
from hf_fused_mlp.cli.console import fail

if TYPE_CHECKING:
    import torch

    from hf_fused_mlp.bench.results import Header, Row

TOKENS = "1,16,512,4096"
SHAPE_NAMES = "llama-3-8b,pythia-6.9b"

Shapes = Annotated[str, typer.Option(help="Shapes, comma-separated, or 'all'.")]
Tokens = Annotated[str, typer.Option(help="Token counts M, comma-separated.")]
Dtype = Annotated[str, typer.Option(help="bfloat16 or float16.")]
Impl = Annotated[
    str | None,
    typer.Option(
        help=f"Implementations, comma-separated, or 'all': {', '.join(IMPLEMENTATIONS)}. Packages that are not "
        f"installed are left out. Default: {','.join(DEFAULT)}; with --table, all in the file.",
        show_default=False,
    ),
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", dir_okay=False, help="A file for the rows; rows of other problems of the same system stay in it."
    ),
]
Table = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Measure nothing; print rows of an earlier run's JSON."),
]
Plot = Annotated[
    Path | None,
    typer.Option(file_okay=False, help="A directory for SVG plots of all rows of the JSON, or else of this run."),
]


def measured(
    timed: str,
    batches: "Iterable[list[Row]]",
    json_file: Path | None,
    table: Path | None,
    packages: Iterable[str] = (),
    by: tuple[str, ...] | None = None,
    wanted: "Callable[[Row], bool]" = lambda row: True,
) -> "tuple[Header, list[Row], list[Row]]":
    """The header, all rows of the file, and the rows to print: those of this run, or the `wanted` ones of `table`."""
    import torch

    from hf_fused_mlp.bench import results
    from hf_fused_mlp.bench.measuring import collect

    if table is not None:
        header, kept = results.read(table, timed)
        return header, kept, [row for row in kept if wanted(row)]
    if not torch.cuda.is_available():
        command = results.COMMANDS[timed]
        fail(f"bench needs a CUDA GPU, and PyTorch finds none; `bench {command} --table FILE` prints an earlier run")
    return collect(timed, batches, json_file, packages, by)


def dtype_of(name: str) -> "torch.dtype":
    """The dtype of `--dtype`; any other name ends the command."""
    import torch

    if name not in ("bfloat16", "float16"):
        fail(f"dtype {name!r}: expected bfloat16 or float16")
    return getattr(torch, name)


def plotter(folder: Path | None) -> "Callable[[Header, list[Row]], object]":
    """A function that draws a header and rows into `folder`, or does nothing without one."""
    if folder is None:
        return lambda header, rows: None
    try:
        from hf_fused_mlp.bench.plots import draw
    except ImportError as error:
        fail(f"--plot needs matplotlib ({error}); pip install 'hf-fused-mlp[bench]'")
    return partial(draw, folder)
