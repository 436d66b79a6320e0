"""`hf-fused-mlp tune`: which problems it finds in a model, and what it keeps. The tuner has tests of its own."""

import json
from dataclasses import replace

import pytest
import torch
from models import MODEL_TYPES, as_on_gpu, tiny_config, tiny_model
from typer.testing import CliRunner

from hf_fused_mlp import fuse_model
from hf_fused_mlp.bench.shapes import SHAPES
from hf_fused_mlp.cli import app
from hf_fused_mlp.cli.tune import problems_of
from hf_fused_mlp.families.mlp.fused import FusedMLP
from hf_fused_mlp.ops.dispatch import experts_plans, find_plan, problem_key
from hf_fused_mlp.tuning import cache, tuner
from hf_fused_mlp.tuning import experts as tuner_of_experts
from hf_fused_mlp.tuning.plan_files import TunedPlan
from hf_fused_mlp.types import GPU, TORCH, UNFUSED, ExpertsPlan, Plan, ProblemKey, TileConfig

H100 = GPU("NVIDIA H100 80GB HBM3", 132, (9, 0), 232448)


def invoke(*args):
    return CliRunner().invoke(app, ["tune", *map(str, args)])


@pytest.fixture
def gpu(plan_cache, monkeypatch):
    """A GPU on paper, and an empty cache; a plan for 64 tokens takes 64 us, and too many tokens too much memory."""

    def tune(key):
        if key.m > 4096:
            raise torch.OutOfMemoryError("none left")
        plan = UNFUSED if key.m == 2 else Plan(TileConfig("skinny", 16, 64, 128, num_stages=4), TORCH)
        return TunedPlan(key, plan, float(key.m), key.m * 1.5)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(GPU, "of", lambda device: H100)
    monkeypatch.setattr(tuner, "tune", tune)
    return H100


def test_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = invoke("phi-3-mini")
    assert result.exit_code == 2
    assert "tune needs a CUDA GPU" in result.output


def test_a_shape(gpu, plan_cache):
    result = invoke("pythia-6.9b", "--m", "2, 16,17")
    assert result.exit_code == 0, result.output
    assert f"3 of 3 problems tuned; plans are in {cache.user_file(gpu)}" in result.stdout
    assert "4096 x 16384 plain gelu, bias, bfloat16" in result.stdout
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "x │" in line]
    assert cells == [
        ["2", "torch", "torch", "2.0", "3.0", "1.50x"],
        ["16", "skinny 16x64x128", "torch", "16.0", "24.0", "1.50x"],
        ["32", "skinny 16x64x128", "torch", "32.0", "48.0", "1.50x"],
    ]
    key = ProblemKey(32, 4096, 16384, 4096, False, "gelu", torch.bfloat16, True, True, gpu)
    assert key.m == 32
    assert find_plan(key).up.kernel == "skinny"


def test_experts(gpu, monkeypatch):
    """A shape of `bench experts`, or a model of them; plans are compared with the rule's."""

    def tune(key):
        tile = TileConfig("grouped", block_n=64, block_k=128, num_stages=3)
        return TunedPlan(key, ExpertsPlan("sorted", 16, tile, tile), 10.0, 12.0)

    monkeypatch.setattr(tuner_of_experts, "tune", tune)
    result = invoke("qwen3-30b-a3b", "--m", "1,16")
    assert result.exit_code == 0, result.output
    assert "128 experts, 8 a token, 2048 x 768 gated silu, planes, bfloat16" in result.stdout
    assert "rule, us" in result.stdout and "sorted 16: grouped 64x128" in result.stdout
    (key,) = problems_of("qwen3-30b-a3b", torch.bfloat16)
    assert experts_plans(replace(key, m=16, gpu=gpu).call(torch.device("cpu")), False)[0].rows == 16
    assert len(problems_of("all-experts", None)) == 7
    assert "nothing to tune" not in invoke("qwen3-30b-a3b", "--m", "1", "--fp8").output


def test_weights_keep_their_storage(gpu, monkeypatch, tmp_path):
    """GPT-2's are transposed, and those of a shape floats, unless FP8 is asked for."""
    tiny_model("gpt2", n_embd=64, n_inner=96, n_layer=1).config.save_pretrained(tmp_path)
    tuned, tune = [], tuner.tune
    monkeypatch.setattr(tuner, "tune", lambda key: tuned.append(key.storage) or tune(key))
    for arguments in ((tmp_path,), ("phi-3-mini",), ("phi-3-mini", "--fp8")):
        result = invoke(*arguments, "--m", "2")
        assert result.exit_code == 0, result.output
    assert tuned == ["transposed", "float", "fp8"]


