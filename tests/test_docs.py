"""The documentation: its code runs, its tables are the measurements, its links and its messages are real."""

import ast
import copy
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from models import tiny_model

import hf_fused_mlp
from hf_fused_mlp.bench import encoders, experts, generate, headline, host, wrapped, writeup
from hf_fused_mlp.bench.block import block_table
from hf_fused_mlp.bench.results import read
from hf_fused_mlp.bench.tables import lowest_table, markdown_table, speedup_table
from hf_fused_mlp.cli import app
from hf_fused_mlp.families.mlp.fused import FusedMLP
from hf_fused_mlp.reading.mlp import MLP_SPECS
from hf_fused_mlp.swap import Fused

ROOT = Path(__file__).parent.parent
PACKAGE = Path(hf_fused_mlp.__file__).parent
BENCHMARKS = ROOT / "docs/benchmarks"
GPUS = ("h100", "h200")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_SPEC = importlib.util.spec_from_file_location("execute_notebooks", ROOT / "notebooks/execute.py")
execute_notebooks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(execute_notebooks)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


WITH_CODE = [page for page in PAGES if blocks(page, "python")]
WITH_COMMANDS = [page for page in PAGES if "hf-fused-mlp" in "".join(blocks(page, "console"))]


@pytest.fixture
def registry():
    """What a page registers is forgotten."""
    before = dict(MLP_SPECS)
    yield
    MLP_SPECS.clear()
    MLP_SPECS.update(before)


