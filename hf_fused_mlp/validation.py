"""The rule that decides whether a fused output is accurate enough."""

from dataclasses import dataclass

import torch
from torch import Tensor

RELATIVE_RMS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Errors:
    """How far an output is from the oracle: its largest error, and its RMS error relative to the oracle's RMS."""

    largest: float
    relative_rms: float

    @staticmethod
    def of(output: Tensor, oracle: Tensor) -> "Errors":
        error = output - oracle
        return Errors(error.abs().max().item(), rms(error).item() / rms(oracle).item())


def inaccuracy(fused: Tensor, eager: Tensor, oracle: Tensor, quantized: bool = False) -> str | None:
    """Why `fused` is less accurate than the rule allows, or None.

    Its largest error may be twice eager's. Its RMS error relative to the oracle's RMS may be at most `RELATIVE_RMS`.
    The RMS of the oracle must be above 0.1, because otherwise the tolerance could exceed the signal.

    Args:
        fused, eager: the two outputs, any one shape, both in the dtype under test.
        oracle: the output in float64 for the same rounded inputs.
        quantized: eager rounds its inputs to FP8, so the RMS error too may be twice eager's.
    """
    if reason := mismatch(fused, eager, oracle):
        return reason
    signal = rms(oracle).item()
    if not signal > 0.1:
        return f"the oracle's RMS is {signal:.3g}, too small to judge by"
    return excess(Errors.of(fused, oracle), Errors.of(eager, oracle), fused.dtype, quantized)


def mismatch(fused: Tensor, eager: Tensor, oracle: Tensor) -> str | None:
    """How the shape or dtype of `fused` is wrong, or None."""
    if fused.shape == oracle.shape and fused.dtype == eager.dtype:
        return None
    return f"shape and dtype are {list(fused.shape)} {fused.dtype}, expected {list(oracle.shape)} {eager.dtype}"


def excess(fused: Errors, eager: Errors, dtype: torch.dtype, quantized: bool = False) -> str | None:
    """Which limit of the rule is exceeded, or None, for outputs in `dtype` of about unit size."""
    allowed, limit = 2 * eager.largest + 1e-6, RELATIVE_RMS[dtype]
    if quantized:
        limit = max(limit, 2 * eager.relative_rms)
    if not fused.largest <= allowed:
        return f"largest error {fused.largest:.3g}, allowed {allowed:.3g}"
    if not fused.relative_rms <= limit:
        return f"relative RMS error {fused.relative_rms:.3g}, allowed {limit:.3g}"
    return None


def rms(x: Tensor, dim: int | None = None) -> Tensor:
    """The root mean square in float64, over all of `x` or over `dim`, which is kept as 1."""
    return x.double().square().mean(dim, keepdim=dim is not None).sqrt()