def test_fp8_problems_are_those_that_run(tmp_path):
    """Scales of gate that do not end where those of up may begin are not packed; `Conv1D` is never in FP8."""
    sizes = {"hidden_size": 128, "intermediate_size": 384}
    for name, changes in (("llama", sizes), ("phi3", sizes), ("gpt2", {"n_embd": 128})):
        tiny_model(name, **changes).config.save_pretrained(tmp_path / name)
    found = [problems_of(str(tmp_path / name), torch.float16, fp8=True) for name in ("llama", "phi3")]
    assert [(key.one_block, key.dtype, key.storage) for (key,) in found] == [
        (False, torch.float16, "fp8"),
        (True, torch.float16, "fp8"),
    ]
    result = invoke(tmp_path / "gpt2", "--fp8")
    assert result.exit_code == 2 and "has no weights that can be stored in FP8" in result.output


def test_a_second_run_adds_to_the_file(gpu, plan_cache, tmp_path):
    file = tmp_path / "my" / "plans.json"
    for arguments in (("phi-3-mini", "--m", "2"), ("phi-3-mini", "--m", "2,4"), ("llama-3-8b", "--m", "2")):
        assert invoke(*arguments, "--output", file).exit_code == 0
    problems = [entry["problem"] for entry in json.loads(file.read_text())["plans"]]
    assert [(problem["hidden"], problem["m"]) for problem in problems] == [(3072, 2), (3072, 4), (4096, 2)]
    assert not plan_cache.exists()


def test_a_problem_without_room_is_skipped(gpu):
    result = invoke("phi-3-mini", "--m", "2,8192", "--dtype", "float16")
    assert result.exit_code == 0
    assert "does not fit into GPU memory: 3072 x 8192 gated silu, float16, 8192 tokens" in result.output
    assert "1 of 2 problems tuned" in result.stdout


def test_a_file_that_cannot_be_written(gpu, tmp_path):
    (tmp_path / "file").touch()
    result = invoke("phi-3-mini", "--output", tmp_path / "file" / "plans.json")
    assert result.exit_code == 2
    assert "plans cannot be kept" in result.output


def test_a_gpu_without_kernels(gpu, monkeypatch):
    monkeypatch.setattr(GPU, "of", lambda device: GPU("Tesla T4", 40, (7, 5), 65536))
    assert "no kernels for torch.bfloat16 on Tesla T4; load as float16" in invoke("phi-3-mini").output


def test_problems_without_kernels_are_left_out(gpu, monkeypatch):
    """On a T4, which runs some kernels for MLPs in fp16 and none for experts."""
    monkeypatch.setattr(GPU, "of", lambda device: GPU("Tesla T4", 40, (7, 5), 65536))
    mlps, experts = (problems_of(name, torch.float16) for name in ("phi-3-mini", "qwen3-30b-a3b"))
    monkeypatch.setattr("hf_fused_mlp.cli.tune.problems_of", lambda *args: [*experts, *mlps])
    result = invoke("phi-3-mini", "--m", "1")
    assert result.exit_code == 0 and "1 of 1 problems tuned" in result.stdout
    assert "left out: 128 experts" in result.output and "Tesla T4" in result.output
    monkeypatch.setattr("hf_fused_mlp.cli.tune.problems_of", lambda *args: experts)
    assert invoke("qwen3-30b-a3b").exit_code == 2


def test_every_shape_is_found():
    assert len(problems_of("all", None)) == len(SHAPES) - 1  # Llama 3.2 3B's is Phi-3-mini's
    sizes = 1, 3072, 8192, 3072, True, "silu", torch.float16, False, True
    assert problems_of("phi-3-mini", torch.float16) == [ProblemKey(*sizes, GPU.of(torch.device("cpu")))]


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "gpt2"])
def test_a_model_gives_the_problems_that_its_fused_mlps_ask_for(model_type, tmp_path, monkeypatch):
    as_on_gpu(monkeypatch)  # so that weights are packed
    tiny_config(model_type, dtype="float16").save_pretrained(tmp_path)
    model = fuse_model(tiny_model(model_type, dtype=torch.float16), strict=True)
    asked = set()
    for module in model.modules():
        if isinstance(module, FusedMLP):
            asked.add(problem_key(1, module.operands()))
    assert set(problems_of(str(tmp_path), None)) == asked


def test_a_model_without_known_mlps(tmp_path):
    tiny_config("apertus").save_pretrained(tmp_path)
    result = invoke(tmp_path)
    assert result.exit_code == 2
    assert "no MLP or experts that would be fused" in result.output


@pytest.mark.gpu
def test_tune_for_real(tmp_path):
    file = tmp_path / "plans.json"
    result = invoke("smollm2-135m", "--m", "1,16,300", "--output", file)
    assert result.exit_code == 0, result.output
    assert len(json.loads(file.read_text())["plans"]) == 3
