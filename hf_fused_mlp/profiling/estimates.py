"""The arithmetic of an audit: what bounds a phase, what fusing gains and can gain, what a token costs."""

import statistics
from collections.abc import Sequence
from itertools import accumulate
from math import comb

import torch
from torch.utils.benchmark import Timer

from hf_fused_mlp.profiling.report import Roofline, Speedup

HOST_BOUND_BELOW = 0.7
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


def direction(speedup: Speedup) -> str:
    """What the interval says: `"faster"`, `"slower"`, `"the same"`, or `"unknown"` after too few rounds."""
    if speedup.confidence < CONFIDENCE:
        return "unknown"
    return "faster" if speedup.low > 1 else "slower" if speedup.high < 1 else "the same"


def bound_of(gpu_busy_share: float | None, flops_per_byte: float, ridge: float) -> str:
    """What a phase waits for.

    The host, if the GPU works less than 70 % of the time. Otherwise what its MLPs wait for: memory where they do fewer
    operations for a byte of weights than the device could (`ridge`), arithmetic where they do more. A CPU has no busy
    share.
    """
    if gpu_busy_share is not None and gpu_busy_share < HOST_BOUND_BELOW:
        return "host-bound"
    return "compute-bound" if flops_per_byte >= ridge else "memory-bound"


def amdahl(share: float, gain: float) -> float:
    """How many times shorter the whole becomes when a part of it, `share`, becomes `gain` times shorter."""
    return 1 / (1 - share + share / gain)


def dollars_per_1m_tokens(price_per_hour: float | None, us: float, tokens: int) -> float | None:
    """The price of a million tokens when `tokens` take `us` microseconds."""
    return None if price_per_hour is None else price_per_hour / 3600 * us / tokens


def roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measures it, in about a second."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    dtype = dtype if dtype in (torch.float32, torch.float16) else torch.bfloat16
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    source = torch.zeros(1 << (28 if on_gpu else 26), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    names = {"a": a, "b": b, "source": source, "target": target, "torch": torch}
    threads = torch.get_num_threads()

    def seconds(statement: str) -> float:
        return Timer(statement, globals=names, num_threads=threads).blocked_autorange(min_run_time=0.2).median

    return Roofline(
        tflops=2 * size**3 / seconds("torch.mm(a, b)") / 1e12,
        tbps=2 * source.nbytes / seconds("target.copy_(source)") / 1e12,
    )
