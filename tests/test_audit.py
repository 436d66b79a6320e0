"""`audit` and `hf-fused-mlp audit` on small models."""

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from weakref import WeakKeyDictionary

import pytest
import torch
from models import as_on_gpu, tiny_model
from pages import check_page
from typer.testing import CliRunner

import hf_fused_mlp
from hf_fused_mlp import audit, fuse_model, fusion_report, register_mlp, unfuse_model
from hf_fused_mlp.cli import app
from hf_fused_mlp.families.mlp.fused import FusedMLP
from hf_fused_mlp.profiling.measure import as_it_came, forms_of, worth_timing
from hf_fused_mlp.profiling.page import page
from hf_fused_mlp.reading import mlp as reading_mlp
from hf_fused_mlp.reading.mlp import find_spec

SIZES = {"prompt_tokens": 24, "new_tokens": 3, "rounds": 2}


@pytest.fixture(scope="module")
def report():
    return audit(tiny_model(), gpu_price=3.0, **SIZES)


def test_the_report_holds_together(report):
    assert [phase.name for phase in report.phases] == ["prefill", "decode"]
    assert [phase.tokens for phase in report.phases] == [24, 1]
    assert [(group.class_name, group.count, group.state) for group in report.mlps] == [("LlamaMLP", 2, "fused")]
    assert report.fusable_norms == 5
    for phase in report.phases:
        assert phase.predicted.gain == 1
        assert "on cpu" in phase.predicted.basis
        assert list(phase.forms) == ["original"]
        assert phase.measured_gain is phase.fused is phase.fused_norms is None
        assert phase.flops_per_byte == 2 * phase.tokens / 4
        form = phase.original
        assert 0 < form.mlp_wall_share == form.mlp_host_share < 1
        assert form.gpu_busy_share is form.mlp_gpu_share is form.speedup is None
        assert form.wall_min_us == min(form.rounds_us) <= form.wall_us <= form.wall_max_us == max(form.rounds_us)
        assert len(form.rounds_us) == SIZES["rounds"]
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
    assert (report.verdict.fuse, report.verdict.headline) == (None, "No verdict on a CPU")


def test_decoding_is_as_generate_decodes():
    """On a GPU `generate` decodes with another implementation of routed experts, `batched_mm`."""
    model, tokens = tiny_model("mixtral"), {True: [], False: []}
    inside = [False]

    @contextmanager
    def as_generate():
        inside[0] = True
        yield
        inside[0] = False

    model._optimize_model_for_decode = as_generate
    model.register_forward_pre_hook(
        lambda module, args, given: tokens[inside[0]].append(given["input_ids"].shape[1]), with_kwargs=True
    )
    audit(model, **SIZES)
    assert set(tokens[True]) == {1} and set(tokens[False]) == {SIZES["prompt_tokens"]}


def test_three_forms_where_kernels_run(monkeypatch):
    """Ranges around a fused module are hooks on it, and must not send it to its original forward."""
    as_on_gpu(monkeypatch)
    steps = []
    model = fuse_model(tiny_model(), norms=True)
    report = audit(model, **SIZES, progress=lambda step, done: steps.append((step, done)))
    for phase in report.phases:
        assert phase.original.launches_per_mlp == 5
        assert list(phase.forms) == ["original", "fused", "fused_norms"]
        for form in (phase.fused, phase.fused_norms):
            assert form.launches_per_mlp == 1
            assert [kernel.name for kernel in form.mlp_kernels] == ["hf_fused_mlp::mlp"]
            ratios = [a / b for a, b in zip(phase.original.rounds_us, form.rounds_us, strict=True)]
            assert (form.speedup.low, form.speedup.high) == (min(ratios), max(ratios))
        assert phase.measured_gain == phase.fused.speedup.median
        assert phase.predicted.gain is None
        assert "no plan was measured for model.layers.0.mlp" in phase.predicted.basis
    assert report.verdict.headline == "Too few rounds for a verdict"
    assert len(fusion_report(model).of("norms").select("fused")) == 5
    assert [done for _, done in steps] == pytest.approx([i / 13 for i in range(13)])
    named = [step for step, _ in steps]
    assert named[:2] == ["eager, warm-up", "fused, warm-up"]
    assert {"fused + norms, round 2 of 2", "eager, profiler", "limits of the device"} <= set(named)


