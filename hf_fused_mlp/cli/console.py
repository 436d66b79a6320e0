"""Where the commands print: tables and answers on standard output, progress and errors on standard error."""

from functools import cache
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

output = Console()
console = Console(stderr=True)


def fail(message: str) -> NoReturn:
    """Ends the command with one line on standard error and exit code 2."""
    console.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(2)


def require_directory(model: str) -> None:
    """Ends the command where `model` is written like a path and is no directory: no hub id looks like that."""
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        fail(f"{model}: no such directory; give the directory of a saved model, or a hub id")


def token_counts(m: str) -> list[int]:
    """The numbers of a comma-separated option; anything but positive ones ends the command."""
    counts = m.replace(" ", "").split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        fail(f"m {m!r}: expected token counts, comma-separated, such as 1,16")
    return [int(count) for count in counts]


@cache
def note(message: str) -> None:
    """A line on standard error, the first time that it is said."""
    console.print(f"[yellow]note:[/] {escape(message)}", highlight=False, soft_wrap=True)
