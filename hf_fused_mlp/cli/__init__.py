"""The command line: `hf-fused-mlp run`, `audit`, `validate`, `list`, `tune` and `bench`."""

import typer

from hf_fused_mlp.cli.audit import audit
from hf_fused_mlp.cli.bench import bench
from hf_fused_mlp.cli.console import Commands
from hf_fused_mlp.cli.list import list_mlps
from hf_fused_mlp.cli.run import run
from hf_fused_mlp.cli.tune import tune
from hf_fused_mlp.cli.validate import validate

app = typer.Typer(
    cls=Commands,
    help="Fused MLP kernels for Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(run)
app.command()(audit)
app.command()(validate)
app.command("list")(list_mlps)
app.command()(tune)
app.command()(bench)
