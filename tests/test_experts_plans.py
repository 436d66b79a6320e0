"""Measured plans of routed experts: on disk, in use, and the tuner's decisions with a clock that is set by hand."""

import json
from dataclasses import replace

import pytest
import torch
from models import tiny_model
from test_experts_kernels import FORMS, PLANES, check, problem
from test_plans import H100, TUNED, edited, the_warning

from hf_fused_mlp import fuse_model
from hf_fused_mlp.families.experts import ExpertsFamily, FusedExperts, operands_of
from hf_fused_mlp.kernels.experts import choices, describe_experts, rule_of_thumb
from hf_fused_mlp.ops import dispatch
from hf_fused_mlp.tuning import cache, experts
from hf_fused_mlp.tuning.plan_files import TunedPlan, kernel_hashes, read, write
from hf_fused_mlp.tuning.timing import Timing
from hf_fused_mlp.types import GPU, ExpertsForm, ExpertsKey, ExpertsOperands, ExpertsPlan, TileConfig

CPU = torch.device("cpu")
KEY = ExpertsKey(64, 128, 8, 2048, 768, "planes", True, "silu", torch.bfloat16, False, H100)
TILE = TileConfig("grouped", block_n=64, block_k=64, num_stages=4, group_m=4)
EXPERTS = TunedPlan(KEY, ExpertsPlan("sorted", 32, TILE, TILE), 400.5, 417.25)

pytestmark = pytest.mark.usefixtures("plan_cache")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "plans.json"
    write(path, [EXPERTS, TUNED], H100)
    return path


def test_a_file_holds_problems_of_both_kinds(file, caplog):
    assert read(file, H100) == {KEY: EXPERTS, TUNED.key: TUNED}
    document = json.loads(file.read_text())
    assert [len(document[name]) for name in ("plans", "experts")] == [1, 1]
    assert "rule_us" in document["experts"][0]
    write(file, [replace(EXPERTS, key=replace(KEY, m=1), plan_us=9.0)], H100)
    assert len(read(file, H100)) == 3
    assert not caplog.records


def test_a_file_of_mlps_has_no_list_of_experts(tmp_path):
    write(tmp_path / "plans.json", [TUNED], H100)
    assert "experts" not in json.loads((tmp_path / "plans.json").read_text())


