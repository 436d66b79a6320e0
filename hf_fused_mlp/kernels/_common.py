"""Triton helpers that the kernels share."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def divide(a, b, NATIVE: tl.constexpr):
    """``a / b``, in two instructions instead of six where NVIDIA's own will do."""
    if NATIVE:
        return libdevice.fast_dividef(a, b)
    else:
        return a / b


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, SHORT: tl.constexpr):
    """`ACTIVATIONS[ACTIVATION]` of fp32 `x`: the twin of the table in `hf_fused_mlp.activations`.

    SHORT is for results that will be rounded to 16 bits on an NVIDIA GPU: relative errors reach 5e-6.
    """
    # exp2 is the hardware's function, so each constant carries a factor log2(e)
    if ACTIVATION == "silu":
        return divide(x, 1.0 + tl.exp2(-1.4426950408889634 * x), SHORT)
    elif ACTIVATION == "gelu":
        if SHORT:
            # erfc(|x| / sqrt(2)) / 2 is exp(-x^2 / 2) times a polynomial in t, fitted for the relative error
            t = divide(1.0, 1.0 + 0.31 * tl.abs(x), True)
            tail = ((-0.07392665 * t + 0.18044337) * t + 0.01575214) * t + 0.13342605
            tail = ((tail * t + 0.12044216) * t + 0.12386062) * t * tl.exp2(-0.7213475204444817 * x * x)
            return x * tl.where(x < 0, tail, 1.0 - tail)
        else:
            return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(y)) is the logistic function of 2 * y
        return divide(x, 1.0 + tl.exp2(-2.302208198144325 * (x + 0.044715 * x * x * x)), SHORT)
    elif ACTIVATION == "quick_gelu":
        return divide(x, 1.0 + tl.exp2(-2.455466959593048 * x), SHORT)
    elif ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)  # unlike a maximum, it keeps NaN
    elif ACTIVATION == "relu2":
        return tl.where(x < 0, 0.0, x * x)
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
        return x


@triton.jit
def add_bias(acc, bias_ptr, offs, mask, AXIS: tl.constexpr):
    """`acc` (fp32) plus `bias[offs]` broadcast along the new axis `AXIS`; `acc` itself where `bias_ptr` is None."""
    if bias_ptr is None:
        return acc
    else:
        bias = tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        return acc + tl.expand_dims(bias, AXIS)


@triton.jit
def grouped_tile(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Row and column of a tile, in groups of `GROUP_M` rows so that neighbours in time share operands in L2."""
    width = GROUP_M * num_n
    first_m = (tile // width) * GROUP_M
    size_m = min(num_m - first_m, GROUP_M)
    return first_m + (tile % width) % size_m, (tile % width) // size_m
