"""`bench mlp`, `training` and `candidates`: implementations are right, files are added to, tables and plots match."""

import copy
import json
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from models import SIZES, real_mlp
from torch import nn
from typer.testing import CliRunner

from hf_fused_mlp.bench import encoders, experts, generate, measuring, mlp, names, peers, results, training, wrapped
from hf_fused_mlp.bench.peers import IMPLEMENTATIONS, Implementation, Unavailable
from hf_fused_mlp.bench.shapes import Shape, fused_twin
from hf_fused_mlp.cli import app
from hf_fused_mlp.cli.console import note
from hf_fused_mlp.families.mlp.fused import FusedMLP
from hf_fused_mlp.tuning.timing import Timing
from hf_fused_mlp.validation import Errors, inaccuracy

LLAMA, GEMMA, PHI, NEOX = (
    f"transformers.models.{name}"
    for name in (
        "llama.modeling_llama.LlamaMLP",
        "gemma2.modeling_gemma2.Gemma2MLP",
        "phi3.modeling_phi3.Phi3MLP",
        "gpt_neox.modeling_gpt_neox.GPTNeoXMLP",
    )
)
HEADER = {
    "device": "a GPU",
    "torch": "2",
    "triton": "3",
    "transformers": "5",
    "kernels": {},
    "copy_tbps": 3.0,
    "peers": {},
    "timed": "forward",
}


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def row(impl, us, shape="phi-3-mini", m=1, **fields):
    sizes = {"hidden": 3072, "intermediate": 8192, "kind": "packed", "activation": "silu", "dtype": "bfloat16"}
    return {"shape": shape, **sizes, "m": m, "impl": impl, "median_us": us, **fields}


@pytest.fixture
def stand_ins(monkeypatch):
    """Peers' packages in plain PyTorch, with the layouts and the arguments of the real ones; no Inductor."""

    class LigerSwiGLUMLP(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
            self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
            self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

        def forward(self, x, activate=F.silu):
            return self.down_proj(activate(self.gate_proj(x)) * self.up_proj(x))

    class LigerGEGLUMLP(LigerSwiGLUMLP):
        def forward(self, x):
            return super().forward(x, lambda gate: F.gelu(gate, approximate="tanh"))

    class LigerMLP(LigerSwiGLUMLP):
        def forward(self, x):
            assert x.dim() == 3 and not self.gate_proj.weight.requires_grad
            return super().forward(x)

    class LigerPhi3SwiGLUMLP(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
            self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

        def forward(self, x):
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            return self.down_proj(F.silu(gate) * up)

    def gemm_gated(a, b, activation, store_preact):
        h = a @ b
        activate = {"swiglu": F.silu, "geglu": lambda gate: F.gelu(gate, approximate="tanh")}[activation]
        return None, activate(h[:, ::2]) * h[:, 1::2]

    liger, gemm_interface = ModuleType("liger_kernel.transformers"), ModuleType("quack.gemm_interface")
    for module in (LigerSwiGLUMLP, LigerGEGLUMLP, LigerMLP, LigerPhi3SwiGLUMLP):
        setattr(liger, module.__name__, module)
    gemm_interface.gemm_gated, gemm_interface.gemm = gemm_gated, torch.matmul
    for module in (liger, gemm_interface):
        package, name = module.__name__.split(".")
        parent = ModuleType(package)
        setattr(parent, name, module)
        monkeypatch.setitem(sys.modules, package, parent)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode=None, **kw: compile_(function, backend="eager", **kw))


def forms(path, M=5, **changes):
    eager = real_mlp(path, **changes).requires_grad_(False)
    return eager, fused_twin(eager), torch.randn(M, SIZES["hidden_size"])


def no(kind, activation):
    return f"has no {kind} MLP with {activation}"


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    "path, absent",
    [
        (LLAMA, {}),
        (GEMMA, {"liger-mlp": no("gated", "gelu_tanh")}),
        (PHI, {"liger-mlp": no("packed", "silu"), "fp8": "halves share scales"}),
        (NEOX, dict.fromkeys(("liger", "liger-mlp", "quack"), no("plain", "gelu"))),
    ],
    ids=["gated", "gated-gelu", "packed", "plain"],
)
@torch.no_grad()
def test_implementations_compute_the_mlp(path, absent):
    torch.compiler.reset()
    eager, fused, x = forms(path)
    expected, oracle = eager(x), copy.deepcopy(eager).double()(x.double())
    absent = absent | {"batch-invariant": "no kernels for torch.float32"}
    for name, implementation in IMPLEMENTATIONS.items():
        if name in absent:
            with pytest.raises(Unavailable, match=absent[name]):
                implementation.prepare(eager, fused, x)
            continue
        if implementation.name == "torchao-fp8":
            continue  # needs a GPU
        answer = implementation.prepare(eager, fused, x)()
        assert answer.shape == expected.shape
        if implementation.in_fp8:
            assert Errors.of(answer, oracle).relative_rms < 0.06
        elif implementation.role != "floor":
            assert inaccuracy(answer, expected, oracle) is None, name


