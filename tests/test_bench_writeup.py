"""`bench writeup`: the launches of one call are read from a trace, and the table shows them."""

import pytest
import torch
from typer.testing import CliRunner

from hf_fused_mlp.bench import results, writeup
from hf_fused_mlp.cli import app

HEADER = {"device": "a GPU", "torch": "2", "triton": "3", "transformers": "5", "kernels": {}, "timed": "writeup"}
KERNELS = {
    "fused": [{"name": "_gemm_kernel", "us": 12.0}, {"name": "nvjet_tst_128x256", "us": 6.0}],
    "eager": [
        {"name": "nvjet_tst_128x256", "us": 7.0},
        {"name": "vectorized_elementwise_kernel<gelu>", "us": 5.0},
        {"name": "sm90_xmma_gemm_bf16", "us": 7.0},
    ],
}
COMMON = {"shape": "writeup-768x3072", "dtype": "bfloat16", "m": 8192}
ROWS = [
    COMMON | {"impl": impl, "median_us": median, "kernels": KERNELS[impl]}
    for impl, median in (("fused", 20.0), ("eager", 40.0))
]
TABLE = """\
|  | launches | each launch, ms | pointwise, ms | kernels, ms | whole call, ms | over eager |
|---|---:|---|---:|---:|---:|---:|
| eager | 3 | GEMM 0.007, pointwise 0.005, GEMM 0.007 | 0.0050 | 0.0190 | 0.0400 | 1.00x |
| fused | 2 | GEMM 0.012, GEMM 0.006 | - | 0.0180 | 0.0200 | 2.00x |"""


def events(*steps):
    """Trace events of kernels by name and duration, and others between them."""
    found = [{"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9}, {"ph": "M"}]
    for at, (name, us) in enumerate(kernel for step in steps for kernel in step):
        found.insert(0, {"cat": "kernel", "name": name, "ts": 100 * at, "dur": us})
    return found


def test_launches_are_means_in_the_order_of_a_call():
    """Gate's and up's GEMM have one name, and are two launches."""
    steps = [[("gemm", 1 + step), ("gemm", 2), ("mul", 3)] for step in range(writeup.ACTIVE)]
    assert writeup.launches_of(events(*steps)) == [
        {"name": "gemm", "us": 2.0}, {"name": "gemm", "us": 2.0}, {"name": "mul", "us": 3.0},
    ]  # fmt: skip


@pytest.mark.parametrize("steps", [[[("a", 1)], [("b", 1)], [("a", 1)]], [[("a", 1)], [("a", 1)]]])
def test_calls_that_differ(steps):
    with pytest.raises(RuntimeError, match="3 calls launch different kernels: a"):
        writeup.launches_of(events(*steps))


def test_no_kernels():
    with pytest.raises(RuntimeError, match="saw no kernels"):
        writeup.launches_of(events())


def test_table(tmp_path):
    file = tmp_path / "run.json"
    results.write(file, HEADER, ROWS)
    result = CliRunner().invoke(app, ["bench", "writeup", "--table", str(file)])
    assert result.exit_code == 0, result.output
    assert result.stdout == TABLE + "\n"
    assert writeup.table(ROWS[:1]).splitlines()[-1].endswith("| - |")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    result = CliRunner().invoke(app, ["bench", "writeup"])
    assert result.exit_code == 2 and "bench needs a CUDA GPU" in result.output


@pytest.mark.gpu
def test_for_real(tmp_path):
    file = tmp_path / "run.json"
    result = CliRunner().invoke(app, ["bench", "writeup", "--impl", "fused,eager", "--json", str(file)])
    assert result.exit_code == 0, result.output
    launches = {row["impl"]: len(row["kernels"]) for row in results.read(file)[1]}
    assert launches["fused"] == 2
    assert launches["eager"] >= 5  # the library may clear memory for a split of K
