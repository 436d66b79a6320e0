"""Commands that are imported when they run, so that `--help` of a group needs neither PyTorch nor Transformers."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup


@dataclass(frozen=True)
class Row:
    """One command: its name, the `module:function` that implements it, and its line in the group's help."""

    name: str
    target: str
    help: str


class LazyCommand(TyperCommand):
    """A placeholder that imports the command of a row when it is run, or when its help is printed."""

    def __init__(self, row: Row):
        super().__init__(name=row.name, help=row.help)
        self.target = row.target

    def load(self) -> Any:
        """Imports the command.

        Raises:
            ImportError: the command needs a package that is not installed.
        """
        module, _, function = self.target.partition(":")
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(self.name)(getattr(import_module(module), function))
        return typer.main.get_command(app)

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        return self.load().make_context(*args, **kwargs)


class LazyGroup(TyperGroup):
    """A group with a lazy command for each of `rows`, listed before its other commands."""

    rows: ClassVar[tuple[Row, ...]] = ()

    def __init__(self, **attributes: Any):
        super().__init__(**attributes)
        self.commands = {row.name: LazyCommand(row) for row in self.rows} | dict(self.commands)
