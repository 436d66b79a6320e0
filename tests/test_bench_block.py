"""`bench block`: every pass is counted once, the table shows the clock's times, the last line the verdict."""

import itertools
import json

import pytest
import torch
from models import real_mlp
from typer.testing import CliRunner

from hf_fused_mlp.bench import block, measuring, results
from hf_fused_mlp.cli import app

HEADER = {"device": "a GPU", "torch": "2", "triton": "3", "transformers": "5", "kernels": {}, "timed": "block"}


def invoke(*args):
    return CliRunner().invoke(app, ["bench", "block", *map(str, args)])


@pytest.fixture
def clock(monkeypatch):
    """A clock that the calls advance, in seconds; the CPU in place of a GPU."""
    now = [0.0]
    monkeypatch.setattr(block.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return now


def rows_of(ms_by_tokens, **fields):
    common = {"shape": "block-64x256", "hidden": 64, "intermediate": 256, "dtype": "bfloat16", "passes": 9} | fields
    return [
        common | {"m": m, "impl": impl, "ms_per_pass": value}
        for m, ms in ms_by_tokens.items()
        for impl, value in ms.items()
    ]


@pytest.mark.parametrize("passes", [1, 7, 10, 103])
def test_every_pass_is_counted_once(clock, passes):
    calls = dict.fromkeys(("fused", "eager"), 0)
    order = []

    def call(name, seconds):
        calls[name] += 1
        order.append(name)
        clock[0] += seconds

    timings = block.wall_clock({"fused": lambda: call("fused", 1e-3), "eager": lambda: call("eager", 2e-3)}, passes)
    uncounted = -(-passes // min(block.ROUNDS, passes))
    assert calls == dict.fromkeys(calls, passes + uncounted)
    assert timings["fused"] == pytest.approx({"ms_per_pass": 1, "ms_fastest_round": 1, "ms_slowest_round": 1})
    assert timings["eager"]["ms_per_pass"] == pytest.approx(2)
    turns = sum(a != b for a, b in itertools.pairwise(order))
    assert turns >= min(block.ROUNDS, passes), "they take turns"


def test_the_first_round_does_not_count_and_the_extremes_do(clock):
    seconds = iter([9, 1, 3, *[2] * 8])

    def call():
        clock[0] += next(seconds) * 1e-3

    timing = block.wall_clock({"fused": call}, 10)["fused"]
    assert timing == pytest.approx({"ms_per_pass": 2, "ms_fastest_round": 1, "ms_slowest_round": 3})


@pytest.fixture
def no_gpu_needed(monkeypatch, clock):
    def build(shape, dtype):
        assert (shape.hidden, shape.mlp_class) == (64, "llama.LlamaMLP")
        clock[0] = 0.0
        path = "transformers.models.llama.modeling_llama.LlamaMLP"
        return real_mlp(path, dtype, intermediate_size=shape.intermediate)

    def wall_clock(calls, passes):
        assert all(call().shape[-1] == 64 for call in calls.values())
        return {name: {"ms_per_pass": 0.85 if name == "fused" else 1.0} for name in calls}

    monkeypatch.setattr(block, "build", build)
    monkeypatch.setattr(block, "wall_clock", wall_clock)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measuring, "environment", lambda names: HEADER)


def test_command(no_gpu_needed, tmp_path):
    file = tmp_path / "run.json"
    args = [64, "--m", "1,3", "--impl", "fused,eager", "--json", file]
    result = invoke(*args, "--passes", 20)
    assert result.exit_code == 0, result.output
    expected = (
        "| M | fused, ms | eager, ms | fused over eager |\n"
        "|---:|---:|---:|---:|\n"
        "| 1 | 0.8500 | 1.0000 | 15.0 % |\n"
        "| 3 | 0.8500 | 1.0000 | 15.0 % |\n"
        "\n"
        "On a GPU, of eager's time for an MLP of 64 x 256 bfloat16, fusing saves 12 % to 18 % at M = 1, 3.\n"
    )
    assert result.stdout == expected
    run = json.loads(file.read_text())
    assert run["timed"] == "block" and run["device"] == "a GPU"
    assert run["rows"][0] == {
        "shape": "block-64x256", "hidden": 64, "intermediate": 256, "dtype": "bfloat16", "m": 1, "impl": "fused",
        "passes": 20, "ms_per_pass": 0.85,
    }  # fmt: skip
    assert invoke(64, "--intermediate", 96, "--m", "2", "--impl", "fused", "--json", file).exit_code == 0
    kept = [(row["intermediate"], row["m"], row["impl"]) for row in results.read(file)[1]]
    assert sorted(kept) == [(96, 2, "fused"), *((256, m, impl) for m in (1, 3) for impl in ("eager", "fused"))]
    assert invoke(64, "--m", "1,3", "--table", file).stdout == expected


def test_the_verdict_names_the_lengths():
    ms = {"fused": 1.0}
    rows = rows_of({
        1: ms | {"eager": 1 / 0.7}, 2: ms | {"eager": 1 / 0.88}, 4: ms | {"eager": 1 / 0.82},
        8: ms | {"eager": 1 / 0.881}, 16: ms | {"eager": 0.9}, 32: ms,
    })  # fmt: skip
    assert block.verdict(rows, "a GPU") == (
        "On a GPU, of eager's time for an MLP of 64 x 256 bfloat16, fusing saves 12 % to 18 % at M = 2, 4; more at "
        "M = 1; less at M = 8, 16."
    )
    less = [row for row in rows if row["m"] == 16]
    assert block.verdict(less, "a GPU").endswith("fusing saves 12 % to 18 % nowhere; less at M = 16.")
    lines = block.block_table(rows, "a GPU").splitlines()
    assert lines[6] == "| 16 | 1.0000 | 0.9000 | -11.1 % |" and lines[7] == "| 32 | 1.0000 | - | - |"
    assert "there is no verdict on the claim" in block.verdict(rows_of({1: ms}), "a GPU")


@pytest.mark.parametrize(
    "args, words",
    [
        (["--shapes", "all"], "No such option"),
        (["--plot", "."], "No such option"),
        ([64, "--dtype", "int4"], "dtype 'int4': expected bfloat16"),
        ([64, "--m", "one"], "m 'one': expected token counts"),
        ([64, "--impl", "fastest"], "unknown implementation 'fastest'"),
        ([64, "--passes", 0], "--passes"),
    ],
)
def test_bad_usage(args, words):
    result = invoke(*args)
    assert result.exit_code == 2
    assert words in result.output.replace("\n", " ")


def test_a_file_without_such_rows(tmp_path):
    results.write(tmp_path / "run.json", HEADER, rows_of({1: {"fused": 1.0}}))
    result = invoke(4096, "--table", tmp_path / "run.json")
    assert result.exit_code == 2
    assert "has no bfloat16 rows of block-4096x16384" in result.output.replace("\n", " ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    result = invoke(64)
    assert result.exit_code == 2 and "bench needs a CUDA GPU" in result.output


@pytest.mark.gpu
def test_for_real(tmp_path):
    file = tmp_path / "run.json"
    result = invoke(1024, "--passes", 20, "--m", "1,512", "--json", file)
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    measured = [(row["m"], row["impl"]) for row in rows]
    assert measured == [(m, impl) for m in (1, 512) for impl in ("fused", "eager", "compile")]
    assert all(0 < row["ms_fastest_round"] <= row["ms_per_pass"] <= row["ms_slowest_round"] for row in rows)