def test_the_forms_of_a_model():
    """Whatever it came as; on a CPU the original alone is worth timing."""
    model = fuse_model(tiny_model(), norms=True)
    forms = forms_of(model)
    for form, (mlps, norms) in {"original": (0, 0), "fused_norms": (2, 5), "fused": (2, 0)}.items():
        forms.apply(form)
        report = fusion_report(model)
        assert (len(report.of("mlps").select("fused")), len(report.of("norms").select("fused"))) == (mlps, norms)
    assert worth_timing(forms) == ["original"]


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


def test_modules_are_fused_again_by_the_spec_they_had(monkeypatch):
    model = fuse_model(tiny_model())
    mlp = model.model.layers[0].mlp
    fused = type(mlp)
    monkeypatch.setattr(reading_mlp, "MLP_SPECS", WeakKeyDictionary())
    with as_it_came(model):
        unfuse_model(model)
        register_mlp(fused.original_class, replace(fused.fused_spec, gate="up_proj", up="gate_proj"))
        assert find_spec(mlp) != fused.fused_spec
    assert type(mlp) is fused


def test_a_model_without_fusable_mlps():
    model = tiny_model("apertus", num_hidden_layers=1).train()
    report = audit(model, **SIZES)
    assert model.training
    assert report.phases[0].predicted.basis == "no MLP of this model can be fused"
    assert any(sentence.startswith("1 x ApertusMLP cannot be fused: ") for sentence in report.advice)
    assert 0 < report.phases[0].original.mlp_wall_share < 1
    assert list(report.phases[0].forms) == ["original"]


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"batch": 0}, ValueError, "batch 0: expected at least 1"),
        ({"prompt_tokens": 0}, ValueError, "prompt_tokens 0: expected at least 1"),
        ({"new_tokens": -1}, ValueError, "new_tokens -1: expected at least 1"),
        ({"rounds": 0}, ValueError, "rounds 0: expected at least 1"),
        ({"gpu_price": 0}, ValueError, "gpu_price 0: expected dollars per hour"),
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
    for model in (compiled, torch.compile(tiny_model())):
        with pytest.raises(ValueError, match="is compiled"):
            audit(model)


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


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
    assert traces == ["decode-original.json", "prefill-original.json"]
    assert "model.layers.1.mlp" in (tmp_path / "traces" / "decode-original.json").read_text()
    assert "round" not in result.stderr, "no progress bar without a terminal"


def test_command_prints_tables(directory):
    result = invoke("audit", directory, *options())
    assert result.exit_code == 0, result.output
    for words in (
        "prefill",
        "decode",
        "tokens per second",
        "No verdict on a CPU",
        "On a CPU the original forward runs",
    ):
        assert words in result.stdout
    assert "fused" not in result.stdout
    assert "speedup" not in result.stdout
    assert "per 1 M tokens" not in result.stdout


@pytest.mark.parametrize(
    "args, words",
    [
        (["/no/such/directory"], "/no/such/directory: no such directory"),
        (["--dtype", "int4"], "dtype 'int4': expected one of auto, float32"),
        (["--gpu-price", "-1"], "gpu-price -1.0: expected dollars per hour"),
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
        assert list(phase.forms) == ["original", "fused", "fused_norms"]
        for form in phase.forms.values():
            assert 0 < form.gpu_busy_share < 1
            assert 0 < form.mlp_gpu_share < 1
            assert form.mlp_wall_share == pytest.approx(form.gpu_busy_share * form.mlp_gpu_share)
            assert 0 < form.mlp_host_share < 1
    decode = report.phases[1]
    assert decode.original.launches_per_mlp >= 4
    assert 1 <= decode.fused.launches_per_mlp < decode.original.launches_per_mlp
    assert any("_kernel" in kernel.name for kernel in decode.fused.mlp_kernels)
    assert any("host-bound" in sentence and "static cache" in sentence for sentence in report.advice)
    assert report.verdict.speedup is not None
    check_page(page(report), report.to_dict())


@pytest.mark.slow
def test_the_demo_model():
    result = subprocess.run([sys.executable, "-m", "hf_fused_mlp", "audit", "--json"], capture_output=True, text=True)
    document = json.loads(result.stdout)
    assert document["model"] == "SmolLM2-135M-Instruct"
    assert document["mlps"][0]["count"] == 30
    # 2.7 of a layer's 3.5 million weights
    assert 0.2 < document["phases"][0]["original"]["mlp_wall_share"] < 0.9
