"""How many times faster one form is than another, with an interval, from times of paired rounds."""

import statistics
from collections.abc import Sequence
from itertools import accumulate
from math import comb
from typing import Literal

from hf_fused_mlp.profiling.report import Speedup

CONFIDENCE = 0.95
ENOUGH_ROUNDS = 6  # fewer give no interval of that confidence


def speedup(before: Sequence[float], after: Sequence[float]) -> Speedup:
    """How many times shorter `after` is than `before`, times of the same rounds.

    The interval is one of order statistics: each round is above the true median as often as below, whatever the
    distribution, so counting rounds says how likely it lies between two of them. The narrowest pair, as far from one
    end as from the other, that has `CONFIDENCE` is taken; the shortest and longest round where none has.
    """
    ratios = sorted(b / a for b, a in zip(before, after, strict=True))
    # at `i`: how likely at most `i` of the rounds are below the true median
    below = [count / 2 ** len(ratios) for count in accumulate(comb(len(ratios), i) for i in range(len(ratios)))]
    left_out = max((i for i, tail in enumerate(below) if 1 - 2 * tail >= CONFIDENCE), default=0)
    confidence = 1 - 2 * below[left_out]
    return Speedup(statistics.median(ratios), ratios[left_out], ratios[-1 - left_out], confidence)


def direction(speedup: Speedup) -> Literal["faster", "slower", "the same", "unknown"]:
    """What the interval says; `"unknown"` after too few rounds."""
    if speedup.confidence < CONFIDENCE:
        return "unknown"
    return "faster" if speedup.low > 1 else "slower" if speedup.high < 1 else "the same"
