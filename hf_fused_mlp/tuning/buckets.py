"""Token counts that plans are measured for. Each plan also serves smaller counts, down to the next one in the list."""

from bisect import bisect_left
from dataclasses import replace
from typing import TypeVar

from hf_fused_mlp.types import ExpertsKey, ProblemKey, next_power_of_two

# From 128 tokens on, what is fastest depends on how many rounds of tiles there are: a plan for twice the tokens was up
# to 1.4 times as slow as the best one, and slower than eager (docs/notes-kernels.md, "Token counts of plans").
COUNTS = (
    *(1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 512, 640, 768),
    *(1024, 1280, 1536, 2048, 3072, 4096, 8192, 16384),
)

Key = TypeVar("Key", bound=ProblemKey | ExpertsKey)


def bucket(key: Key) -> Key:
    """The problem whose measured plan applies to `key`.

    The next of `COUNTS`, and beyond them and for experts the next power of two.
    """
    if isinstance(key, ExpertsKey) or key.m > COUNTS[-1]:
        return replace(key, m=next_power_of_two(key.m))
    return replace(key, m=COUNTS[bisect_left(COUNTS, key.m)])
