"""An audit's verdict, on made-up measurements."""

import random
import statistics

import pytest
from made_up import made_up_report, rounds_us

from hf_fused_mlp.profiling.figures import shown_speedup
from hf_fused_mlp.profiling.intervals import CONFIDENCE, ENOUGH_ROUNDS, direction, speedup
from hf_fused_mlp.profiling.verdict import better_form


def test_pairs_leave_out_drift():
    """The times of a form differ by a tenth, the ratios of a round by a hundredth."""
    gain = speedup(rounds_us(100.0), rounds_us(100.0, 1.05))
    assert (gain.low, gain.high) == (pytest.approx(1.04), pytest.approx(1.06))
    assert gain.median == pytest.approx(1.05)
    assert direction(gain) == "faster"


@pytest.mark.parametrize(
    "rounds, left_out, confidence",
    [(1, 0, 0), (2, 0, 0.5), (5, 0, 0.9375), (6, 0, 0.96875), (8, 0, 0.9921875), (9, 1, 0.9609375), (12, 2, 0.9614)],
)
def test_the_interval_is_of_order_statistics(rounds, left_out, confidence):
    ratios = [1 + i / 100 for i in range(rounds)]
    gain = speedup(random.Random(0).sample(ratios, rounds), [1.0] * rounds)
    assert (gain.low, gain.high) == (ratios[left_out], ratios[-1 - left_out])
    assert gain.confidence == pytest.approx(confidence, abs=1e-4)
    assert (gain.confidence >= CONFIDENCE) == (rounds >= ENOUGH_ROUNDS)
    assert gain.median == statistics.median(ratios)


def test_the_interval_holds_the_true_median_as_often_as_it_says():
    """Ratios of a skewed distribution, as of rounds that something interrupts."""
    draw = random.Random(0)
    trials, hits = 2000, 0
    for _ in range(trials):
        gain = speedup([draw.expovariate(1.0) for _ in range(9)], [1.0] * 9)
        hits += gain.low <= 0.6931 <= gain.high
    assert 0.95 < hits / trials < 0.98


@pytest.mark.parametrize(
    "forms, fuse, form, headline",
    [
        ({"fused": 1.1, "norms": 1.3}, True, "fused_norms", "Fuse: fuse_model(model, norms=True)"),
        ({"fused": 1.1, "norms": 1.1}, True, "fused", "Fuse: fuse_model(model)"),
        ({"fused": 1.1, "norms": None}, True, "fused", "Fuse: fuse_model(model)"),
        ({"fused": 1.0, "norms": 1.3}, True, "fused_norms", "Fuse: fuse_model(model, norms=True)"),
        ({"fused": None, "norms": 1.3}, True, "fused_norms", "Fuse: fuse_model(model, norms=True)"),
        ({"fused": 1.0, "norms": 1.0}, False, "fused", "No measurable difference"),
        ({"fused": 0.9, "norms": 0.9}, False, "fused", "Do not fuse: it is slower here"),
        ({"fused": 1.1, "norms": 1.3, "rounds": 5}, None, "fused", "Too few rounds for a verdict"),
        ({"fused": None, "norms": None}, False, None, "Nothing to fuse"),
        ({"fused": None, "norms": None, "on_gpu": False}, None, None, "No verdict on a CPU"),
    ],
)
def test_the_verdict(forms, fuse, form, headline):
    verdict = made_up_report(**forms).verdict
    assert (verdict.fuse, verdict.form, verdict.headline) == (fuse, form, headline)
    assert (verdict.speedup is None) == (form is None)
    assert verdict.reason.endswith(".")


def test_norms_are_recommended_where_they_alone_make_a_difference():
    """Neither is far enough from the other, and only with norms is it far enough from eager."""
    eager = [100.0] * 6
    fused = [99.0, 99.0, 99.0, 99.0, 99.0, 101.0]
    norms = [98.0, 98.0, 99.5, 98.0, 98.0, 98.0]
    assert better_form({"original": eager, "fused": fused, "fused_norms": norms}) == "fused_norms"


def test_a_phase_that_is_slower_is_said():
    advice = made_up_report(fused=0.9, norms=0.9).advice
    assert "Decode is slower fused (0.90x); tune it, or leave the model as it is for this." in advice
    assert not any("slower" in sentence for sentence in made_up_report().advice)


@pytest.mark.parametrize(
    "faster, rounds, words",
    [
        (1.3, 9, "1.30x (1.29x to 1.31x)"),
        (1.0, 9, "no measurable difference (0.99x to 1.01x)"),
        (1.3, 2, "1.31x (too few rounds)"),
    ],
)
def test_how_a_speedup_is_written(faster, rounds, words):
    assert shown_speedup(speedup(rounds_us(1.0, rounds=rounds), rounds_us(1.0, faster, rounds))) == words
    assert shown_speedup(None) == "-"
