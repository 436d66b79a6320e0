"""Triton helpers that the kernels of routed experts share."""

import triton
import triton.language as tl

from hf_fused_mlp.kernels._common import activate


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