WRONG = {
    "unknown order 'magic'": lambda entry: entry["plan"].update(order="magic"),
    "48 rows a tile": lambda entry: entry["plan"].update(rows=48),
    "up: 'gemm' does not run in the order 'sorted'": lambda entry: entry["plan"]["up"].update(kernel="gemm"),
    "down: tiles of 32 x 2048": lambda entry: entry["plan"]["down"].update(block_n=2048, block_k=16),
    "multiple of 16 bytes": lambda entry: entry["problem"].update(hidden=2044),
    "TileConfig is None": lambda entry: entry["plan"].update(up=None),
    "unknown field 'split'": lambda entry: entry["plan"].update(split=2),
    "'rule_us'": lambda entry: entry.pop("rule_us"),
    "m 63: expected a count that plans are measured for, such as 64": lambda entry: entry["problem"].update(m=63),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_entries_are_skipped(file, words, caplog):
    edited(file, lambda document: WRONG[words](document["experts"][0]))
    assert read(file, H100) == {TUNED.key: TUNED}
    message = the_warning(caplog)
    assert words in message and "experts[0]" in message


def test_a_list_that_is_none(file, caplog):
    edited(file, lambda document: document.update(experts={"0": 1}))
    assert read(file, H100) == {}
    assert "its experts are a dict, expected a list" in the_warning(caplog)


@pytest.mark.parametrize("kernel, holds", [("grouped", False), ("pairs", True), ("gemm", True)])
def test_plans_of_other_kernels(file, kernel, holds):
    edited(file, lambda document: document["kernels"].update({kernel: "of last year"}))
    assert (KEY in read(file, H100)) == holds
    assert kernel_hashes().keys() >= choices.KERNELS.keys()


def test_the_users_plan_beats_the_shipped_and_that_the_rule(monkeypatch):
    monkeypatch.setattr(GPU, "of", lambda device: H100)
    call = KEY.call(CPU)
    rule = rule_of_thumb(call)
    assert dispatch.experts_plans(call, False) == (rule,)
    cache.SHIPPED.mkdir()
    cache.save([EXPERTS], H100, cache.shipped_file(H100))
    assert dispatch.experts_plans(call, False) == (EXPERTS.plan, rule)
    for other in (replace(call, tokens=33), replace(call, dtype=torch.float16, form=PLANES._replace(limit=7.0))):
        assert dispatch.experts_plans(other, False) == (EXPERTS.plan, rule_of_thumb(other))
    for other in (replace(call, tokens=32), replace(call, top_k=4), replace(call, dtype=torch.float32)):
        assert dispatch.experts_plans(other, False) == (rule_of_thumb(other),)
    assert dispatch.experts_plans(call, True) == (rule,)
    users = replace(EXPERTS, plan=ExpertsPlan("sorted", 16, TILE, TILE))
    cache.save([users], H100)
    assert dispatch.experts_plans(call, False) == (users.plan, rule)


@pytest.mark.parametrize("runs", [True, False], ids=["runs", "fails"])
def test_a_measured_plan_is_in_effect(runs, device, monkeypatch, caplog):
    """And gives way, once, to the rule's if it does not run."""
    x, ids, weights, up, down, *_ = problem(PLANES, device, torch.float16, 9)
    key = ExpertsKey.of(describe_experts(x, ids, up, down, PLANES), False)
    plan = ExpertsPlan("sorted", 16, replace(TILE, block_n=16, block_k=16), TILE)
    cache.save([TunedPlan(key, plan, 1.0, 2.0)], key.gpu)
    asked, prepare = [], dispatch.prepare_experts

    def prepared(plan_, call):
        asked.append(plan_)
        if plan_ == plan and not runs:
            raise RuntimeError("no room")
        return prepare(plan_, call)

    monkeypatch.setattr(dispatch, "prepare_experts", prepared)
    for tokens in (9, 10):
        x, ids, weights, up, down, *_ = problem(PLANES, device, torch.float16, tokens)
        got = dispatch.experts_cuda(x, ids, weights, ExpertsOperands(up, down, None, None, PLANES))
        check(got, (x, ids, weights, up, down, None, None), PLANES)
    rule = rule_of_thumb(key.call(device))
    assert asked == ([plan, plan] if runs else [plan, rule, rule])
    assert ("no room" in caplog.text) == (not runs)


@pytest.fixture
def clock(monkeypatch):
    """The microseconds of each plan, 100 for those not listed; every call is made once."""
    times: dict[ExpertsPlan, float] = {}

    def measured(calls, m, rounds):
        assert all(torch.isfinite(call()).all() for copies in calls.values() for call in copies[:1])
        return {plan: Timing(times.get(plan, 100.0), 0.0, 0.0) for plan in calls}

    monkeypatch.setattr("hf_fused_mlp.tuning.tuner.measure", measured)
    monkeypatch.setattr(experts, "measure", measured)
    monkeypatch.setattr(experts, "runnable", lambda problem, plans: list(plans))  # the interpreter knows no threads
    return times


def small(**changes):
    sizes = {"m": 16, "experts": 4, "top_k": 2, "hidden": 64, "intermediate": 32}
    form = {"layout": "planes", "gated": True, "activation": "silu", "dtype": torch.float16, "bias": True}
    return ExpertsKey(**sizes | form | changes, gpu=GPU.of(CPU))


def test_order_then_up_then_down(clock, device, monkeypatch):
    key = small()
    other, better, best = (replace(TILE, block_n=n, block_k=16) for n in (16, 32, 64))
    first = ExpertsPlan("sorted", 32, other, other)
    monkeypatch.setattr(choices, "first_plans", lambda call: [first, replace(first, rows=64)])
    monkeypatch.setattr(choices, "tiles", lambda call, plan, launch: [better, best])
    clock.update({first: 50.0, replace(first, up=better): 40.0, replace(first, up=best): 45.0})
    winner = replace(first, up=better, down=best)
    clock[winner] = 30.0
    rule = rule_of_thumb(key.call(device))
    assert experts.tune(key, device) == TunedPlan(key, winner, 30.0, 100.0)
    clock[rule] = 29.0
    assert experts.tune(key, device) == TunedPlan(key, rule, 29.0, 29.0)


FP8 = {"storage": "fp8", "bias": False, "hidden": 256, "intermediate": 128}


@pytest.mark.parametrize("fault", ["wrong", "gap", "wrong in FP8", "gap in FP8"])
def test_plans_that_give_a_wrong_answer(fault, clock, device, monkeypatch, caplog):
    bad = ExpertsPlan("sorted", 16, replace(TILE, block_n=16, block_k=16), replace(TILE, block_n=32, block_k=16))
    changes = {}
    if fault.endswith("FP8"):
        tile = TileConfig("w8a8", block_n=128, block_k=128, num_stages=2, group_m=2)
        bad, changes = ExpertsPlan("sorted", 32, tile, tile), FP8
    key = small(m=96 if fault == "gap" else 48, **changes)  # more than are checked in float64
    monkeypatch.setattr(choices, "first_plans", lambda call: [bad])
    monkeypatch.setattr(choices, "tiles", lambda call, plan, launch: [])
    clock[bad] = 1.0
    prepare = experts.prepare_experts

    def prepared(plan, call):
        run = prepare(plan, call)

        def spoiled(*tensors):
            out = run(*tensors)
            if fault == "wrong":
                return out * 1.05
            if fault == "wrong in FP8":
                return out * 1.1
            out[1:3] = float("nan")  # of which tokens that are checked in float64 need not be one
            return out

        return spoiled if plan == bad else run

    monkeypatch.setattr(experts, "prepare_experts", prepared)
    rule = rule_of_thumb(key.call(device))
    assert bad != rule
    assert experts.tune(key, device).plan == rule
    assert "gives a wrong answer" in caplog.text


@pytest.mark.parametrize("tokens", [1, 40, 400])
@pytest.mark.parametrize("form", [*FORMS, "FP8"])
def test_every_candidate_may_be_written(form, tokens):
    """Those of the tuner, the rule and the fallback, for problems that tensor descriptors can read."""
    storage = "fp8" if form == "FP8" else "float"
    layout, gated, activation, *_ = FORMS.get(form, PLANES)
    gpu = replace(H100, name="cpu")
    key = ExpertsKey(tokens, 8, 2, 512, 256, layout, gated, activation, torch.bfloat16, False, gpu, storage)
    call = key.call(CPU)
    plans = choices.first_plans(call)
    plans += [replace(plans[-1], up=tile) for tile in choices.tiles(call, plans[-1], "up")]
    plans += [replace(plans[-1], down=tile) for tile in choices.tiles(call, plans[-1], "down")]
    if storage == "fp8":  # tiles of what down reads without scales may be narrower
        plans = [plan for plan in plans if choices.unsupported(key, plan) is None]
        assert {plan.up.kernel for plan in plans} >= {"w8a8", "w8a16", "w8a16_scaled"}
    assert 5 < len(plans) < 60
    for plan in (*plans, rule_of_thumb(call)):
        assert choices.unsupported(key, plan) is None, plan


GEMMA = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
MODELS = {"mixtral": {}, "qwen3_moe": {}, "gpt_oss": {}, "nemotron_h": {}, "gemma4_text": GEMMA}


@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_gives_the_problem_that_its_experts_ask_for(model_type):
    """`tune` reads in a config how many experts a token has, of which the modules hear in a call only."""
    model = tiny_model(model_type, **MODELS[model_type]).eval()
    fuse_model(model)
    asked = {}
    for module in model.modules():
        if isinstance(module, FusedExperts):
            module.register_forward_pre_hook(lambda module, args: asked.update({module: args}))
    with torch.no_grad():
        model(torch.arange(3)[None])
    assert asked
    for module, (x, ids, _) in asked.items():
        up, down, up_bias, down_bias, form, *_ = operands_of(module, module.fused_spec)
        key = ExpertsKey.of(describe_experts(x, ids, up, down, form), up_bias is not None or down_bias is not None)
        assert ExpertsFamily().problem(module, module.fused_spec, 3, GPU.of(CPU)) == key


RULE = {  # experts, top_k, hidden, intermediate, tokens: order, rows, rows of weights of up
    (128, 8, 2048, 768, 1): ("pairs", 1, 1),
    (128, 8, 2048, 768, 4): ("pairs", 1, 1),
    (256, 8, 7168, 2048, 4): ("sorted", 16, 64),  # more bytes than sorting takes
    (128, 8, 2048, 768, 64): ("sorted", 16, 64),
    (64, 8, 2048, 1024, 256): ("sorted", 64, 64),
    (128, 8, 2048, 768, 1024): ("gathered", 128, 64),
    (128, 8, 2048, 768, 4096): ("gathered", 128, 128),
    (256, 8, 7168, 2048, 4096): ("gathered", 256, 64),  # an expert is larger than the L2
}


@pytest.mark.parametrize("sizes", RULE)
def test_the_rule_repeats_what_was_measured(sizes, monkeypatch):
    monkeypatch.setattr(GPU, "of", lambda device: H100)
    experts_, top_k, hidden, intermediate, m = sizes
    key = replace(KEY, experts=experts_, top_k=top_k, hidden=hidden, intermediate=intermediate, m=m)
    plan = rule_of_thumb(key.call(CPU))
    assert (plan.order, plan.rows, plan.up.block_n) == RULE[sizes]
    assert choices.unsupported(key, plan) is None


def test_a_problem_is_that_of_the_call():
    key = small()
    assert ExpertsKey.of(key.call(CPU), True) == key
    assert ExpertsKey.of(replace(key.call(CPU), tokens=9, stride_xm=128), True) == key
    assert isinstance(key.call(CPU).form, ExpertsForm)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 64, 1024])
def test_tune_for_real(m, caplog):
    gpu = GPU.of(torch.device("cuda", 0))
    key = ExpertsKey(m, 16, 4, 1024, 512, "planes", True, "silu", torch.bfloat16, False, gpu)
    tuned = experts.tune(key)
    assert not caplog.records, "a candidate is wrong or does not compile"
    assert 0 < tuned.plan_us <= tuned.other_us
    cache.save([tuned], gpu)
    assert read(cache.user_file(gpu), gpu)[key].plan == tuned.plan