def test_the_names_of_the_options_are_those_of_the_tables():
    assert tuple(peers.IMPLEMENTATIONS) == names.IMPLEMENTATIONS
    assert tuple(generate.MODELS) == names.MODELS
    assert tuple(generate.MODES) == names.MODES
    assert tuple(wrapped.WRAPPINGS) == names.WRAPPINGS
    assert tuple(encoders.ENCODERS) == names.ENCODERS
    assert tuple(experts.SHAPES) == names.EXPERTS


@pytest.mark.usefixtures("stand_ins")
@torch.no_grad()
def test_copies_share_what_is_compiled():
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    eager, fused, x = forms(LLAMA)
    for _ in range(2):
        eager = copy.deepcopy(eager)
        IMPLEMENTATIONS["compile"].prepare(eager, fused, x)()
    assert counters["stats"]["unique_graphs"] == 1


def test_disabled_compilation_is_no_peer():
    disabled = torch._dynamo.config.patch(disable=True)
    with disabled, pytest.raises(Unavailable, match="unset TORCH_COMPILE_DISABLE"):
        IMPLEMENTATIONS["compile"].prepare(*forms(LLAMA))


def test_fused_and_eager_share_their_weights():
    eager, fused, _ = forms(LLAMA)
    assert all(a is b for a, b in zip(eager.parameters(), fused.parameters(), strict=True))
    assert type(eager).__name__ == "LlamaMLP" and isinstance(fused, FusedMLP)


@torch.no_grad()
def test_packages_that_are_not_installed_are_noted_once(monkeypatch, capsys):
    note.cache_clear()
    CliRunner().invoke(app, ["--version"])  # from then on, what is logged is printed as notes
    for package in ("liger_kernel", "quack"):
        monkeypatch.setitem(sys.modules, package, None)
    for _ in range(2):
        calls = measuring.judged(["fused", "liger", "quack"], *forms(LLAMA), "here")
    assert list(calls) == ["fused"]
    said = capsys.readouterr().err
    assert said.count("liger: not installed") == said.count("quack: not installed") == 1
    assert "pip install liger-kernel" in said and "pip install quack-kernels==0.4.1" in said


def answers(change):
    """An implementation whose answer is eager's, changed."""
    return lambda eager, fused, x: lambda: change(eager(x))


def fails(eager, fused, x):
    raise RuntimeError("no kernel\nfor this GPU")


@torch.no_grad()
def test_judgement(monkeypatch, caplog):
    monkeypatch.setitem(IMPLEMENTATIONS, "compile", Implementation("compile", answers(lambda y: 2 * y)))
    monkeypatch.setitem(IMPLEMENTATIONS, "liger", Implementation("liger", fails))
    calls = measuring.judged(["fused", "eager", "compile", "liger"], *forms(LLAMA), "here")
    assert list(calls) == ["fused", "eager", "compile"]
    inaccurate, failed = (record.getMessage() for record in caplog.records if record.name == measuring.logger.name)
    assert "compile: inaccurate at here, timed all the same: largest error" in inaccurate
    assert failed == "liger: failed at here: RuntimeError: no kernel"

    monkeypatch.setitem(IMPLEMENTATIONS, "fused", Implementation("fused", answers(lambda y: 2 * y), "ours"))
    with pytest.raises(AssertionError, match="here, fused: the fused MLP is wrong, so it is not timed: largest error"):
        measuring.judged(["fused"], *forms(LLAMA), "here")
    monkeypatch.setitem(IMPLEMENTATIONS, "fused", Implementation("fused", fails, "ours"))
    with pytest.raises(RuntimeError, match="no kernel"):
        measuring.judged(["fused"], *forms(LLAMA), "here")


