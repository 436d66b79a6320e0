"""The tuner's decisions, with a clock that is set by hand; and, on a GPU, with the real one."""

import logging
import time

import pytest
import torch
from numerics import random_mlp
from triton.runtime.errors import OutOfResources, PTXASError

from hf_fused_mlp.kernels import LAUNCHERS
from hf_fused_mlp.ops import dispatch
from hf_fused_mlp.reference import linear_ref
from hf_fused_mlp.tuning import cache, tuner
from hf_fused_mlp.tuning.cost import expected_us
from hf_fused_mlp.tuning.timing import Timing
from hf_fused_mlp.types import GPU, TORCH, UNFUSED, MLPOperands, Plan, ProblemKey, TileConfig

CPU = torch.device("cpu")
GOOD = [TileConfig("good", group_m=i) for i in range(12)]


def problem(**changes):
    fields = {"m": 8, "hidden": 64, "intermediate": 96, "out": 48, "gated": True, "activation": "silu"}
    fields |= {"dtype": torch.float32, "bias": True, "one_block": True, "gpu": GPU.of(CPU)}
    return ProblemKey(**fields | changes)


def launches(change=lambda answer: answer):
    """What makes a launch that computes as PyTorch does, and then changes the answer."""

    def launcher(call, config):
        def run(x, weight, gate):
            return change(linear_ref(x, weight.data, weight.bias, gate.data, gate.bias, call.activation))

        return run

    return launcher


def failing(error):
    def change(answer):
        raise error

    return launches(change)


def with_gap(answer):
    """The last row as the memory was."""
    out = torch.empty_like(answer)
    out[:-1] = answer[:-1]
    return out


@pytest.fixture
def clock(monkeypatch):
    """The microseconds of each configuration; a plan takes its launches' sum unless it is listed itself.

    Every call is made once. `clock.asked` lists what was measured together, and in how many rounds.
    """

    class Clock(dict):
        def __init__(self):
            self.asked = []

        def time(self, thing):
            if isinstance(thing, Plan) and thing not in self:
                return self.time(thing.up) + self.time(thing.down)
            return self.get(thing, 100.0)

        def measure(self, calls, m, rounds):
            self.asked.append((set(calls), rounds))
            for copies in calls.values():
                assert all(torch.isfinite(call()).all() for call in copies)
            return {thing: Timing(self.time(thing), 0.0, 0.0) for thing in calls}

    clock = Clock()
    monkeypatch.setattr(tuner, "measure", clock.measure)
    monkeypatch.setattr(tuner, "weight_copies", lambda weight_bytes: 2 if weight_bytes > 25000 else 3)
    monkeypatch.setattr(tuner, "heuristic_plan", lambda key: Plan(GOOD[0], TORCH))
    monkeypatch.setattr(tuner, "candidates", lambda key, most=None: [TORCH, *GOOD] if key.gated else [TORCH])
    monkeypatch.setitem(LAUNCHERS, "good", launches())
    return clock


def test_stages(clock):
    clock.update({config: 10.0 + i for i, config in enumerate(GOOD)})
    clock.update({GOOD[7]: 9.0, GOOD[0]: 9.5})
    tuned = tuner.tune(problem(), CPU)
    assert tuned == tuner.TunedPlan(problem(), Plan(GOOD[7], TORCH), 109.0, 200.0)
    (all_of_them, _), (within_half, _), (whole, _), (last, _) = clock.asked
    assert all_of_them == {TORCH, *GOOD}
    assert within_half == {GOOD[7], *GOOD[:4]}
    assert whole == {Plan(GOOD[7], TORCH), Plan(GOOD[0], TORCH), UNFUSED}
    assert last == {Plan(GOOD[7], TORCH), UNFUSED}


def test_rounds_grow(clock):
    tuner.tune(problem(), CPU)
    rounds = [rounds for _, rounds in clock.asked]
    assert rounds == sorted(rounds)
    sizes = [len(things) for things, _ in clock.asked]
    assert sizes[:2] == [13, 8]


@pytest.mark.parametrize("key", [problem(m=1), problem(gated=False), problem(one_block=False, bias=False)], ids=str)
def test_problems_of_every_kind(clock, key):
    assert tuner.tune(key, CPU).key == key


def test_pairs_of_near_equals_are_compared_whole(clock):
    clock.update({GOOD[3]: 50.0, GOOD[5]: 51.0, Plan(GOOD[5], TORCH): 120.0})
    assert tuner.tune(problem(), CPU).plan == Plan(GOOD[5], TORCH)


