"""`audit` and `hf-fused-mlp audit`: the arithmetic on made-up traces, the rest on small models."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from models import as_on_gpu, tiny_model
from test_cli import invoke

import hf_fused_mlp
from hf_fused_mlp import fuse_model, fusion_report
from hf_fused_mlp.modules import FusedMLP
from hf_fused_mlp.profiling import prediction
from hf_fused_mlp.profiling.advice import advise
from hf_fused_mlp.profiling.audit import audit
from hf_fused_mlp.profiling.estimates import amdahl, bound_of, dollars_per_1m_tokens
from hf_fused_mlp.profiling.figures import shown
from hf_fused_mlp.profiling.page import BAR_WIDTH, page
from hf_fused_mlp.profiling.prediction import predict
from hf_fused_mlp.profiling.report import Kernel
from hf_fused_mlp.profiling.trace import MLP, STEP, Breakdown, breakdown, covered
from hf_fused_mlp.tuning import cache
from hf_fused_mlp.tuning.plan_files import TunedPlan
from hf_fused_mlp.types import GPU, UNFUSED, ProblemKey

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SIZES = {"prompt_tokens": 24, "new_tokens": 3, "rounds": 2}


@pytest.fixture(scope="module")
def report():
    return audit(tiny_model(), gpu_price=3.0, **SIZES)


def event(cat, name, start, end, **args):
    return {"cat": cat, "name": name, "ts": start, "dur": end - start, "tid": 1, "args": args}


def launched(name, at, start, end, correlation, cat="kernel"):
    """A kernel, and the launch on the host that began at `at`."""
    return [
        event("cuda_runtime", "cudaLaunchKernel", at, at + 1, correlation=correlation),
        event(cat, name, start, end, correlation=correlation),
    ]


@pytest.mark.parametrize(
    "busy, flops_per_byte, expected",
    [
        (0.69, 500, "host-bound"),
        (0.7, 500, "compute-bound"),
        (0.7, 1, "memory-bound"),
        (None, 300, "compute-bound"),
        (None, 299, "memory-bound"),
    ],
)
def test_bound(busy, flops_per_byte, expected):
    assert bound_of(busy, flops_per_byte, ridge=300) == expected


def test_gain_and_cost():
    assert amdahl(0.5, 2) == pytest.approx(4 / 3)
    assert amdahl(0.5, float("inf")) == 2
    assert amdahl(0, 5) == 1
    # a token a millisecond is 3.6 million an hour
    assert dollars_per_1m_tokens(3.6, 1000, tokens=1) == pytest.approx(1)
    assert dollars_per_1m_tokens(3.6, 1000, tokens=4) == pytest.approx(0.25)
    assert dollars_per_1m_tokens(None, 1000, tokens=1) is None


@pytest.mark.parametrize(
    "intervals, expected",
    [([], 0), ([(0, 2), (5, 6)], 3), ([(5, 6), (0, 2), (1, 3)], 4), ([(0, 10), (2, 3)], 10), ([(0, 1), (1, 2)], 2)],
)
def test_covered(intervals, expected):
    assert covered(intervals) == expected


def test_breakdown_on_a_gpu():
    """Kernels run later than their launches, and belong to the MLP that launched them."""
    events = [
        event("user_annotation", STEP, 100, 200),
        event("user_annotation", STEP, 200, 300),
        event("user_annotation", MLP + "a", 110, 130),
        event("user_annotation", MLP + "b", 150, 160),
        event("user_annotation", MLP + "a", 210, 230),
        # the warm-up before the steps, and what the GPU's timeline says of the ranges
        event("user_annotation", MLP + "a", 10, 30),
        event("gpu_user_annotation", MLP + "a", 0, 1000),
        event("cpu_op", "aten::linear", 112, 114),
        *launched("warm", at=15, start=20, end=90, correlation=1),
        # two that overlap, one of another MLP, one of none, a fill
        *launched("up", at=112, start=140, end=160, correlation=2),
        *launched("down", at=114, start=150, end=170, correlation=3),
        *launched("up", at=155, start=180, end=185, correlation=4),
        *launched("attention", at=170, start=190, end=195, correlation=5),
        *launched("Memset", at=212, start=240, end=243, correlation=6, cat="gpu_memset"),
        event("kernel", "from before", 101, 105, correlation=99),
    ]
    step = breakdown(events, on_gpu=True)
    assert (step.host_us, step.mlp_host_us) == (100, 25)
    assert (step.busy_us, step.mlp_us) == ((30 + 5 + 5 + 3) / 2, (30 + 5 + 3) / 2)
    assert step.us_by_mlp == {"a": 33 / 2, "b": 5 / 2}
    assert step.launches_per_mlp == 4 / 3
    assert step.mlp_kernels == (Kernel("up", 2 / 3, 25 / 3), Kernel("down", 1 / 3, 20 / 3), Kernel("Memset", 1 / 3, 1))
    assert Kernel("attention", 0.5, 2.5) in step.top_kernels
    assert not {"warm", "from before"} & {kernel.name for kernel in step.top_kernels}


def test_breakdown_of_nested_mlps_and_of_a_graph():
    events = [
        event("user_annotation", STEP, 0, 100),
        event("user_annotation", MLP + "moe", 10, 60),
        event("user_annotation", MLP + "moe.shared", 20, 40),
        *launched("gate", at=12, start=110, end=112, correlation=1),
        *launched("shared", at=25, start=112, end=116, correlation=2),
        *launched("experts", at=45, start=116, end=124, correlation=3),
        event("cuda_runtime", "cudaGraphLaunch", 70, 71, correlation=4),
        *(event("kernel", name, start, start + 1, correlation=4) for name, start in (("x", 130), ("y", 131))),
    ]
    step = breakdown(events, on_gpu=True)
    assert step.us_by_mlp == {"moe": 10, "moe.shared": 4}
    assert (step.mlp_host_us, step.mlp_us, step.busy_us) == (50, 14, 16)
    events += [event("user_annotation", MLP + "graphed", 69, 75)]
    assert breakdown(events, on_gpu=True).launches_per_mlp == 4 / 3


def test_breakdown_on_a_cpu():
    """Operators that other operators call are not counted again."""
    events = [
        event("user_annotation", STEP, 0, 100),
        event("user_annotation", MLP + "a", 10, 50),
        event("cpu_op", "aten::linear", 11, 30),
        event("cpu_op", "aten::addmm", 12, 29),
        event("cpu_op", "aten::silu", 30, 40),
        event("cpu_op", "aten::mean", 60, 70),
        event("cpu_op", "aten::mean", 61, 70) | {"tid": 2},
    ]
    step = breakdown(events, on_gpu=False)
    assert (step.mlp_host_us, step.launches_per_mlp) == (40, 2)
    assert [kernel.name for kernel in step.mlp_kernels] == ["aten::linear", "aten::silu"]
    assert step.top_kernels[-1] == Kernel("aten::mean", 1, 10)


def test_the_report_holds_together(report):
    assert [phase.name for phase in report.phases] == ["prefill", "decode"]
    assert [phase.tokens for phase in report.phases] == [24, 1]
    assert [(group.class_name, group.count, group.state) for group in report.mlps] == [("LlamaMLP", 2, "fused")]
    for phase in report.phases:
        assert phase.predicted.gain == 1
        assert "on cpu" in phase.predicted.basis
        assert phase.measured_gain == phase.original.wall_us / phase.fused.wall_us
        assert phase.flops_per_byte == 2 * phase.tokens / 4
        for form in (phase.original, phase.fused):
            assert 0 < form.mlp_wall_share == form.mlp_host_share < 1
            assert form.gpu_busy_share is form.mlp_gpu_share is None
            assert form.wall_min_us <= form.wall_us <= form.wall_max_us
            assert form.tokens_per_s == pytest.approx(phase.tokens / form.wall_us * 1e6)
            assert form.dollars_per_1m_tokens == pytest.approx(3.0 / 3600 / form.tokens_per_s * 1e6)
            # gate, up, down; activation; product
            assert {kernel.name: kernel.count for kernel in form.mlp_kernels} == {
                "aten::linear": 3,
                "aten::silu": 1,
                "aten::mul": 1,
            }
            assert (form.launches_per_mlp, form.kernels_per_mlp) == (5, 3)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()
    assert "On a CPU the original forward runs" in report.advice[0]


def test_the_kernels_run_while_they_are_watched(monkeypatch):
    """Ranges around a fused module are hooks on it, and must not send it to its original forward."""
    as_on_gpu(monkeypatch)
    for phase in audit(tiny_model(), **SIZES).phases:
        assert phase.original.launches_per_mlp == 5
        assert phase.fused.launches_per_mlp == 1
        assert [kernel.name for kernel in phase.fused.mlp_kernels] == ["hf_fused_mlp::mlp"]
        assert phase.predicted.gain is None
        assert "no plan was measured for model.layers.0.mlp" in phase.predicted.basis


def test_the_model_is_left_as_it_came():
    model = fuse_model(tiny_model(), exclude=["model.layers.0.*"])
    model.model.layers[1].train()
    before = {name: (type(module), module.training) for name, module in model.named_modules()}
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    audit(model, **SIZES)
    assert {name: (type(module), module.training) for name, module in model.named_modules()} == before
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert not isinstance(model.model.layers[0].mlp, FusedMLP)

    def fail(*args):
        raise RuntimeError("stop")

    handle = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        audit(model, **SIZES)
    handle.remove()
    assert {name: (type(module), module.training) for name, module in model.named_modules()} == before


def test_a_model_without_fusable_mlps():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=50))
    report = audit(model, **SIZES)
    assert model.training
    assert report.phases[0].predicted.basis == "no MLP of this model can be fused"
    assert any(sentence.startswith("1 x GPT2MLP cannot be fused: ") for sentence in report.advice)
    assert 0 < report.phases[0].original.mlp_wall_share < 1


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"batch": 0}, ValueError, "batch 0: expected at least 1"),
        ({"prompt_tokens": 0}, ValueError, "prompt_tokens 0: expected at least 1"),
        ({"new_tokens": -1}, ValueError, "new_tokens -1: expected at least 1"),
        ({"rounds": 0}, ValueError, "rounds 0: expected at least 1"),
        ({"gpu_price": 0}, ValueError, "gpu_price 0: expected dollars an hour"),
        ({"prompt_tokens": 126}, ValueError, "at most 127 tokens together"),
        ({"model": "llama"}, TypeError, "str is not a model of Transformers"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "Linear is not a model of Transformers"),
    ],
)
def test_bad_arguments(changes, error, words):
    arguments = {"model": tiny_model()} | SIZES | changes
    with pytest.raises(error, match=words):
        audit(arguments.pop("model"), **arguments)


def test_models_that_cannot_be_audited():
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    t5 = T5Config(vocab_size=20, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    for model in (BertForMaskedLM(BertConfig(vocab_size=20, **sizes)), T5ForConditionalGeneration(t5)):
        with pytest.raises(TypeError, match="does not generate with a key-value cache"):
            audit(model)
    with pytest.raises(ValueError, match="on meta, expected a CPU or a CUDA GPU"):
        audit(tiny_model().to("meta"))
    compiled = tiny_model()
    compiled.compile()
    with pytest.raises(ValueError, match="is compiled"):
        audit(compiled)


def a_step(**us_by_mlp):
    total = sum(us_by_mlp.values())
    return Breakdown(1000.0, 1.0, 400.0, total, us_by_mlp, 5.0, (), ())


def test_prediction(monkeypatch):
    mlps = fuse_model(torch.nn.ModuleDict({name: tiny_model().model.layers[0].mlp for name in "ab"}))
    mlps = dict(mlps.items())
    as_on_gpu(monkeypatch)
    gains = {"a": 2.0, "b": 1.0}
    monkeypatch.setattr(prediction, "_gain_alone", lambda module, m: gains[next(n for n in mlps if mlps[n] is module)])
    step = a_step(a=100.0, b=100.0)
    # 50 of 500 microseconds are saved
    assert predict(mlps, 16, "memory-bound", step, 500.0).gain == pytest.approx(500 / 450)
    assert predict(mlps, 16, "host-bound", step, 500.0).gain == 1
    gains["b"] = None
    unknown = predict(mlps, 16, "memory-bound", step, 500.0)
    assert unknown.gain is None
    assert "b and 16 tokens" in unknown.basis


def test_prediction_asks_the_plans(plan_cache):
    mlp = fuse_model(tiny_model()).model.layers[0].mlp
    with pytest.MonkeyPatch.context() as patch:
        as_on_gpu(patch)
        assert prediction._gain_alone(mlp, 3) is None
        gpu = GPU.of(torch.device("cpu"))
        key = ProblemKey(4, 64, 176, 64, True, "silu", torch.float32, False, True, gpu)
        cache.save([TunedPlan(key, UNFUSED, plan_us=2.0, unfused_us=3.0)], gpu)
        assert prediction._gain_alone(mlp, 3) == 1.5
        assert prediction._gain_alone(mlp, 5) is None


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (None, "us", "-"),
        ("host-bound", "", "host-bound"),
        (0.3742, "percent", "37.42 %"),
        (12350.0, "us", "12.35 ms"),
        (999.9, "us", "999.9 us"),
        (2500000.0, "us", "2.5 s"),
        (12350.0, "", "12,350"),
        (1.25, "gain", "1.25x"),
        (0.0318, "dollars", "$0.0318"),
    ],
)
def test_shown(value, unit, text):
    assert shown(value, unit) == text


class Page(HTMLParser):
    """The numbers of a page, by their path in the JSON; the JSON; and the bars' widths."""

    def __init__(self, text):
        super().__init__()
        self.numbers, self.bars, self.loads, self.json, self.inside = [], [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loads += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "data":
            self.numbers.append([attributes["data-path"], attributes["value"], ""])
        if tag == "rect" and attributes["class"] == "part":
            self.bars.append((attributes["data-form"], float(attributes["width"])))
        self.inside = "json" if attributes.get("id") == "report" else tag

    def handle_data(self, data):
        if self.inside == "data":
            self.numbers[-1][2] += data
        if self.inside == "json":
            self.json += data

    def handle_endtag(self, tag):
        self.inside = None


UNITS = {"": 1, "x": 1, " %": 0.01, " us": 1, " ms": 1e3, " s": 1e6}


def check_page(text, document):
    """Every number shown is, in its unit, that of the JSON; and there are all that people look for."""
    read = Page(text)
    assert json.loads(read.json) == document
    assert read.loads == []
    for path, value, words in read.numbers:
        expected = document
        for key in path.split("."):
            expected = expected[int(key) if key.isdigit() else key]
        assert value == str(expected)
        if isinstance(expected, str):
            assert words == expected
        else:
            number = words.strip("$x %mus").replace(",", "")
            unit = words[len(words.rstrip("x %mus")) :]
            assert float(number) * UNITS[unit] == pytest.approx(expected, rel=1e-9)
    paths = {path for path, *_ in read.numbers}
    for i, phase in enumerate(document["phases"]):
        assert {f"phases.{i}.measured_gain", f"phases.{i}.predicted.gain", f"phases.{i}.bound"} <= paths
        for form in ("original", "fused"):
            numbers = {key for key, value in phase[form].items() if isinstance(value, (int, float))}
            assert {f"phases.{i}.{form}.{key}" for key in numbers - {"mlp_host_share"}} <= paths
            widths = [width for owner, width in read.bars if owner == f"phases.{i}.{form}"]
            longest = max(phase[name]["wall_us"] for name in ("original", "fused"))
            assert sum(widths) == pytest.approx(BAR_WIDTH * phase[form]["wall_us"] / longest, abs=0.1)
            assert widths[0] == pytest.approx(sum(widths) * phase[form]["mlp_wall_share"], abs=0.1)


def test_the_page_is_the_json(report):
    check_page(page(report), report.to_dict())


def on_a_gpu(report):
    """The report as if a GPU had been half idle."""
    phases = []
    for phase in report.phases:
        forms = {
            form: replace(getattr(phase, form), gpu_busy_share=0.5, mlp_gpu_share=0.25, mlp_wall_share=0.125)
            for form in ("original", "fused")
        }
        phases.append(replace(phase, bound="host-bound", **forms))
    return replace(report, on_gpu=True, phases=tuple(phases))


def test_the_page_of_a_gpu(report):
    gpu = on_a_gpu(report)
    text = page(gpu)
    check_page(text, gpu.to_dict())
    assert "the GPU waits" in text
    assert "the GPU waits" not in page(report)
    assert "gain up to 2.00x" in advise(gpu)[-1] + advise(gpu)[-2]


def test_names_are_no_markup(report):
    hostile = replace(report, model="</script><script>alert(1)</script>", advice=("<b>&amp;",))
    check_page(page(hostile), hostile.to_dict())
    assert "<script>" not in page(hostile)
    assert "<b>" not in page(hostile)


def test_the_page_is_valid_html(report):
    html5lib = pytest.importorskip("html5lib")
    html5lib.HTMLParser(strict=True).parse(page(on_a_gpu(report)))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_the_page_in_a_browser(report, tmp_path):
    file = tmp_path / "audit.html"
    file.write_text(page(report), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [BROWSER, *options, "--enable-logging=stderr", "--dump-dom", file.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    check_page(result.stdout, report.to_dict())
    assert "CONSOLE" not in result.stderr


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return path


def options():
    return [word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", value)]


def test_command_writes_json_page_and_traces(directory, tmp_path):
    """In a process of its own, since the profiler writes to the streams of the process."""
    files = ["--html", tmp_path / "new" / "audit.html", "--trace", tmp_path / "traces"]
    command = [
        sys.executable,
        "-m",
        "hf_fused_mlp",
        "audit",
        directory,
        "--json",
        "--gpu-price",
        2.5,
        *options(),
        *files,
    ]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["model"] == str(directory)
    assert document["price_per_hour"] == 2.5
    check_page((tmp_path / "new" / "audit.html").read_text(encoding="utf-8"), document)
    traces = sorted(file.name for file in (tmp_path / "traces").iterdir())
    assert traces == ["decode-fused.json", "decode-original.json", "prefill-fused.json", "prefill-original.json"]
    assert "model.layers.1.mlp" in (tmp_path / "traces" / "decode-fused.json").read_text()


def test_command_prints_tables(directory):
    result = invoke("audit", directory, *options())
    assert result.exit_code == 0, result.output
    for words in ("prefill", "decode", "tokens per second", "gain, measured", "On a CPU the original forward runs"):
        assert words in result.stdout
    assert "per 1 M tokens" not in result.stdout


@pytest.mark.parametrize(
    "args, words",
    [
        (["/no/such/directory"], "/no/such/directory: no such directory"),
        (["--dtype", "int4"], "dtype 'int4': expected one of auto, float32"),
        (["--gpu-price", "-1"], "gpu-price -1.0: expected dollars an hour"),
    ],
)
def test_command_errors_are_one_line(args, words):
    result = invoke("audit", *args)
    assert result.exit_code == 2
    assert words in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


def test_command_says_why_a_model_is_not_audited(directory):
    result = invoke("audit", directory, "--prompt-tokens", 500)
    assert result.exit_code == 2
    assert "the model has 128 positions" in result.output.replace("\n", " ")


def test_audit_is_loaded_when_it_is_asked_for():
    script = """
import sys, hf_fused_mlp
print([name for name in sys.modules if name.startswith("hf_fused_mlp.profiling")])
print(hf_fused_mlp.audit.__module__)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.splitlines() == ["[]", "hf_fused_mlp.profiling.audit"], result.stderr
    with pytest.raises(AttributeError, match="no attribute 'audits'"):
        hf_fused_mlp.audits  # noqa: B018


@pytest.mark.gpu
def test_on_a_gpu():
    model = fuse_model(tiny_model(dtype=torch.bfloat16).cuda())
    report = audit(model, gpu_price=2.0, **SIZES)
    assert fusion_report(model).select("fused")
    assert report.on_gpu
    for phase in report.phases:
        # such small forwards leave any GPU waiting
        assert phase.bound == "host-bound"
        assert phase.predicted.gain == 1
        for form in (phase.original, phase.fused):
            assert 0 < form.gpu_busy_share < 1
            assert 0 < form.mlp_gpu_share < 1
            assert form.mlp_wall_share == pytest.approx(form.gpu_busy_share * form.mlp_gpu_share)
            assert 0 < form.mlp_host_share < 1
    decode = report.phases[1]
    assert decode.original.launches_per_mlp >= 4
    assert 1 <= decode.fused.launches_per_mlp < decode.original.launches_per_mlp
    assert any("_kernel" in kernel.name for kernel in decode.fused.mlp_kernels)
    assert any("host-bound" in sentence and "static cache" in sentence for sentence in report.advice)
    check_page(page(report), report.to_dict())


@pytest.mark.slow
def test_the_demo_model():
    result = subprocess.run([sys.executable, "-m", "hf_fused_mlp", "audit", "--json"], capture_output=True, text=True)
    document = json.loads(result.stdout)
    assert document["model"] == "SmolLM2-135M-Instruct"
    assert document["mlps"][0]["count"] == 30
    # 2.7 of a layer's 3.5 million weights
    assert 0.2 < document["phases"][0]["original"]["mlp_wall_share"] < 0.9