@torch.no_grad()
def test_judgement_in_fp8(monkeypatch):
    """By the numbers that FP8 stands for, so that what quantizing costs is no error."""
    eager, fused, x = forms(NEOX)
    assert list(measuring.judged(["fp8"], eager, fused, x, "here")) == ["fp8"]
    row = IMPLEMENTATIONS["fp8"]
    answer = row.prepare(eager, fused, x)()
    assert inaccuracy(answer, eager(x), copy.deepcopy(eager).double()(x.double()))
    monkeypatch.setitem(IMPLEMENTATIONS, "fp8", replace(row, prepare=lambda *_: lambda: 1.2 * answer))
    with pytest.raises(AssertionError, match="here, fp8: the fused MLP is wrong, so it is not timed"):
        measuring.judged(["fp8"], eager, fused, x, "here")


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("M, copies", [(4, 3), (300, 1)])
def test_measure(monkeypatch, M, copies):
    timed = {}

    def time(calls):
        timed.update({name: call if isinstance(call, list) else [call] for name, call in calls.items()})
        return dict.fromkeys(calls, Timing(2.0, 1.0, 3.0))

    monkeypatch.setattr(mlp, "build", lambda shape, dtype: real_mlp(LLAMA, dtype))
    monkeypatch.setattr(mlp, "weight_copies", lambda size: 3)
    monkeypatch.setattr(mlp, "round_robin_graphs" if M < 256 else "round_robin", time)
    shape = Shape("tiny", "llama.LlamaMLP", 64, 176, "silu")
    rows = mlp.measure(shape, M, torch.float32, list(names.DEFAULT))
    assert {name: len(calls) for name, calls in timed.items()} == dict.fromkeys(names.DEFAULT, copies)
    with torch.no_grad():
        assert all(call() is not None for calls in timed.values() for call in calls)
    assert rows[0] == row("fused", 2.0, "tiny", M) | {
        "hidden": 64, "intermediate": 176, "kind": "gated", "dtype": "float32", "p20_us": 1.0, "p80_us": 3.0
    }  # fmt: skip


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("path", [LLAMA, NEOX])
def test_measure_training(monkeypatch, path):
    timed = {}

    def time(steps):
        timed.update(steps)
        return dict.fromkeys(steps, Timing(2.0, 1.0, 3.0))

    eager = real_mlp(path)
    monkeypatch.setattr(training, "build", lambda shape, dtype: eager)
    monkeypatch.setattr(training, "round_robin", time)
    monkeypatch.setattr(training, "peak_mb", lambda step: 1.25)
    rows = training.measure(Shape("tiny", "", 64, 176, ""), 300, torch.float32, list(IMPLEMENTATIONS))
    trained = ["fused", "eager", "compile"] + (["liger"] if path == LLAMA else [])
    assert [entry["impl"] for entry in rows] == list(timed) == trained
    assert {entry["peak_mb"] for entry in rows} == {1.2}
    gradients = []
    for step in timed.values():
        step()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in eager.parameters()]))
    for gradient in gradients:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-4, rtol=1e-4)


def test_a_later_run_replaces_whole_problems(tmp_path, monkeypatch):
    """What an interrupted run measured is in the file, and rows of other problems stay."""

    def measure(shape, m, dtype, names, by_rule):
        if m == 4:
            raise KeyboardInterrupt
        return [row(name, 2.0, shape.name, m) for name in names]

    file = tmp_path / "new" / "run.json"
    results.write(file, HEADER | {"date": "before", "peers": {"quack-kernels": "0.4"}}, [
        row("fused", 1.0, m=8), row("fused", 1.0, m=2), row("quack", 1.0, m=2)
    ])  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measuring, "environment", lambda names: HEADER | {"peers": {"liger-kernel": "0.8"}})
    monkeypatch.setattr(mlp, "measure", measure)
    args = [
        "bench",
        "mlp",
        "--json",
        file,
        "--shapes",
        "phi-3-mini,llama-3-8b",
        "--impl",
        "eager,fused",
        "--m",
        "1,2,4",
    ]
    assert invoke(*args, "--plot", tmp_path).exit_code == 130
    header, rows = results.read(file)
    assert header == HEADER | {"peers": {"quack-kernels": "0.4", "liger-kernel": "0.8"}}
    kept = [(entry["shape"], entry["m"], entry["impl"], entry["median_us"]) for entry in rows]
    llama = [("llama-3-8b", m, impl, 2.0) for m in (1, 2) for impl in ("fused", "eager")]
    assert kept == [
        *llama,
        ("phi-3-mini", 2, "fused", 1.0),
        ("phi-3-mini", 2, "quack", 1.0),
        ("phi-3-mini", 8, "fused", 1.0),
    ]

    measured = results.merged(rows, [row("fused", 3.0, m=2)])
    assert [entry["median_us"] for entry in measured if entry["shape"] == "phi-3-mini"] == [3.0, 1.0]
    assert [path.name for path in file.parent.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "earlier, command, words",
    [
        (HEADER | {"device": "A100", "torch": "1"}, "mlp", "device A100, here a GPU; torch 1, here 2. Remove it"),
        (HEADER | {"peers": {"liger-kernel": "0.7"}}, "mlp", "liger-kernel 0.7, here 0.8"),
        (HEADER, "candidates", "timed forward, here candidates"),
        (None, "mlp", "not what `bench --json` writes"),
    ],
)
def test_files_that_cannot_be_added_to(tmp_path, monkeypatch, earlier, command, words):
    file = tmp_path / "run.json"
    file.write_text("[]") if earlier is None else results.write(file, earlier, [row("fused", 1.0)])
    before = file.read_bytes()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measuring, "environment", lambda names: HEADER | {"peers": {"liger-kernel": "0.8"}})
    result = invoke("bench", command, "--json", file)
    assert result.exit_code == 2
    assert words in result.output
    assert file.read_bytes() == before


