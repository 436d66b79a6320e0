"""Triton helpers of the kernels that read FP8 weights, and what their launchers share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fused_mlp.types import FP8, GPU

LARGEST = 448.0  # number of e4m3


@triton.jit
def from_fp8(w, dtype: tl.constexpr):
    """The numbers of e4m3 `w` in `dtype`, exactly. `w` is FP8, or uint8 where the GPU has no instruction for FP8."""
    if w.dtype == tl.uint8:
        # the same exponent and mantissa in fp16, whose exponents are 8 less
        bits = ((w & 0x80).to(tl.uint16) << 8) | ((w & 0x7F).to(tl.uint16) << 7)
        numbers = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((w & 0x7F) == 0x7F, float("nan"), numbers).to(dtype)
    else:
        return w.to(dtype)


@triton.jit
def load_scale(ptr, mask):
    """fp32 scales; those of e8m0, which come as uint8, are exponents of two."""
    scale = tl.load(ptr, mask=mask, other=0)
    if scale.dtype == tl.uint8:
        exponent = scale.to(tl.int32)
        bits = tl.where(exponent == 0, 0x400000, tl.where(exponent == 255, 0x7FC00000, exponent << 23))
        return bits.to(tl.float32, bitcast=True)
    else:
        return scale


@triton.jit
def scales_to(x, AXIS: tl.constexpr, LARGEST: tl.constexpr):
    """What to divide fp32 `x` by so that its largest elements along `AXIS` are `LARGEST`; 1 for zeros.

    No scale is so small that its inverse would be infinite.
    """
    scale = tl.max(tl.abs(x), AXIS) / LARGEST
    return tl.where(scale == 0, 1.0, tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale))


@triton.jit
def scaled_to(x, LARGEST: tl.constexpr):
    """fp32 `x` `[blocks, elements]` over the scale of each block (see `scales_to`), and the scales."""
    scale = scales_to(x, 1, LARGEST)
    return x / scale[:, None], scale


def weight_reader(device: torch.device):
    """How kernels on `device` read FP8 weights: unchanged, or as bytes if the GPU has no instruction for FP8."""
    has_fp8 = GPU.of(device).capability >= (8, 9)
    return (lambda weight: weight) if has_fp8 else as_bytes


def as_bytes(tensor: Tensor | None) -> Tensor | None:
    """`tensor`, of one byte an element, as uint8."""
    return None if tensor is None else tensor.view(torch.uint8)


def scale_for_kernels(scale: Tensor | None) -> Tensor | None:
    """`scale` as `load_scale` takes it."""
    return scale if scale is None or scale.dtype == torch.float32 else as_bytes(scale)


def why_not_fp8(storage: str) -> str | None:
    """Why a kernel for FP8 weights does not run those of another storage; None if it does."""
    return None if storage == "fp8" else f"made for weights in {FP8}"