def test_unfused_wins_only_if_it_is_faster(clock):
    clock.update(dict.fromkeys(GOOD, 50.0))
    for time_of_unfused, winner in ((149.0, UNFUSED), (150.0, Plan(GOOD[0], TORCH)), (151.0, Plan(GOOD[0], TORCH))):
        clock[UNFUSED] = time_of_unfused
        tuned = tuner.tune(problem(), CPU)
        assert tuned.plan == winner
        assert tuned.plan_us <= tuned.other_us == time_of_unfused


def test_the_rule_wins_if_its_pair_is_faster(clock):
    clock.update({GOOD[0]: 50.0, GOOD[1]: 40.0, Plan(GOOD[0], TORCH): 120.0})
    assert tuner.tune(problem(), CPU).plan == Plan(GOOD[0], TORCH)


@pytest.mark.parametrize("bias", [False, True])
def test_candidates_are_timed_with_the_biases_of_the_problem(clock, bias, monkeypatch):
    """`epilogue` is made for biases; without them it fills one with zeros in each call."""
    given = set()

    def launcher(call, config):
        return lambda x, weight, gate: given.add(weight.bias is not None) or x.new_zeros(call.n)

    monkeypatch.setitem(LAUNCHERS, "torch", launcher)
    monkeypatch.setattr(tuner, "candidates", lambda key: [TORCH])
    tuner.time_candidates(problem(gated=False, bias=bias).up, device=CPU)
    assert given == {bias}


@pytest.fixture
def bfloat16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_default_dtype_is_the_callers(bfloat16_by_default):
    """Bf16 has no number between 4080 and 4096."""
    launch = tuner.Launch.random(problem(m=4095, hidden=16, intermediate=16).up, CPU)
    assert tuner.correct(launch, [TORCH]) == [TORCH]


@pytest.mark.parametrize(
    "launcher, words",
    [
        (launches(lambda answer: answer * 1.01), "gives a wrong answer"),
        (launches(lambda answer: answer[:, :-1]), "gives a wrong answer"),
        (launches(with_gap), "gives a wrong answer"),
        (failing(PTXASError("bad code")), "does not compile"),
        (failing(OutOfResources(2, 1, "shared memory")), None),
    ],
    ids=["inexact", "shape", "gap", "compiler", "resources"],
)
def test_configurations_that_cannot_be_used(clock, launcher, words, monkeypatch, caplog):
    bad = TileConfig("bad")
    monkeypatch.setitem(LAUNCHERS, "bad", launcher)
    monkeypatch.setattr(tuner, "candidates", lambda key, most=None: [TORCH, bad, GOOD[1]])
    monkeypatch.setattr(tuner, "heuristic_plan", lambda key: Plan(bad, bad))
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args: empty_like(*args).fill_(float("nan")))
    clock.update({bad: 1.0, GOOD[1]: 10.0})
    with caplog.at_level(logging.WARNING):
        assert tuner.tune(problem(), CPU).plan == Plan(GOOD[1], GOOD[1])
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (2 if words else 0)
    assert all(words in message for message in messages)


def test_errors_that_are_no_fault_of_a_configuration_are_raised(clock, monkeypatch):
    monkeypatch.setitem(LAUNCHERS, "good", failing(torch.OutOfMemoryError("none left")))
    with pytest.raises(torch.OutOfMemoryError):
        tuner.tune(problem(), CPU)


def test_few_candidates_are_those_expected_fastest():
    """One of each kernel before others: the model expects the same of all tiles of `gemv`."""
    gpu = GPU("H100", 132, (9, 0), 232448)
    for m, kernels in ((2, {"gemv", "skinny"}), (16, {"skinny", "wide"})):
        key = problem(m=m, hidden=4096, intermediate=14336, dtype=torch.bfloat16, gpu=gpu).up
        torch_first, *few = tuner.candidates(key, 3)
        assert torch_first == TORCH and len(few) == 3 and set(few) <= set(tuner.candidates(key))
        assert {config.kernel for config in few} == kernels
        assert min(expected_us(key, config) for config in tuner.candidates(key)) == expected_us(key, few[0])


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 512])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_tuned_plan_is_in_effect(m, gated, plan_cache, caplog):
    gpu = GPU.of(torch.device("cuda", 0))
    key = problem(m=m, hidden=512, intermediate=1024, out=512, gated=gated, dtype=torch.bfloat16, gpu=gpu)
    start = time.monotonic()
    tuned = tuner.tune(key)
    assert time.monotonic() - start < 60
    assert not caplog.records, "a candidate is wrong or does not compile"
    assert 0 < tuned.plan_us <= tuned.other_us
    cache.save([tuned], gpu)
    assert dispatch.find_plan(key) == tuned.plan
    operands = MLPOperands.of(*random_mlp(512, 1024, gated, True, torch.bfloat16, "cuda"), "silu")
    assert dispatch.find_plan(dispatch.problem_key(m, operands)) == tuned.plan