def test_table(tmp_path):
    times = {"eager": 30.0, "two-gemms": 25.0, "fused": 20.0, "liger": 28.0, "compile": 26.0}
    rows = [row(impl, us) for impl, us in times.items()]
    results.write(tmp_path / "run.json", HEADER, [*rows, row("fused", 2.0, m=2), row("fused", 2.0, "llama-3-8b")])
    args = ["bench", "mlp", "--table", tmp_path / "run.json", "--shapes", "phi-3-mini", "--m"]
    eager, peers, table = invoke(*args, "1,2").stdout.strip().split("\n\n")
    assert eager.splitlines() == ["| fused over eager, M = | 1 | 2 |", "|---|---:|---:|", "| phi-3-mini | 1.50x | - |"]
    assert peers.splitlines()[2:] == ["| phi-3-mini | 1.30x | - |"]
    assert table.splitlines() == [
        "| shape | dtype | M | fused, us | eager, us | compile, us | liger, us | two-gemms, us "
        "| fused over eager | fused over best peer |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        "| phi-3-mini | bfloat16 | 1 | 20.0 | 30.0 | 26.0 | 28.0 | 25.0 | 1.50x | 1.30x |",
        "| phi-3-mini | bfloat16 | 2 | 2.0 | - | - | - | - | - | - |",
    ]
    assert "| 1 | 20.0 | 28.0 | - | 1.40x |" in invoke(*args, "1", "--impl", "liger,fused").stdout


def test_table_by_rule(tmp_path):
    problems = {("phi-3-mini", 1): 20.0, ("phi-3-mini", 3): 31.25, ("gemma-2b", 1): 24.0, ("gemma-2b", 3): 30.0}
    rows = [
        row(impl, us, shape, m)
        for (shape, m), fused in problems.items()
        for impl, us in (("eager", 30.0), ("fused", fused))
    ]
    rows += [row("fused", 1.0, "phi-4", 1)]  # cannot be compared
    results.write(tmp_path / "run.json", HEADER | {"timed": "forward-by-rule"}, rows)
    printed = invoke(
        "bench", "mlp", "--by-rule", "--table", tmp_path / "run.json", "--shapes", "all", "--m", "1,3"
    ).stdout
    assert printed.strip().splitlines() == [
        "| fused over eager | mean | lowest | M = 1 |",
        "|---|---:|---:|---:|",
        "| phi-3-mini | 1.20x | 0.96x at 3 | 1.50x |",
        "| gemma-2b | 1.12x | 1.00x at 3 | 1.25x |",
        "| **4 points: 1 below 1.00x, 1 below 0.98x** | 1.16x | 0.96x |  |",
    ]


def test_by_rule_leaves_measured_plans_aside():
    from hf_fused_mlp.ops import dispatch

    sources = list(dispatch.SOURCES)
    with pytest.raises(RuntimeError), dispatch.by_rule():
        assert [source.__name__ for source in dispatch.SOURCES] == ["heuristic_plan"]
        raise RuntimeError
    assert sources == dispatch.SOURCES


