"""Triton helpers that the kernels of routed experts share, and what their launchers share."""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from hf_fused_mlp.kernels._common import activate
from hf_fused_mlp.kernels._fp8 import weight_reader
from hf_fused_mlp.types import ExpertsCall


def reader(call: ExpertsCall) -> Callable[[Tensor], Tensor]:
    """How kernels read the weights: unchanged, or FP8 as bytes if the GPU has no instruction for it."""
    return weight_reader(call.device) if call.storage == "fp8" else lambda weight: weight


@triton.jit
def combine(
    gate,
    up,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    SHORT: tl.constexpr,
):
    """``act(gate) * (up + UP_OFFSET)``, or ``act(up)``; a LIMIT clamps gate from above and up on both sides."""
    if GATED:
        if LIMIT > 0:  # `where` keeps NaN, unlike a minimum
            gate = tl.where(gate > LIMIT, LIMIT, gate)
            up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        if UP_OFFSET != 0:
            up += UP_OFFSET
        return activate(gate, ACTIVATION, SHORT) * up
    else:
        return activate(up, ACTIVATION, SHORT)