@pytest.fixture
def namespace(tmp_path, registry):
    """What a page's code finds: `path`, where a model lies, and that `model`."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    return {"path": tmp_path, "model": model, "__name__": "page"}


def run(code, file, namespace):
    """Executes `code` from a file, since a forward is read from its source."""
    file.write_text(code)
    exec(compile(code, file, "exec"), namespace)


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_code_runs(page, namespace, tmp_path, capsys):
    for number, block in enumerate(blocks(page, "python")):
        if "from peft" in block:
            pytest.importorskip("peft")
        block = block.replace('"Qwen/Qwen3-8B", dtype="bfloat16", device_map="cuda"', "path")
        run(block, tmp_path / f"{page.stem}_{number}.py", namespace)
        if page.name != "README.md":
            continue
        layers = namespace["model"].model.layers
        if "exclude=" in block:
            assert [isinstance(layer.mlp, FusedMLP) for layer in layers] == [False, True]
        else:
            assert "2 of 2 MLPs are fused" in capsys.readouterr().out
            assert all(isinstance(module, Fused) for layer in layers for module in (layer.mlp, layer.input_layernorm))


def test_all_code_is_of_a_known_language():
    """A fence that no test knows would be code that does not run."""
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
        assert set(fences[::2]) <= {"python", "console", "text", "mermaid"}, page.name
        assert set(fences[1::2]) <= {""}, page.name


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_commands_parse(page, tmp_path, monkeypatch):
    """Every `hf-fused-mlp` command, with its options and the types of their values; none is run."""
    monkeypatch.chdir(tmp_path)
    Path("sample.txt").touch()
    Path("docs").symlink_to(ROOT / "docs")
    lines = "".join(blocks(page, "console")).replace("\\\n", " ").splitlines()
    lines = [line for line in lines if line.startswith("hf-fused-mlp")]
    assert lines
    for line in lines:
        command = typer.main.get_command(app)
        name, *arguments = shlex.split(line.partition(" > ")[0], comments=True)
        while hasattr(command, "commands"):
            name, *arguments = arguments
            command = command.commands[name]
        command.make_context(name, arguments)


def test_performance_tables_are_the_json():
    short, whole, times = [], [], []
    for gpu in GPUS:
        _, rows = read(BENCHMARKS / f"{gpu}.json")
        few = [row for row in rows if row["m"] in (1, 32, 256, 2048)]
        short += [speedup_table(few, over) for over in ("eager", "peers")]
        whole += [speedup_table(rows, over) for over in ("eager", "peers")]
        times.append(markdown_table([row for row in rows if row["m"] in (1, 16, 256, 1024, 4096)]))
    page = (ROOT / "docs/performance.md").read_text()
    assert re.findall(r"<!-- table -->\n(.*?)\n<!-- /table -->", page, re.DOTALL) == short + whole + times
    _, rows = read(BENCHMARKS / "h100-training.json")
    for over in ("eager", "peers"):
        assert speedup_table(rows, over) in page
    tables = {
        "end-to-end": generate.table,
        "host": host.table,
        "wrapped": wrapped.table,
        "experts": lambda rows: experts.table(
            [row for row in rows if row["routing"] == "uniform" and row["m"] in (1, 16, 256, 4096)]
        ),
        "experts-max-autotune": experts.table,
        "experts-eager": generate.table,
        "experts-end-to-end": generate.table,
        "fp8-end-to-end": generate.table,
        "fp8-prefill": generate.table,
        "encoders": encoders.table,
        "rule": lowest_table,
        "between": lowest_table,
        "fp8-experts": experts.table,
    }
    for name, table in tables.items():
        _, rows = read(BENCHMARKS / f"h100-{name}.json")
        assert f"<!-- {name} -->\n{table(rows)}\n<!-- /{name} -->" in page
    assert f"<!-- writeup -->\n{writeup.table(read(BENCHMARKS / 'h100-writeup.json')[1])}\n<!-- /writeup -->" in page
    us = {(row["shape"], row["m"], row["impl"]): row["median_us"] for row in read(BENCHMARKS / "h100-fp8.json")[1]}
    for shape, m in {(shape, m): None for shape, m, _ in us}:
        eager, bf16, fp8 = (us[shape, m, impl] for impl in ("eager", "fused", "fp8"))
        assert f"| {shape} | {m} | {eager:.1f} | {bf16:.1f} | {fp8:.1f} | {bf16 / fp8:.2f}x |\n" in page
    _, rows = read(BENCHMARKS / "h100-batch-invariant.json")
    assert speedup_table(rows, "batch-invariant") in (ROOT / "docs/numerics.md").read_text()
    header, rows = read(BENCHMARKS / "h100-block.json")
    assert f"<!-- block -->\n{block_table(rows, header['device'])}\n<!-- /block -->" in page


def test_the_agreement_on_a_gpu_is_the_json():
    document = json.loads((BENCHMARKS / "h100-validate.json").read_text())
    logits, greedy = document["logits"], document["greedy"]
    same = sum(answer["first_difference"] is None for answer in greedy)
    page = " ".join((ROOT / "docs/numerics.md").read_text().split())
    assert (
        f"in {document['dtype']}: over {logits['tokens']} tokens of another text, KL {logits['kl_mean']:.4f} nats per "
        f"token, {logits['kl_max']:.3f} at most; top-1 agreement {100 * logits['top1_agreement']:.1f} %; perplexity "
        f"{logits['perplexity']:.3f}, the original's {logits['reference_perplexity']:.3f}; and {same} of "
        f"{len(greedy)} greedy answers of {greedy[0]['tokens']} tokens"
    ) in page


@pytest.mark.parametrize("gpu", GPUS)
def test_plots_are_the_json(gpu, tmp_path):
    """Other versions of matplotlib draw the same lines with other bytes."""
    plots = pytest.importorskip("hf_fused_mlp.bench.plots")
    header, rows = read(BENCHMARKS / f"{gpu}.json")
    drawn = plots.draw(tmp_path, header, rows)
    assert [file.name for file in drawn] == ["speedup.svg", "decode.svg", "prefill.svg"]
    committed = [(BENCHMARKS / gpu / file.name).read_text() for file in drawn]
    if f"Matplotlib v{plots.matplotlib.__version__}," not in committed[0]:
        pytest.skip(f"drawn with another version than {plots.matplotlib.__version__}")
    assert [file.read_text() for file in drawn] == committed


def test_the_plot_of_whole_models_is_the_json(tmp_path):
    plots = pytest.importorskip("hf_fused_mlp.bench.plots")
    assert plots.draw(tmp_path, *read(BENCHMARKS / headline.FP8)), "forms in FP8 have colours too"
    (drawn,) = plots.draw(tmp_path, *read(BENCHMARKS / "h100-end-to-end.json"))
    committed = (BENCHMARKS / "h100" / drawn.name).read_text()
    if f"Matplotlib v{plots.matplotlib.__version__}," not in committed:
        pytest.skip(f"drawn with another version than {plots.matplotlib.__version__}")
    assert drawn.read_text() == committed


def test_the_readme_is_the_json(tmp_path):
    page = (ROOT / "README.md").read_text()
    assert f"<!-- headline -->\n{headline.table()}\n<!-- /headline -->" in page
    assert headline.device() == "NVIDIA H100 80GB HBM3, torch 2.11.0+cu130, triton 3.6.0, transformers 5.17.0"
    assert len(page.splitlines()) < 120
    matplotlib = pytest.importorskip("matplotlib")
    headline.draw(tmp_path / "headline.svg")
    committed = (BENCHMARKS / "headline.svg").read_text()
    if f"Matplotlib v{matplotlib.__version__}," not in committed:
        pytest.skip(f"drawn with another version than {matplotlib.__version__}")
    assert (tmp_path / "headline.svg").read_text() == committed


def test_the_readme_says_how_much():
    """The first screen's figures are the smallest and the largest of all that were measured."""

    def span(file, impl, **where):
        rows = [row for row in read(BENCHMARKS / file)[1] if all(row[name] == value for name, value in where.items())]
        speedups = [
            fused["paired_speedup"] or original["median_ms"] / fused["median_ms"]
            for _, original, fused in generate.pairs(rows)
            if fused["impl"].startswith(impl)
        ]
        return f"{min(speedups):.2f}x to {max(speedups):.2f}x"

    llama, compiled = {"model": "llama-3-8b"}, {"mode": "static-compile", "phase": "decode"}
    page = " ".join((ROOT / "README.md").read_text().split())
    for sentence in (
        f"runs {span(headline.EXPERTS_EAGER, 'fused-norms')} as fast in eager mode with fused norms",
        f"decodes {span(headline.EXPERTS, 'fused', **compiled)} as fast under `torch.compile`: by default",
        f"Llama-3-8B runs {span(headline.DENSE, 'fused-norms', **llama)} as fast in eager mode with fused norms.",
        f"Under `torch.compile` it decodes {span(headline.DENSE, 'fused', **llama, **compiled)} as fast in bf16",
        f"and {span(headline.FP8, 'fused-fp8', **compiled)} with FP8 weights",
        f"({span(headline.FP8, 'fused-fp8', phase='prefill', batch=1)} for one prompt of 128 tokens)",
    ):
        assert sentence in page
    assert {row["prompt"] for row in read(BENCHMARKS / headline.FP8)[1]} == {128}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path):
    """`make docs`, which also follows the links between pages down to their anchors."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    reference = (tmp_path / "reference/index.html").read_text()
    missing = [name for name in hf_fused_mlp.__all__ if f".{name}" not in reference]
    assert missing == ["__version__"]


# whose messages are all on the page; the other modules of cli are about what they say themselves
DOCUMENTED = sorted(
    str(path.relative_to(PACKAGE).with_suffix(""))
    for pattern in (
        *("fuse.py", "tune.py", "options.py", "report.py", "calls.py", "modes.py", "families/**/*.py"),
        *("reading/**/*.py", "weights/**/*.py", "ops/dense.py", "ops/product.py", "ops/dispatch.py"),
        *("integrations/transformers.py", "integrations/demo.py", "tuning/cache.py", "tuning/tuner.py"),
        *(
            "cli/bench*.py",
            "cli/console.py",
            "cli/list.py",
            "cli/run.py",
            "cli/tune.py",
            "cli/model_types.py",
        ),
        *("bench/generate.py", "bench/measuring.py", "bench/results.py"),
    )
    for path in PACKAGE.glob(pattern)
)


def template(node):
    """The text of a string in code, `…` for what is filled in; empty for any other expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("%s", "…")
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) or "…" for part in node.values)
    return ""


