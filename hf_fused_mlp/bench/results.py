"""The JSON files of the `bench` commands: a header that says what was measured on what system, and rows."""

import json
from pathlib import Path
from typing import Any

from hf_fused_mlp.bench.shapes import SHAPES
from hf_fused_mlp.files import replace_file

Row = dict[str, Any]
Header = dict[str, Any]
Problem = tuple[str, str | None, int]

# header fields that must be equal before a run may add its rows to a file
SAME = ("timed", "device", "torch", "triton", "transformers", "kernels")
# the header's "timed" and the command that measures and prints such files
COMMANDS = {
    "forward": "mlp",
    "forward-by-rule": "mlp",
    "candidates": "candidates",
    "block": "block",
    "training": "training",
    "host": "host",
    "encoders": "encoders",
    "end-to-end": "generate",
    "wrapped": "wrapped",
    "experts": "experts",
    "writeup": "writeup",
}


def problem_of(row: Row) -> Problem:
    """The shape, dtype and M of a row. Rows of one problem come from one run, so their ratios are meaningful."""
    return row["shape"], row.get("dtype"), row["m"]


def by_problem(rows: list[Row]) -> dict[Problem, dict[str, Row]]:
    """Groups rows by problem, and within a problem by implementation."""
    problems: dict[Problem, dict[str, Row]] = {}
    for row in rows:
        problems.setdefault(problem_of(row), {})[row["impl"]] = row
    return problems


def read(file: Path, timed: str | None = None) -> tuple[Header, list[Row]]:
    """Reads the header and the rows of `file`.

    Args:
        file: a file that a `bench` command wrote with `--json`.
        timed: the measurement that the file must hold, a key of `COMMANDS`; None accepts any.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file, or holds another measurement.
    """
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
        rows = header.pop("rows")
        if not all(isinstance(row, dict) for row in rows):
            raise TypeError("rows")
        command = COMMANDS[header["timed"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not what `bench --json` writes ({error!r}); name another file") from error
    if timed is not None and header["timed"] != timed:
        raise ValueError(
            f"{file} was timed as {header['timed']}; print it with `hf-fused-mlp bench {command} --table {file}`"
        )
    return header, rows


def resume(file: Path, header: Header) -> tuple[Header, list[Row]]:
    """Returns the header of a run that adds to `file`, and the rows that are there.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a file of `bench`, or was measured on another system.
    """
    if not file.exists():
        return header, []
    earlier, rows = read(file)
    packages, earlier_packages = header.get("peers", {}), earlier.get("peers", {})
    pairs = {name: (earlier.get(name), header[name]) for name in SAME}
    pairs |= {name: (earlier_packages[name], packages[name]) for name in packages.keys() & earlier_packages.keys()}
    if differing := [f"{name} {there}, here {here}" for name, (there, here) in pairs.items() if there != here]:
        raise ValueError(
            f"{file} was measured on another system: {'; '.join(differing)}. Remove it or name another file"
        )
    return header | {"peers": earlier_packages | packages}, rows


def merged(rows: list[Row], measured: list[Row]) -> list[Row]:
    """Replaces in `rows` every problem that was `measured`, as a whole; sorted in the order of `SHAPES`."""
    replaced = {problem_of(row) for row in measured}
    order = {name: index for index, name in enumerate(SHAPES)}

    def place(row: Row) -> tuple[int, str, int]:
        shape, dtype, m = problem_of(row)
        return order.get(shape, len(order)), dtype or "", m

    return sorted([row for row in rows if problem_of(row) not in replaced] + measured, key=place)


def replaced(rows: list[Row], measured: list[Row], by: tuple[str, ...]) -> list[Row]:
    """Replaces the rows that equal a measured row in the fields `by`; the measured rows come last."""
    new = {tuple(row.get(name) for name in by) for row in measured}
    return [row for row in rows if tuple(row.get(name) for name in by) not in new] + measured


def write(file: Path, header: Header, rows: list[Row]) -> None:
    """Writes `file` in one step, so that an interrupted run leaves the previous complete file.

    Raises:
        OSError: the file cannot be written.
    """
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, f'{json.dumps(header)[:-1]}, "rows": [\n  {lines}\n]}}\n')
