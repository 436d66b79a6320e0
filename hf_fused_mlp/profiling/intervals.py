"""Speedups with intervals, from the times of paired rounds."""

import statistics
from collections.abc import Sequence
from itertools import accumulate
from math import comb
from typing import Literal

from hf_fused_mlp.profiling.report import Speedup

CONFIDENCE = 0.95
ENOUGH_ROUNDS = 6  # fewer rounds give no interval of that confidence


def speedup(before: Sequence[float], after: Sequence[float]) -> Speedup:
    """The speedup from `before` to `after`, which are times of the same rounds.

    The interval comes from order statistics: each round is equally likely to be above or below the true median, for
    any distribution, so counting rounds gives the probability that the median lies between two of them. We take
    the narrowest symmetric pair that has `CONFIDENCE`, or the shortest and longest round if none has.
    """
    ratios = sorted(b / a for b, a in zip(before, after, strict=True))
    # at `i`: the probability that at most `i` of the rounds are below the true median
    below = [count / 2 ** len(ratios) for count in accumulate(comb(len(ratios), i) for i in range(len(ratios)))]
    left_out = max((i for i, tail in enumerate(below) if 1 - 2 * tail >= CONFIDENCE), default=0)
    confidence = 1 - 2 * below[left_out]
    return Speedup(statistics.median(ratios), ratios[left_out], ratios[-1 - left_out], confidence)


def direction(speedup: Speedup) -> Literal["faster", "slower", "the same", "unknown"]:
    """What the interval shows; `"unknown"` after too few rounds."""
    if speedup.confidence < CONFIDENCE:
        return "unknown"
    return "faster" if speedup.low > 1 else "slower" if speedup.high < 1 else "the same"
