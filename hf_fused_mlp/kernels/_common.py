"""Triton helpers that the kernel families share."""

from collections.abc import Hashable

import torch
import triton
import triton.language as tl

_binaries: dict[Hashable, object] = {}


def launch(kernel, key: Hashable, grid: tuple[int, int, int], args: tuple, tensors: tuple, **options) -> None:
    """``kernel[grid](*args, **options)``, with the binary that an earlier launch of the same `key` compiled.

    Triton looks at every argument of every launch to find the binary, which takes the host longer than to launch it.
    Triton's launch hooks, which some profilers set, see the first launch of a key only.

    Args:
        key: all that Triton tells binaries apart by: dtype, device, integers, constants, options, what is None.
            (For AMD it would have to say which tensors exceed 2 GB.)
        grid: of the current device, which must be the tensors'.
        args: the kernel's arguments, constants included.
        tensors: those of `args`, bare or in a descriptor, whose alignment matters.
    """
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    if addresses % 16:  # a kept binary reads 16 bytes at a time
        kernel[grid](*args, **options)
    elif binary := _binaries.get((kernel, key)):
        stream = torch._C._cuda_getCurrentRawStream(tensors[0].device.index)
        binary.run(*grid, stream, binary.function, binary.packed_metadata, None, None, None, *args)
    elif binary := kernel[grid](*args, **options):  # the interpreter has none
        _binaries[kernel, key] = binary


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """`ACTIVATIONS[ACTIVATION]` of fp32 `x`: the twin of the table in `hf_fused_mlp.activations`."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(y)) is the logistic function of 2 * y
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "quick_gelu":
        return x / (1.0 + tl.exp(-1.702 * x))
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
