"""How the commands print and end: results on standard output, progress and errors on standard error."""

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.progress import track
from rich.text import Text
from typer.core import TyperGroup

from hf_fused_mlp.logs import logger

# names of models and modules contain colons, which must not become emoji
output = Console(emoji=False, highlight=False)
console = Console(emoji=False, highlight=False, stderr=True)

DEBUG = "HF_FUSED_MLP_DEBUG"
# errors of Transformers, PyTorch and this package whose text was written for users
SENTENCES = (OSError, ValueError, TypeError, ImportError, RuntimeError)

T = TypeVar("T")


class Commands(TyperGroup):
    """The commands. Any error ends a command with one line, unless `DEBUG` is set in the environment.

    Problems with a model, a file or an option come from many libraries, as exceptions of any class.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        quieten()
        logger.handlers = [_Notes(logging.WARNING)]
        try:
            try:
                return super().main(*args, **kwargs)
            finally:
                _flush()  # Python flushes too, but too late for our exit code
        except BrokenPipeError:  # the reader has seen enough
            _forget_output()
            sys.exit(1)
        except Exception as error:
            if os.environ.get(DEBUG):
                raise
            _forget_output()
            print_error(in_one_line(error))
            sys.exit(2)


class _Notes(logging.Handler):
    """Prints the package's log messages on standard error, each once."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def quieten() -> None:
    """Keeps messages of other libraries about themselves off standard error, unless `DEBUG` is set.

    These are the profiler's log, warnings of optional packages that Transformers imports and, without a terminal,
    progress bars. The libraries read these settings when they are imported.
    """
    if os.environ.get(DEBUG):
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not console.is_terminal:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _forget_output() -> None:
    """Discards output that could not be written, because Python would try again at exit and report it once more."""
    try:
        _flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def in_one_line(error: Exception) -> str:
    words = " ".join(str(error).split())
    if words and isinstance(error, SENTENCES):
        return words
    return f"{type(error).__name__}: {words}; set {DEBUG}=1 to see where"


def print_error(message: str) -> None:
    console.print(Text.assemble(("error:", "bold red"), f" {message}"), soft_wrap=True)


def fail(message: str) -> NoReturn:
    """Ends the command with one line on standard error and exit code 2."""
    print_error(message)
    raise typer.Exit(2)


def require_directory(model: str) -> None:
    """Ends the command if `model` looks like a path, which no hub id does, and is not a directory."""
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        fail(f"{model}: no such directory; give the directory of a saved model, or a hub id")


def token_counts(m: str) -> list[int]:
    """Parses a comma-separated option into positive numbers; anything else ends the command."""
    counts = m.replace(" ", "").split(",")
    if not all(count.isdecimal() and len(count) < 10 and int(count) for count in counts):
        fail(f"m {m!r}: expected token counts, comma-separated, such as 1,16")
    return [int(count) for count in counts]


@cache
def note(message: str) -> None:
    """Prints a line on standard error, only the first time."""
    console.print(Text.assemble(("note:", "yellow"), f" {message}"), soft_wrap=True)


def progress(items: Sequence[T], label: str) -> Iterable[T]:
    """The items, with a progress bar on standard error if that is a terminal."""
    return track(items, label, console=console, disable=not console.is_terminal)
