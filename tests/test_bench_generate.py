"""`bench generate` and `bench host`: what is timed, and which rows come of it."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from models import tiny_model
from typer.testing import CliRunner

from hf_fused_mlp.bench import generate, host, measuring, results
from hf_fused_mlp.bench.generate import Workload
from hf_fused_mlp.bench.shapes import fused_twin
from hf_fused_mlp.cli import app
from hf_fused_mlp.families.mlp.fused import FusedMLP
from hf_fused_mlp.families.norm import FusedRMSNorm
from hf_fused_mlp.fuse import fusion_report
from hf_fused_mlp.profiling.trace import Breakdown


@pytest.fixture
def clock(monkeypatch):
    """By this clock a prompt takes a model 50 ms and a token 10 ms; half of it is the GPU's.

    A model with fused MLPs takes half of that, and one with fused norms too a fifth.
    """
    now = [0.0]

    def forward_hook(model, args, kwargs, output):
        fused, norms = (any(isinstance(module, cls) for module in model.modules()) for cls in (FusedMLP, FusedRMSNorm))
        now[0] += (50.0 if kwargs["input_ids"].shape[1] > 1 else 10.0) / (5 if norms else 2 if fused else 1)

    def load(name, dtype):
        model = tiny_model(name, dtype)
        model.register_forward_hook(forward_hook, with_kwargs=True)
        return model

    def record(step, steps, mlps, on_gpu):
        assert on_gpu
        start = now[0]
        for _ in range(steps):
            step()
        busy_us = 1e3 * (now[0] - start) / 2 / steps
        return Breakdown(0, 0, busy_us, busy_us * len(mlps) / 4, {}, None, (), ())

    monkeypatch.setattr(generate, "load", load)
    monkeypatch.setattr(generate, "record", record)
    monkeypatch.setattr(generate, "time", SimpleNamespace(perf_counter=lambda: now[0] / 1e3))
    monkeypatch.setattr(generate, "NEW_TOKENS", 4)
    monkeypatch.setattr(generate, "PROFILED", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measuring, "environment", lambda names: dict.fromkeys(results.SAME, "this"))


def test_rows(clock):
    (rows,) = generate.measure("llama", [Workload("eager", 2, 5)], torch.float32, rounds=2)
    shares = {"gpu_busy": 0.5, "mlp_share": 0.5}  # two MLPs, each a quarter
    expected = []
    for impl, faster in (("original", 1), ("fused", 2), ("fused-norms", 5)):
        for phase, ms, tokens in (("prefill", 50.0, 10), ("decode", 10.0, 2)):
            expected.append(
                {"model": "llama", "mode": "eager", "phase": phase, "batch": 2, "prompt": 5, "impl": impl, "rounds": 2}
                | dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), ms / faster)
                | {"paired_speedup": faster, "tokens_per_s": 1e3 * tokens / ms * faster, "gpu_ms": ms / faster / 2}
                | shares
            )
    assert rows == expected
    problem = "| llama | eager | {} | 2 | 5 |"
    prefill, decode = (problem.format(phase) for phase in ("prefill", "decode"))
    assert generate.table(rows).splitlines()[2:] == [
        f"{prefill} fused | 50.00 | 25.00 | 400 | 25.00 | 12.50 | 50% | 50% | 2.00x | 2.00x |",
        f"{prefill} fused-norms | 50.00 | 10.00 | 1000 | 25.00 | 5.00 | 50% | 50% | 5.00x | 5.00x |",
        f"{decode} fused | 10.00 | 5.00 | 400 | 5.00 | 2.50 | 50% | 50% | 2.00x | 2.00x |",
        f"{decode} fused-norms | 10.00 | 2.00 | 1000 | 5.00 | 1.00 | 50% | 50% | 5.00x | 5.00x |",
    ]


def test_fp8_forms(monkeypatch):
    """Their weights are FP8 where they say so, and the model that they are copies of stays as it was."""
    model = tiny_model("llama", torch.bfloat16)
    monkeypatch.setattr(generate, "load", lambda *args: model)
    monkeypatch.setattr(generate, "measure_workload", lambda name, forms, workload, rounds: [forms])
    ((forms,),) = generate.measure("llama", [Workload("static-compile", 1, 3)], torch.bfloat16, rounds=2, fp8=True)
    in_fp8 = {
        impl: {name for name, weight in form.model.named_parameters() if weight.dtype == torch.float8_e4m3fn}
        for impl, form in forms.items()
    }
    linears = {name for name, _ in model.named_parameters() if "proj" in name}
    assert in_fp8 == {
        "original": set(),
        "fused": set(),
        "fused-fp8-mlps": {name for name in linears if "mlp" in name},
        "fused-fp8": linears,
    }
    for impl, form in forms.items():
        assert all(status.state == "fused" for status in fusion_report(form.model).mlps) == (impl != "original")
        assert form.model.lm_head.weight is model.lm_head.weight


def test_eager_forms_are_compared_round_by_round(clock, monkeypatch):
    times = {"original": [30.0, 40.0, 10.0], "fused": [10.0, 20.0, 20.0]}
    by_phase = {(impl, phase): ms for impl, ms in times.items() for phase in generate.PHASES}
    monkeypatch.setattr(generate, "time_forms", lambda *args: by_phase)
    for mode, paired, cell in (("eager", 2.0, "2.00x"), ("static-compile", None, "-")):
        (rows,) = generate.measure("gpt_neox", [Workload(mode, 1, 3)], torch.float32, rounds=3)
        assert {row["paired_speedup"] for row in rows if row["impl"] == "fused"} == {paired}
        assert generate.table(rows).endswith(f" | 1.50x | {cell} |")


def test_the_twin_shares_everything():
    model = tiny_model()
    twin = fused_twin(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    fused = [isinstance(layer.mlp, FusedMLP) for layer in (*model.model.layers, *twin.model.layers)]
    assert fused == [False] * 2 + [True] * 2


@pytest.mark.long
def test_command(clock, tmp_path):
    file = tmp_path / "run.json"
    args = ["bench", "generate", "--json", str(file), "--batch", "1,2", "--prompt", "3,4", "--rounds", "2"]
    result = CliRunner().invoke(app, [*args, "llama"])
    assert result.exit_code == 0, result.output
    assert CliRunner().invoke(app, [*args, "gpt_neox", "--mode", "eager", "--dtype", "float16"]).exit_code == 0
    assert CliRunner().invoke(app, [*args, "gpt_neox", "--mode", "eager"]).exit_code == 0
    run = json.loads(file.read_text())
    workloads = [(row["model"], row["mode"], row["batch"], row["prompt"]) for row in run["rows"]]
    by_workload = Counter(workloads)
    assert len(by_workload) == 12
    assert by_workload["llama", "eager", 1, 3] == 6
    assert by_workload["llama", "static-compile", 1, 3] == by_workload["gpt_neox", "eager", 1, 3] == 4  # no norms
    assert run["timed"] == "end-to-end"
    result = CliRunner().invoke(app, ["bench", "host", "--json", str(file)])
    assert result.exit_code == 2
    assert "timed end-to-end, here host" in result.output
    result = CliRunner().invoke(app, ["bench", "generate", "--table", str(file), "--plot", str(tmp_path)])
    assert generate.table(run["rows"]) in result.output
    assert (tmp_path / "end-to-end.svg").read_text().count("2.00x, GPU 50%") >= 2
    result = CliRunner().invoke(app, [*args, "llama", "--mode", "lazy"])
    assert "unknown mode 'lazy'" in result.output
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2 and "generate needs a MODEL to measure" in result.output


def test_host_time(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    build = host.build
    monkeypatch.setattr(host, "build", lambda shape, dtype: build(shape, dtype, "cpu"))
    rows = [row for rows in host.measure([1], torch.float32, rounds=1) for row in rows]
    assert [(row["kind"], row["impl"]) for row in rows] == [
        (kind, impl) for kind in ("gated", "packed", "plain", "norm") for impl in ("original", "fused")
    ]
    assert all(row["host_us"] > 0 for row in rows)
    assert len(host.table(rows).splitlines()) == 6


@pytest.mark.gpu
def test_for_real(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "load", lambda name, dtype: tiny_model(name, dtype).cuda())
    args = ["bench", "generate", "llama", "--batch", "2", "--prompt", "9", "--fp8"]
    assert CliRunner().invoke(app, [*args, "--json", str(tmp_path / "run.json")]).exit_code == 0
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    # norms are a form of their own in eager mode, FP8 weights are two in compiled code
    assert len(rows) == 2 * (3 + 4)
    assert all(row["median_ms"] > 0 and 0 < row["gpu_busy"] <= 1 for row in rows)
    result = CliRunner().invoke(app, ["bench", "host", "--m", "1", "--json", str(tmp_path / "host.json")])
    assert result.exit_code == 0, result.output
    assert "| plain | 1 |" in result.output