def said(tree):
    """What `raise`, `fail`, `logger.warning` and `return` say in `tree`, if it has words."""
    for node in ast.walk(tree):
        match node:
            case ast.Raise(ast.Call(_, [message, *_])) | ast.Return(message):
                pass
            case ast.Call(ast.Name("fail"), [message]) | ast.Call(ast.Attribute(_, "warning"), [message, *_]):
                pass
            case _:
                continue
        for part in message.elts if isinstance(message, ast.Tuple) else [message]:
            if re.search(r"[a-z]{2,} ", template(part)):
                yield template(part)


def documented():
    """The messages of the page: what is between backticks in a first column."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    return re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)


def test_documented_messages_are_in_the_source():
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    templates = [text for tree in trees for node in ast.walk(tree) if (text := template(node))]
    messages = documented()
    assert len(messages) == len(set(messages)) > 50
    assert [message for message in messages if not any(message in text for text in templates)] == []


@pytest.mark.parametrize("module", DOCUMENTED)
def test_messages_in_the_source_are_documented(module):
    messages = documented()
    texts = set(said(ast.parse((PACKAGE / f"{module}.py").read_text())))
    assert [text for text in texts if not any(message in text for message in messages)] == []


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_code_runs(notebook, tmp_path, registry, monkeypatch):
    """The sources in the repository, with small sizes where there is no GPU."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(notebook.parent)  # where Jupyter runs it
    document = execute_notebooks.read(notebook)
    execute_notebooks.execute(document, notebook.stem, tmp_path)
    printed = "".join("".join(output.get("text", "")) for output in document["cells"][3]["outputs"])
    assert ("fused kernels run here" in printed) == torch.cuda.is_available()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_ready_for_colab(notebook):
    """The Colab line, the install cell and the metadata are those that `execute.py --stamp` writes."""
    document = execute_notebooks.read(notebook)
    stamped = copy.deepcopy(document)
    execute_notebooks.stamp(stamped, notebook.name)
    assert stamped == document
    assert document["metadata"]["accelerator"] == "GPU"
    install, gpu = [cell for cell in document["cells"] if cell["cell_type"] == "code"][:2]
    assert "".join(install["source"]) == execute_notebooks.INSTALL
    assert install["outputs"] == []
    assert "ON_GPU = " in "".join(gpu["source"])
    assert len({cell["id"] for cell in document["cells"]}) == len(document["cells"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_outputs_are_of_one_run_on_a_gpu(notebook):
    cells = [cell for cell in execute_notebooks.read(notebook)["cells"] if cell["cell_type"] == "code"][1:]
    if not any(cell["execution_count"] for cell in cells):
        pytest.skip("has not run on a GPU yet")
    assert [cell["execution_count"] for cell in cells] == list(range(2, len(cells) + 2))
    assert "H100" in "".join(cells[0]["outputs"][0]["text"])


def test_the_colab_badge():
    badge = execute_notebooks.badge("01.ipynb", "https://github.com/someone/hf-fused-mlp")
    link = "https://colab.research.google.com/github/someone/hf-fused-mlp/blob/main/notebooks/01.ipynb"
    assert badge.startswith("[![Open in Colab](") and badge.endswith(f"]({link})")
    assert "Upload notebook" in execute_notebooks.badge("01.ipynb", None)


def test_executing_a_notebook(tmp_path):
    """What is printed, the value of the last line and figures are stored; a cell that installs does not run."""
    pytest.importorskip("matplotlib")
    sources = ["%pip install nothing", "x = 2\nprint(x)\nx + 1", "import matplotlib.pyplot as plt\nplt.plot([x, 1]);"]
    cells = [{"cell_type": "code", "source": [source], "outputs": ["old"]} for source in sources]
    execute_notebooks.execute({"cells": [{"cell_type": "markdown", "source": []}, *cells]}, "cells", tmp_path)
    install, prints, plots = (cell["outputs"] for cell in cells)
    assert install == []
    assert prints[0] == {"name": "stdout", "output_type": "stream", "text": ["2\n"]}
    assert prints[1]["data"]["text/plain"] == ["3"]
    assert "image/png" in plots[0]["data"]
