"""Plans on disk and in use: what is written is found again, and what does not hold is skipped with a warning."""

import json
import logging
import os
import timeit
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from numerics import assert_accurate, look_up, mlp_cuda, oracle_of, random_mlp, remember
from triton.runtime.errors import OutOfResources, PTXASError

from hf_fused_mlp import launch_cache
from hf_fused_mlp.kernels import KERNELS
from hf_fused_mlp.kernels.experts import choices
from hf_fused_mlp.ops import dispatch
from hf_fused_mlp.reference import mlp_ref
from hf_fused_mlp.tuning import cache
from hf_fused_mlp.tuning.buckets import bucket
from hf_fused_mlp.tuning.heuristics import heuristic_plan
from hf_fused_mlp.tuning.plan_files import TunedPlan, kernel_code, kernel_hashes, read, write
from hf_fused_mlp.types import GPU, TORCH, UNFUSED, MLPOperands, Plan, ProblemKey, TileConfig

H100 = GPU("NVIDIA H100 80GB HBM3", 132, (9, 0), 232448)
KEY = ProblemKey(16, 576, 1536, 576, True, "silu", torch.bfloat16, False, True, H100)
SKINNY = TileConfig("skinny", 16, 64, 64, num_stages=4)
TUNED = TunedPlan(KEY, Plan(SKINNY, TORCH), 10.5, 14.25)


pytestmark = pytest.mark.usefixtures("plan_cache")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "plans.json"
    write(path, [TUNED], H100)
    return path


