"""`bench wrapped`: the original runs in its turns, every wrapping that runs here is timed, and the table shows it."""

import importlib.util
import json

import pytest
import torch
from typer.testing import CliRunner

from hf_fused_mlp.bench import measuring, results, wrapped
from hf_fused_mlp.cli import app
from hf_fused_mlp.swap import Fused

HERE = "plain", "lora", "lora-two", "lora-merged", "lora-training", "hooks"


@pytest.fixture
def small(monkeypatch):
    """A tiny model on the CPU."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(wrapped, "SIZES", sizes | {"vocab_size": 32})
    monkeypatch.setattr(wrapped, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measuring, "environment", lambda packages: dict.fromkeys(results.SAME, "this"))


@pytest.mark.parametrize("name", HERE)
def test_both_forms_are_timed(name, small, monkeypatch):
    package = wrapped.WRAPPINGS[name].package
    if package is not None:
        pytest.importorskip(package)
    seen = []
    turn = wrapped.original_form
    monkeypatch.setattr(wrapped, "original_form", lambda modules: seen.append(len(modules)) or turn(modules))
    (rows,) = wrapped.measure([name], [3], layers=2, rounds=9, dtype=torch.float32)
    assert [row["impl"] for row in rows] == ["original", "fused"]
    assert all(row["wrapping"] == name and row["m"] == 3 and row["layers"] == 2 for row in rows)
    assert all(0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in rows)
    assert sorted(seen) == [0] * 12 + [2] * 13  # the original once more, to compare


def test_turns(small):
    """The original's turns run the class that was there before fusing."""
    model = wrapped.fuse_model(wrapped.plain(wrapped.LlamaConfig(**wrapped.SIZES, num_hidden_layers=1), torch.float32))
    (mlp,) = (module for module in model.modules() if isinstance(module, Fused))
    forms = []
    times = wrapped.time_forms(lambda: forms.append(isinstance(mlp, Fused)), [mlp], rounds=4, calls=2)
    assert {form: len(values) for form, values in times.items()} == {"original": 4, "fused": 4}
    assert forms.count(True) == forms.count(False) == 2 * 7
    assert isinstance(mlp, Fused)


def test_what_is_missing_is_left_out(small, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert list(wrapped.measure(["lora", "tensor-parallel-2"], [1], 1, 2)) == []
    assert caplog.messages == ["lora: peft is not installed", "tensor-parallel-2: needs 2 GPUs"]


def test_wrong_numbers_and_failures_are_not_timed(small, monkeypatch, caplog):
    """What fails is logged, and the wrappings after it still run."""
    step, calls = wrapped._forward, []

    def noisy(model, x):
        calls.append(x)
        return step(model, x) * len(calls)  # the second form's answer is twice the first's

    def broken(config, dtype):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(wrapped, "_forward", noisy)
    monkeypatch.setitem(wrapped.WRAPPINGS, "hooks", wrapped.Wrapping(broken))
    names = ["plain", "hooks", "lora-training"]
    (rows,) = wrapped.measure(names, [3], layers=1, rounds=9, dtype=torch.float32)
    assert rows[0]["wrapping"] == "lora-training"
    assert caplog.messages == [
        "plain: AssertionError: the fused layers are off by 50.0%, so they are not timed",
        "hooks: RuntimeError: no such kernel",
    ]


def test_file_and_table(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    file = tmp_path / "wrapped.json"
    args = ["bench", "wrapped", "--wrapping", "plain", "--layers", "1", "--rounds", "2", "--json", str(file)]
    result = CliRunner().invoke(app, [*args, "--m", "2,5"])
    assert result.exit_code == 0, result.output
    assert "| wrapping | M = 2 | M = 5 |" in result.stdout
    CliRunner().invoke(app, [*args, "--m", "5"])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["m"], row["impl"]) for row in rows] == [(m, form) for m in (2, 5) for form in ("original", "fused")]
    shown = CliRunner().invoke(app, ["bench", "wrapped", "--table", str(file)]).stdout
    assert f"| plain | {rows[0]['paired_speedup']:.2f}x | {rows[2]['paired_speedup']:.2f}x |" in shown
    result = CliRunner().invoke(app, ["bench", "wrapped", "--wrapping", "none"])
    assert result.exit_code == 2 and "unknown wrapping 'none'" in result.output
