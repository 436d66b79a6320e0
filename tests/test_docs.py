"""The documentation: its code runs, its tables are the measurements, its links lead somewhere."""

import json
import re
from pathlib import Path

import pytest
from models import tiny_model

from hf_fused_mlp.cli.results import read
from hf_fused_mlp.cli.tables import markdown_table, speedup_table
from hf_fused_mlp.modules import FusedMLP

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "docs/benchmarks"
GPUS = ("h100", "h200")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_code_runs(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path)
    namespace = {"path": tmp_path, "__name__": "readme"}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "2 of 2 MLPs are fused" in capsys.readouterr().out
    layers = namespace["model"].model.layers
    assert [isinstance(layer.mlp, FusedMLP) for layer in layers] == [False, True]


def test_performance_tables_are_the_json():
    ratios, times = [], []
    for gpu in GPUS:
        _, rows = read(BENCHMARKS / f"{gpu}.json")
        ratios += [speedup_table(rows, over) for over in ("eager", "peers")]
        times.append(markdown_table([row for row in rows if row["m"] in (1, 16, 256, 1024, 4096)]))
    page = (ROOT / "docs/performance.md").read_text()
    assert re.findall(r"<!-- table -->\n(.*?)\n<!-- /table -->", page, re.DOTALL) == ratios + times
    _, rows = read(BENCHMARKS / "h100-training.json")
    for over in ("eager", "peers"):
        assert speedup_table(rows, over) in page


@pytest.mark.parametrize("gpu", GPUS)
def test_plots_are_the_json(gpu, tmp_path):
    """Other versions of matplotlib draw the same lines with other bytes."""
    plots = pytest.importorskip("hf_fused_mlp.cli.plots")
    header, rows = read(BENCHMARKS / f"{gpu}.json")
    drawn = plots.draw(tmp_path, header, rows)
    assert [file.name for file in drawn] == ["speedup.svg", "decode.svg", "prefill.svg"]
    committed = [(BENCHMARKS / gpu / file.name).read_text() for file in drawn]
    if f"Matplotlib v{plots.matplotlib.__version__}," not in committed[0]:
        pytest.skip(f"drawn with another version than {plots.matplotlib.__version__}")
    assert [file.read_text() for file in drawn] == committed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebook_code_runs(notebook):
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    namespace = {"__name__": "notebook"}
    for cell in cells:
        assert cell["outputs"] or cell is cells[0], "the outputs are committed"
        exec(compile("".join(cell["source"]), notebook.name, "exec"), namespace)
