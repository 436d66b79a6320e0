"""The command line. Each row names a command and the module that is imported when it runs."""

from typing import Annotated

import typer

from hf_fused_mlp.cli.console import Commands
from hf_fused_mlp.cli.lazy import LazyGroup, Row
from hf_fused_mlp.version import __version__

COMMANDS = (
    Row("run", "hf_fused_mlp.cli.run:run", "Answer a prompt with the original and the fused model, and compare."),
    Row("audit", "hf_fused_mlp.cli.audit:audit", "Profile prefill and decode, and say whether to fuse."),
    Row("validate", "hf_fused_mlp.cli.validate:validate", "Compare fused MLPs with float64, and models as a whole."),
    Row("list", "hf_fused_mlp.cli.list:list_mlps", "List the MLPs of a model type, fused or not, and why not."),
    Row("tune", "hf_fused_mlp.cli.tune:tune", "Find the fastest kernels for this GPU, and keep them."),
    Row("env", "hf_fused_mlp.cli.env:env", "Print versions, GPU and plans, to paste into a bug report."),
)
BENCH = (
    Row("mlp", "hf_fused_mlp.cli.bench:mlp", "MLPs of published models: fused, eager and other packages."),
    Row("training", "hf_fused_mlp.cli.bench:training", "Forward and backward of the same MLPs, time and memory."),
    Row("block", "hf_fused_mlp.cli.bench:block", "Wall-clock time of many forward passes of one MLP."),
    Row(
        "writeup",
        "hf_fused_mlp.cli.bench:writeup",
        "Every kernel launch of the MLP that the published write-up measures.",
    ),
    Row("generate", "hf_fused_mlp.cli.bench:generate", "Time of a token in `generate` of a whole model."),
    Row(
        "wrapped", "hf_fused_mlp.cli.bench:wrapped", "Layers with LoRA, quantizers, hooks or parallelism around them."
    ),
    Row("experts", "hf_fused_mlp.cli.bench:experts", "Routed experts of published models."),
    Row("host", "hf_fused_mlp.cli.bench:host", "Host time of a module call."),
    Row("encoders", "hf_fused_mlp.cli.bench:encoders", "Eager forwards of small models, which wait for Python."),
    Row("candidates", "hf_fused_mlp.cli.bench:candidates", "Every tile configuration that the tuner may choose."),
)


class _Bench(LazyGroup):
    rows = BENCH


class _Commands(Commands, LazyGroup):
    rows = COMMANDS


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(
    typer.Typer(no_args_is_help=True),
    name="bench",
    cls=_Bench,
    help="Time fused MLPs against the originals and other packages on this GPU, in turn in one run.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hf-fused-mlp {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fused MLP kernels for Hugging Face Transformers."""