def test_plots(tmp_path):
    plots = pytest.importorskip("hf_fused_mlp.bench.plots")
    rows = [row(impl, us * m, m=m) for m in (1, 64, 4096) for impl, us in (("fused", 20.0), ("eager", 30.0))]
    rows += [row("fused", 20.0, "pythia-6.9b", kind="plain", dtype="float16")]
    results.write(tmp_path / "run.json", HEADER, rows)
    for folder in ("a", "b"):
        args = ["--m", "1", "--shapes", "phi-3-mini", "--plot", tmp_path / folder]
        assert invoke("bench", "mlp", "--table", tmp_path / "run.json", *args).exit_code == 0
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert sorted(drawn) == ["decode.svg", "prefill.svg", "speedup.svg"]
    assert drawn == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert b"<dc:date>" not in drawn["decode.svg"]

    panels = plots._panels(plots.PLOTS[0], rows)
    assert panels == {("phi-3-mini", "bfloat16"): {"fused": [(1, 1.5), (64, 1.5), (4096, 1.5)]}}
    assert plots.weight_tbps(rows[0], None) == pytest.approx(3 * 3072 * 8192 * 2 / 20e-6 / 1e12)
    assert plots.tflops(rows[-1], None) == pytest.approx(2 * 2 * 3072 * 8192 / 20e-6 / 1e12)
    assert [path.name for path in plots.draw(tmp_path, HEADER, rows[-1:])] == ["decode.svg"]
    assert set(plots.STYLES) == set(IMPLEMENTATIONS)


def test_plots_need_matplotlib(tmp_path, monkeypatch):
    results.write(tmp_path / "run.json", HEADER, [row("fused", 1.0)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "hf_fused_mlp.bench.plots", raising=False)
    result = invoke("bench", "mlp", "--table", tmp_path / "run.json", "--plot", tmp_path)
    assert result.exit_code == 2
    assert "pip install 'hf-fused-mlp[bench]'" in result.output


CANDIDATE = {"kernel": "gemv", "block_m": 1, "block_n": 2, "block_k": 512, "num_warps": 4, "num_stages": 1}


@pytest.mark.parametrize("timed, command", [pair for pair in results.COMMANDS.items() if pair[0] != "candidates"])
def test_a_table_of_another_command_is_refused(tmp_path, timed, command):
    file = tmp_path / "run.json"
    results.write(file, HEADER | {"timed": timed}, [])
    result = invoke("bench", "candidates", "--table", file)
    assert result.exit_code == 2
    assert f"was timed as {timed}; print it with `hf-fused-mlp bench {command} --table" in result.output.replace(
        "\n", ""
    )


def test_table_of_candidates(tmp_path):
    rows = [
        {"shape": "phi-3-mini", "m": 1, "launch": "up", "median_us": us} | CANDIDATE | {"kernel": kernel}
        for us, kernel in ((2.0, "gemv"), (3.0, "skinny"), (4.0, "torch"))
    ]
    results.write(tmp_path / "run.json", HEADER | {"timed": "candidates"}, rows)
    args = ["bench", "candidates", "--table", tmp_path / "run.json", "--shapes", "phi-3-mini"]
    assert invoke(*args).stdout.splitlines()[2:] == [
        "| phi-3-mini | 1 | up | 4.0 | gemv 1x2x512, 4 warps, 1 stages: 2.0; skinny 1x2x512, 4 warps, 1 stages: 3.0 |"
    ]
    assert len(invoke(*args, "--m", "2").stdout.splitlines()) == 2


@pytest.mark.gpu
def test_bench(tmp_path):
    """Two shapes; the second run adds one, with every peer there is."""
    file = tmp_path / "run.json"
    result = invoke("bench", "mlp", "--shapes", "smollm2-135m", "--m", "1,300", "--json", file)
    assert result.exit_code == 0, result.output
    result = invoke(
        "bench", "mlp", "--shapes", "pythia-6.9b", "--m", "1,300", "--json", file, "--impl", "eager,fused,compile"
    )
    assert result.exit_code == 0, result.output
    run = json.loads(file.read_text())
    assert all(0 < row["p20_us"] <= row["median_us"] <= row["p80_us"] for row in run["rows"])
    measured = results.by_problem(run["rows"])
    always = {"fused", "eager", "compile", "packed-gemm", "two-gemms"}
    for m in (1, 300):
        assert measured["smollm2-135m", "bfloat16", m].keys() - {"liger"} == always
        assert measured["pythia-6.9b", "bfloat16", m].keys() == {"fused", "eager", "compile"}
    assert "failed" not in result.output and "inaccurate" not in result.output
