"""`bench experts` on the CPU: which implementations take part, and the table."""

import logging

import pytest
import torch

from hf_fused_mlp.bench import experts

SMALL = experts.Experts(8, 2, 64, 32)


@pytest.fixture
def on_cpu(monkeypatch):
    """A small shape on the CPU; nothing is captured, and every call takes 8 us and 3 MB."""
    build, build_fp8 = experts.build, experts.build_fp8
    monkeypatch.setitem(experts.SHAPES, "small", SMALL)
    monkeypatch.setitem(experts.SHAPES, "blocks", experts.Experts(8, 2, 256, 128))
    monkeypatch.setattr(experts, "build", lambda shape: build(shape, torch.bfloat16, "cpu"))
    monkeypatch.setattr(experts, "build_fp8", lambda shape: build_fp8(shape, "cpu"))
    monkeypatch.setattr(experts, "repeated", lambda call, inputs, graph: lambda: call(*inputs[0]))
    monkeypatch.setattr(experts, "peak_mb", lambda call, inputs: 3.004)
    monkeypatch.setattr(experts, "in_turn", lambda runs, rounds: {name: [64.0] * rounds for name in runs})


def test_rows(on_cpu):
    floor, *rows = experts.measure("small", 16, "zipf", ["fused", "batched_mm", "eager"], 3)
    assert floor["impl"] == "floor" and "peak_mb" not in floor
    assert [row["impl"] for row in rows] == ["fused", "batched_mm", "eager"]
    assert {(row["median_us"], row["peak_mb"], row["m"], row["routing"]) for row in rows} == {(8.0, 3.0, 16, "zipf")}


def test_kernels_that_do_not_load_are_left_out(on_cpu, monkeypatch, caplog):
    implementation = experts.implementation

    def missing(impl, module):
        if impl not in experts.OPTIONAL:
            return implementation(impl, module)

        def call(*inputs):
            raise ImportError("no such kernels")

        return call

    monkeypatch.setattr(experts, "implementation", missing)
    with caplog.at_level(logging.WARNING):
        rows = experts.measure("small", 4, "uniform", ["fused", "sonicmoe", "deepgemm"], 3)
    assert [row["impl"] for row in rows] == ["floor", "fused"]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["sonicmoe", "deepgemm"]


def test_fp8(on_cpu, monkeypatch):
    """Transformers' implementations run where they load; the floor is half of bfloat16's."""
    monkeypatch.setattr(
        experts, "implementation", lambda impl, module: module.by_operator if impl == "fused" else None
    )
    floor, fused = experts.measure("blocks", 16, "uniform", ["fused", "grouped_mm"], 3, fp8=True)
    assert (floor["dtype"], fused["dtype"], fused["impl"]) == ("fp8", "fp8", "fused")
    shape = experts.SHAPES["blocks"]
    assert shape.floor_us(16, 8, fp8=True) == shape.floor_us(16, 8) / 2
    assert "| blocks in FP8 | uniform | 16 |" in experts.table([floor, fused])
    assert [name for name, shape in experts.SHAPES.items() if not shape.has_fp8] == [
        *("gpt-oss-20b", "gemma-4-26b-a4b", "small")
    ]


def test_others_must_run_and_agree(on_cpu, monkeypatch):
    def failing(impl, module):
        return lambda *inputs: 1 / 0

    monkeypatch.setattr(experts, "implementation", failing)
    with pytest.raises(ZeroDivisionError):
        experts.measure("small", 4, "uniform", ["fused"], 3)
    scale = iter((1.0, 1.1))
    monkeypatch.setattr(experts, "implementation", lambda impl, module: lambda x, *_: x * next(scale))
    monkeypatch.setattr(experts, "repeated", lambda *_, **__: None)
    with pytest.raises(AssertionError, match="grouped_mm is off by"):
        experts.measure("small", 4, "uniform", ["fused", "grouped_mm"], 3)


def test_memory_is_in_the_table_where_it_was_measured():
    common = {"shape": "small", "m": 64, "routing": "uniform", "p20_us": 1.0, "p80_us": 1.0}
    rows = [common | {"impl": name, "median_us": us} for name, us in (("floor", 5), ("fused", 8), ("batched_mm", 80))]
    before = experts.table(rows)
    assert "MB" not in before
    rows[1]["peak_mb"], rows[2]["peak_mb"] = 2.5, 400.0
    head, line, row = experts.table(rows).splitlines()
    assert head.endswith("| peak, MB | batched_mm's peak, MB |") and row.endswith("| 10.00x | 2.5 | 400.0 |")
    assert head.count("|") == line.count("|") == row.count("|")


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_a_call_takes_little_memory(monkeypatch):
    """At batch 64 at most a tenth of what batched_mm takes."""
    monkeypatch.setitem(experts.SHAPES, "small", experts.Experts(32, 4, 1024, 512))
    rows = experts.measure("small", 64, "uniform", ["fused", "batched_mm"], 2)
    peaks = {row["impl"]: row.get("peak_mb") for row in rows}
    assert 10 * peaks["fused"] < peaks["batched_mm"]