def edited(path, change):
    """Applies `change` to the JSON document in `path`."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


def the_warning(caplog):
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "hf-fused-mlp tune" in record.getMessage()
    return record.getMessage()


def test_round_trip(file, caplog):
    plain = TunedPlan(replace(KEY, gated=False, bias=True, m=1, out=100), UNFUSED, 3.0, 3.0)
    write(file, [plain], H100)
    assert read(file, H100) == {KEY: TUNED, plain.key: plain}
    assert not caplog.records
    lines = len(file.read_text().splitlines())
    assert lines == 14 + len(kernel_hashes()), "a line an entry, so that a difference can be read"


def test_a_new_plan_replaces_the_old_one_for_its_problem(file):
    newer = replace(TUNED, plan=UNFUSED, plan_us=9.0)
    write(file, [newer], H100)
    assert read(file, H100) == {KEY: newer}


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '{"format": 1}', "[" * 100000, "\0"], ids=range(8))
def test_malformed_files(tmp_path, text, caplog):
    (tmp_path / "plans.json").write_text(text)
    assert read(tmp_path / "plans.json", H100) == {}
    assert str(tmp_path / "plans.json") in the_warning(caplog)


def test_no_file_is_no_warning(tmp_path, caplog):
    assert read(tmp_path / "plans.json", H100) == {}
    assert not caplog.records


def test_a_directory_is_not_a_file(tmp_path, caplog):
    assert read(tmp_path, H100) == {}
    assert "IsADirectoryError" in the_warning(caplog)


@pytest.mark.parametrize("name", ["format", "gpu", "num_sms", "torch", "triton"])
def test_stale_files(file, name, caplog):
    edited(file, lambda document: document.update({name: "another"}))
    assert read(file, H100) == {}
    assert f"{name} is 'another', here" in the_warning(caplog)
    versions = ("torch", "triton")
    assert read(file, H100, any_version=True) == ({KEY: TUNED} if name in versions else {})
    caplog.clear()
    write(file, [], H100)
    assert len(caplog.records) == 1
    assert read(file, H100) == {}, "what does not hold is dropped by the next write"


@pytest.mark.parametrize("family, holds", [("skinny", False), ("gemm", True)])
def test_plans_of_other_kernels(file, family, holds, caplog):
    edited(file, lambda document: document["kernels"].update({family: "of last year"}))
    assert read(file, H100) == ({KEY: TUNED} if holds else {})
    assert len(caplog.records) == (0 if holds else 1)


WRONG = {
    "unknown kernel 'magic'": lambda entry: entry["plan"]["up"].update(kernel="magic"),
    "unknown field 'split'": lambda entry: entry["plan"]["up"].update(split=2),
    "unknown field 'colour'": lambda entry: entry["problem"].update(colour="red"),
    "unknown field 'gpu'": lambda entry: entry["problem"].update(gpu="mine"),
    "dtype is 'float7'": lambda entry: entry["problem"].update(dtype="float7"),
    "dtype is 'nn'": lambda entry: entry["problem"].update(dtype="nn"),
    "dtype is [1]": lambda entry: entry["problem"].update(dtype=[1]),
    "m is '16'": lambda entry: entry["problem"].update(m="16"),
    "bias is 0": lambda entry: entry["problem"].update(bias=0),
    "num_stages is 4.0": lambda entry: entry["plan"]["up"].update(num_stages=4.0),
    "block_m 0: expected a power of two": lambda entry: entry["plan"]["up"].update(block_m=0),
    "split_k 0: expected 1 to 64": lambda entry: entry["plan"]["up"].update(split_k=0),
    "group_m is -1": lambda entry: entry["plan"]["up"].update(group_m=-1),
    "num_warps 64: expected 1 to 32": lambda entry: entry["plan"]["up"].update(num_warps=64),
    "block_k is missing": lambda entry: entry["plan"]["up"].pop("block_k"),
    "m 15: expected a count that plans are measured for, such as 16": lambda entry: entry["problem"].update(m=15),
    "block_n 48: expected a power of two": lambda entry: entry["plan"]["up"].update(block_n=48),
    "made for M of 2 to 128": lambda entry: entry["problem"].update(m=512),
    "not one aligned block": lambda entry: (
        entry["plan"]["up"].update(kernel="gemm"),
        entry["problem"].update(one_block=False),
    ),
    "missing 1 required positional argument: 'hidden'": lambda entry: entry["problem"].pop("hidden"),
    "'plan_us'": lambda entry: entry.pop("plan_us"),
    "'plan'": lambda entry: entry.pop("plan"),
    "TileConfig is None": lambda entry: entry["plan"].update(down=None),
    "could not convert": lambda entry: entry.update(plan_us="fast"),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_entries_are_skipped(file, words, caplog):
    good = replace(TUNED, key=replace(KEY, m=32))
    write(file, [good], H100)
    edited(file, lambda document: WRONG[words](document["plans"][0]))
    assert read(file, H100) == {good.key: good}
    message = the_warning(caplog)
    assert words in message
    assert f"{file}: plans[0]" in message


def test_many_wrong_entries_are_one_warning(file, caplog):
    edited(file, lambda document: document.update(plans=[None, 1, "two"]))
    assert read(file, H100) == {}
    assert "and 2 more" in the_warning(caplog)


@pytest.mark.parametrize("step", ["replace", "chmod"])
def test_a_write_that_fails_leaves_the_file(file, step, monkeypatch):
    before = file.read_text()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write(file, [replace(TUNED, plan=UNFUSED)], H100)
    assert file.read_text() == before
    assert list(file.parent.glob(".*")) == [], "no temporary file is left"


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    import multiprocessing

    keys = [replace(KEY, m=2**i, hidden=64 * j) for i in range(1, 7) for j in range(1, 5)]
    tuned = [replace(TUNED, key=key) for key in keys]
    context = multiprocessing.get_context("fork")
    path = tmp_path / "plans.json"
    writers = [context.Process(target=_write_each, args=(path, tuned[i::4])) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert read(path, H100).keys() == set(keys)


def _write_each(path, tuned):
    for entry in tuned:
        write(path, [entry], H100)


def test_the_kernels_hash_is_of_code_only():
    source = "@triton.jit(debug=None)\ndef f(x):\n    return x + 1\n"
    prose = '"""Module."""\n\n@triton.jit(debug=None)\ndef f(x):  # what\n    """Adds."""\n    return (x\n     + 1)\n'
    assert kernel_code(source) == kernel_code(prose) != ""
    assert kernel_code(source) != kernel_code(source.replace("1", "2"))
    assert kernel_code(source) != kernel_code(source.replace("+", "-"))
    assert kernel_code(source) != kernel_code(source.replace("None", "0"))
    assert kernel_code(source) == kernel_code(f"def candidates(key):\n    return [1]\n{source}")
    assert kernel_code(source) != kernel_code(source.replace("@triton.jit(debug=None)\n", ""))
    backward = "\n@triton.jit\ndef g(x):\n    return f(2 * x)\n"
    launcher = "\ndef run(x):\n    launch(f)(x)\n\ndef family(x):\n    return run(x)\n"
    assert kernel_code(source + backward + launcher, "family") == kernel_code(source), "of what plans run"
    assert kernel_code(source + backward + launcher.replace("(f)", "(g)"), "family") == kernel_code(source + backward)
    assert kernel_hashes().keys() == KERNELS.keys() | choices.KERNELS.keys()
    assert len(set(kernel_hashes().values())) == len({*KERNELS.values(), *choices.KERNELS.values()})


def assert_valid(path):
    """A file that ships is named after its GPU, of these kernels, and every plan in it can be used."""
    document = json.loads(path.read_text())
    gpu = GPU(document["gpu"], document["num_sms"], (9, 0), 1 << 18)
    assert path.name == cache.shipped_file(gpu).name
    plans = read(path, gpu, any_version=True)
    assert len(plans) == len(document["plans"]) > 0, "the kernels changed; tune again"
    for tuned in plans.values():
        assert tuned.plan_us <= tuned.other_us, "slower than unfused"


def test_shipped_files(tmp_path, caplog):
    path = tmp_path / "nvidia-h100-80gb-hbm3-132.json"
    write(path, [TUNED], H100)
    for file in (path, *(Path(cache.__file__).parent / "plans").glob("*")):
        assert_valid(file)
    assert not caplog.records
    with pytest.raises(AssertionError):
        assert_valid(edited(path, lambda document: document["kernels"].update(skinny="of last year")))


def test_the_users_plan_beats_the_shipped_and_that_the_rule(file, caplog):
    shipped, user = cache.shipped_file(H100), cache.user_file(H100)
    assert dispatch.find_plan(KEY) == heuristic_plan(KEY)
    shipped.parent.mkdir()
    edited(file, lambda document: document.update(torch="2.9.0", triton="3.5.0")).rename(shipped)
    cache.forget()
    assert dispatch.find_plan(KEY) == TUNED.plan != heuristic_plan(KEY)
    assert cache.save([replace(TUNED, plan=UNFUSED)], H100) == user
    assert dispatch.find_plan(KEY) == UNFUSED
    assert dispatch.find_plan(replace(KEY, m=32)) == heuristic_plan(replace(KEY, m=32))
    for other in (replace(KEY, one_block=False), replace(KEY, bias=True), replace(KEY, gpu=replace(H100, num_sms=78))):
        assert dispatch.find_plan(other) == heuristic_plan(other)
    assert not caplog.records


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"HF_FUSED_MLP_CACHE": "~/plans", "HF_HOME": "/shared"}, "/home/me/plans"),
        ({"HF_HOME": "/shared"}, "/shared/hf-fused-mlp"),
        ({"HF_HOME": "$HOME/shared", "HF_FUSED_MLP_CACHE": ""}, "/home/me/shared/hf-fused-mlp"),
        ({"HF_HOME": ""}, "/system/hf-fused-mlp"),
    ],
)
def test_the_users_directory(variables, expected, monkeypatch):
    monkeypatch.delenv("HF_FUSED_MLP_CACHE")
    monkeypatch.setattr(cache, "user_cache_dir", lambda name, appauthor: f"/system/{name}")
    for name, value in ({"HOME": "/home/me", "HF_HOME": ""} | variables).items():
        monkeypatch.setenv(name, value)
    assert cache.user_directory() == Path(expected)


def test_no_home_is_one_warning(monkeypatch, caplog):
    def no_home(*args, **kwargs):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("HF_FUSED_MLP_CACHE")
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setattr(cache, "user_cache_dir", no_home)
    for _ in range(2):
        assert dispatch.find_plan(KEY) == heuristic_plan(KEY)
    (record,) = caplog.records
    assert "set HF_FUSED_MLP_CACHE" in record.getMessage()


def test_only_files_of_plans_are_written_to(tmp_path):
    (tmp_path / "notes.md").write_text("# my notes")
    (tmp_path / "data.json").write_text('{"plans": []}')
    for path in (tmp_path / "notes.md", tmp_path / "data.json"):
        before = path.read_text()
        with pytest.raises(FileExistsError, match="not a file of plans"):
            write(path, [TUNED], H100)
        assert path.read_text() == before
    (tmp_path / "link.json").symlink_to(tmp_path / "plans.json")
    write(tmp_path / "link.json", [TUNED], H100)
    assert (tmp_path / "link.json").is_symlink()
    assert read(tmp_path / "plans.json", H100) == {KEY: TUNED}


def test_a_stale_user_file_is_ignored_with_one_message(caplog):
    user = cache.save([TUNED], H100)
    edited(user, lambda document: document.update(torch="1.0"))
    for m in (1, 2, 16, 16):
        assert dispatch.find_plan(replace(KEY, m=m)) == heuristic_plan(replace(KEY, m=m))
    assert "torch is '1.0'" in the_warning(caplog)


def test_dispatch_runs_a_plan_from_the_users_file(device, monkeypatch):
    operands = random_mlp(72, 104, True, False, torch.float16, device)
    x = torch.randn(5, 72).to(torch.float16).to(device)
    gpu = GPU.of(device)
    key = dispatch.problem_key(5, MLPOperands.of(*operands, "silu"))
    ran = []
    prepare = dispatch.prepare
    monkeypatch.setattr(dispatch, "prepare", lambda plan, *args: ran.append(plan) or prepare(plan, *args))
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    plan = Plan(TileConfig("gemm", 64, 64, 64, num_stages=2), TORCH)
    mlp_cuda(x, *operands, "silu")
    cache.save([TunedPlan(bucket(key), plan, 1.0, 2.0)], gpu)
    out = mlp_cuda(x, *operands, "silu")
    assert ran == [heuristic_plan(key), plan], "a plan that was added counts from the next call on"
    assert_accurate(out, mlp_ref(x, *operands, "silu"), oracle_of(x, operands, "silu"))


@pytest.mark.parametrize(
    "error",
    [OutOfResources(300000, 232448, "shared memory"), PTXASError("bad code"), RuntimeError("pass failed")],
    ids=["resources", "assembler", "compiler"],
)
def test_a_plan_that_does_not_fit_gives_way(error, monkeypatch, caplog):
    """As it may with a plan that ships, measured with another Triton."""
    operands = random_mlp(72, 104, True, False, torch.float16)
    x = torch.randn(5, 72).to(torch.float16)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(dispatch, "SOURCES", [lambda key: TUNED.plan])
    ran, prepare = [], dispatch.prepare

    def prepare_or_fail(plan, *args):
        def run(*operands):
            ran.append(plan)
            if plan is TUNED.plan:
                raise error
            return prepare(plan, *args)(*operands)

        return run

    monkeypatch.setattr(dispatch, "prepare", prepare_or_fail)
    for tokens in (x, x, x[:4]):
        assert torch.equal(mlp_cuda(tokens, *operands, "silu"), mlp_ref(tokens, *operands, "silu"))
    assert ran == [TUNED.plan, UNFUSED, UNFUSED, UNFUSED]
    assert str(error) in the_warning(caplog)


@pytest.mark.parametrize(
    "plan, error", [(TUNED.plan, torch.OutOfMemoryError()), (UNFUSED, RuntimeError("of PyTorch"))]
)
def test_errors_that_are_not_the_plans(plan, error, monkeypatch):
    def prepare(*args):
        raise error

    monkeypatch.setattr(dispatch, "SOURCES", [lambda key: plan])
    monkeypatch.setattr(dispatch, "prepare", prepare)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    with pytest.raises(type(error)):
        mlp_cuda(torch.randn(5, 72).half(), *random_mlp(72, 104, True, False, torch.float16), "silu")
    assert not cache.unusable


def test_what_is_remembered_tells_calls_apart(monkeypatch):
    """One way is kept for each kind of call, and it is the way that such a call would find by itself."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(dispatch, "prepare", lambda *args: lambda *operands: prepared.append(args) or args)
    prepared = []
    block = torch.zeros(2, 96, 64, dtype=torch.float16)
    gate, up = block
    down = torch.zeros(64, 96, dtype=torch.float16)
    bias, wide = torch.zeros(96, dtype=torch.float16), torch.zeros(4, 8, 72, dtype=torch.float16)
    x = torch.zeros(16, 64, dtype=torch.float16)
    calls = [
        *((torch.zeros(m, 64, dtype=torch.float16), gate, up, down, None, None, None, "silu") for m in (1, 2, 3, 17)),
        (x, gate, up, down, None, None, None, "silu"),
        (x[None], gate, up, down, None, None, None, "silu"),
        (wide[:2, :, :64], gate, up, down, None, None, None, "silu"),
        (wide[0, :, :64], gate, up, down, None, None, None, "silu"),
        (x, None, up, down, None, None, None, "silu"),
        (x, gate, up, None, None, None, None, "silu"),
        (x, gate, up, down, bias, None, None, "silu"),
        (x, gate, up, down, None, bias, None, "silu"),
        (x, gate, up, down, None, None, bias[:64], "silu"),
        (x, gate, up, down, None, None, None, "relu"),
        (x, gate, up.clone(), down, None, None, None, "silu"),
        (x, gate, up, down[:40], None, None, None, "silu"),
        (x.float(), gate.float(), up.float(), down.float(), None, None, None, "silu"),
    ]
    answers = [mlp_cuda(*call) for call in calls]
    assert sum(map(len, launch_cache.remembered.values())) == len(calls)
    for call, answer in zip(calls, answers, strict=True):
        assert mlp_cuda(*call) is answer
        x, operands = call[0], MLPOperands.of(*call[1:])
        assert answer == (dispatch.find_plan(dispatch.problem_key(x.numel() // 64, operands)), x, operands)


def test_what_kernels_do_not_take_is_not_remembered(monkeypatch):
    """Weights with gaps run PyTorch's operations, tokens with gaps between their values are copied."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    seen = []

    def prepare(plan, x, operands):
        seen.append(x.is_contiguous())
        return lambda x, *matrices: mlp_ref(x, *MLPOperands(*matrices, operands.activation).flat())

    monkeypatch.setattr(dispatch, "prepare", prepare)
    gate, up, down, *biases = random_mlp(64, 96, True, False, torch.float32)
    x = torch.randn(2, 5, 128)
    for tokens in (x[..., ::2], x[..., :64].transpose(0, 1), x[:, :0, :64]):
        out = mlp_cuda(tokens, gate, up, down, *biases, "silu")
        torch.testing.assert_close(out, mlp_ref(tokens, gate, up, down, *biases, "silu"))
    assert seen == [True, True]
    gaps = torch.cat((down, down), 1)[:, :96]
    torch.testing.assert_close(
        mlp_cuda(x[..., :64], gate, up, gaps, *biases, "silu"),
        mlp_cuda(x[..., :64], gate, up, down, *biases, "silu"),
    )
    assert seen == [True, True, False]
    launch_cache.remembered.clear()
    shifted = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    for _ in range(2):
        mlp_cuda(shifted[..., :64], gate, up, down, *biases, "silu")
    assert not launch_cache.remembered, "what is kept reads 16 bytes at a time"


def test_a_look_up_takes_no_time(monkeypatch):
    """About two microseconds where nothing else runs; the bound is for a machine that is busy."""
    operands = random_mlp(64, 96, True, False, torch.float16)
    x = torch.randn(17, 64).half()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    operands = MLPOperands.of(*operands, "silu")
    remember(x, operands, lambda *operands: "the answer")
    assert look_up(x, operands) == "the answer"
    assert min(timeit.repeat(lambda: look_up(x, operands), number=1000, repeat=20)) / 1000 < 30e-6
