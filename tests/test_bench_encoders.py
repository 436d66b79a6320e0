"""`bench encoders`: every model builds and fuses, both forms are timed, and the table shows the rows."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from hf_fused_mlp.bench import encoders, measuring, results, wrapped
from hf_fused_mlp.cli import app

DEPTHS = "num_hidden_layers", "num_layers"


@pytest.fixture
def small(monkeypatch):
    """One layer of each, on the CPU; its width is the published one."""
    for name, encoder in encoders.ENCODERS.items():
        depth = DEPTHS[name.startswith("t5")]
        few = {depth: 1} | ({"image_size": 64} if encoder.reads_pixels else {"vocab_size": 64, "pad_token_id": 0})
        monkeypatch.setitem(encoders.ENCODERS, name, replace(encoder, changes=encoder.changes | few))
    monkeypatch.setattr(encoders, "TOKENS", 3)
    monkeypatch.setattr(wrapped, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measuring, "environment", lambda packages: dict.fromkeys(results.SAME, "this"))


@pytest.mark.parametrize("name", encoders.ENCODERS)
def test_every_model_runs_both_forms(name, small, monkeypatch):
    seen = []
    turn = wrapped.original_form
    monkeypatch.setattr(wrapped, "original_form", lambda modules: seen.append(len(modules)) or turn(modules))
    (rows,) = encoders.measure([name], [2], [torch.float32], rounds=2)
    assert [(row["model"], row["dtype"], row["batch"], row["impl"]) for row in rows] == [
        (name, "float32", 2, form) for form in wrapped.FORMS
    ]
    assert all(0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in rows)
    assert all(0 < row["low"] <= row["paired_speedup"] <= row["high"] for row in rows)
    assert set(seen) == {0, 2 if "siglip" in name else 1}, (
        "its MLPs, that of a pooling head among them, in either form"
    )


def test_file_and_table(small, tmp_path):
    file = tmp_path / "encoders.json"
    args = ["bench", "encoders", "--model", "bert-base", "--dtype", "bfloat16", "--rounds", "2", "--json", str(file)]
    assert CliRunner().invoke(app, [*args, "--batch", "1,2"]).exit_code == 0
    assert CliRunner().invoke(app, [*args, "--batch", "2"]).exit_code == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["batch"], row["impl"]) for row in rows] == [(n, form) for n in (1, 2) for form in wrapped.FORMS]
    shown = CliRunner().invoke(app, ["bench", "encoders", "--table", str(file)]).stdout
    original, fused = (row for row in rows if row["batch"] == 2)
    assert (
        f"| bert-base | bfloat16 | 2 | {original['median_ms']:.2f} | {fused['median_ms']:.2f} | "
        f"{fused['paired_speedup']:.2f}x | {fused['low']:.2f} to {fused['high']:.2f} |"
    ) in shown
    result = CliRunner().invoke(app, ["bench", "encoders", "--model", "none"])
    assert result.exit_code == 2 and "unknown model 'none'" in result.output
