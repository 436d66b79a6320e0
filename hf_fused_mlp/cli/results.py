"""The JSON file of `bench`: what was measured, on what, and how a later run adds to it."""

import json
from pathlib import Path
from typing import Any

from hf_fused_mlp.cli.console import fail
from hf_fused_mlp.cli.shapes import SHAPES
from hf_fused_mlp.files import replace_file

Row = dict[str, Any]
Header = dict[str, Any]
Problem = tuple[str, str | None, int]

SAME = ("timed", "device", "torch", "triton", "transformers", "kernels")


def problem_of(row: Row) -> Problem:
    """What a row is a measurement of; ratios hold between rows of one problem, which are measured in one run."""
    return row["shape"], row.get("dtype"), row["m"]


def by_problem(rows: list[Row]) -> dict[Problem, dict[str, Row]]:
    """For each problem, its rows by implementation."""
    problems: dict[Problem, dict[str, Row]] = {}
    for row in rows:
        problems.setdefault(problem_of(row), {})[row["impl"]] = row
    return problems


def read(file: Path) -> tuple[Header, list[Row]]:
    """The header and the rows of `file`; what is no such file ends the command."""
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
        rows = header.pop("rows")
        if not all(isinstance(row, dict) for row in rows):
            raise TypeError("rows")
        return header, rows
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{file}: not what `bench --json` writes ({error!r}); name another file")


def resume(file: Path, header: Header) -> tuple[Header, list[Row]]:
    """The header of a run that adds to `file`, and the rows there; what it cannot be added to ends the command."""
    if not file.exists():
        return header, []
    earlier, rows = read(file)
    packages, earlier_packages = header.get("peers", {}), earlier.get("peers", {})
    pairs = {name: (earlier.get(name), header[name]) for name in SAME}
    pairs |= {name: (earlier_packages[name], packages[name]) for name in packages.keys() & earlier_packages.keys()}
    if differing := [f"{name} {there}, here {here}" for name, (there, here) in pairs.items() if there != here]:
        fail(f"{file} was measured otherwise: {'; '.join(differing)}. Remove it or name another file")
    return header | {"peers": earlier_packages | packages}, rows


def merged(rows: list[Row], measured: list[Row]) -> list[Row]:
    """`rows` with those of every problem that was `measured` replaced, all at once, in the order of `SHAPES`."""
    replaced = {problem_of(row) for row in measured}
    order = {name: index for index, name in enumerate(SHAPES)}

    def place(row: Row) -> tuple[int, str, int]:
        shape, dtype, m = problem_of(row)
        return order.get(shape, len(order)), dtype or "", m

    return sorted([row for row in rows if problem_of(row) not in replaced] + measured, key=place)


def replaced(rows: list[Row], measured: list[Row], by: tuple[str, ...]) -> list[Row]:
    """`rows` but for those of what was `measured`, which follow; `by` are the fields that say what that is."""
    new = {tuple(row[name] for name in by) for row in measured}
    return [row for row in rows if tuple(row[name] for name in by) not in new] + measured


def write(file: Path, header: Header, rows: list[Row]) -> None:
    """Writes `file` in one step, so that an interrupted run leaves the last whole one."""
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, f'{json.dumps(header)[:-1]}, "rows": [\n  {lines}\n]}}\n')
