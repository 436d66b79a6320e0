"""The rule by which a fused output counts as right."""

import torch
from torch import Tensor

RELATIVE_RMS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def inaccuracy(fused: Tensor, eager: Tensor, oracle: Tensor) -> str | None:
    """Why `fused` is not as good an answer as `eager`, or None if it is.

    Its largest error may be twice eager's, and its RMS error relative to the oracle's RMS at most `RELATIVE_RMS`. An
    oracle whose RMS is not over 0.1 decides nothing, since a tolerance could exceed the signal.

    Args:
        fused, eager: the two outputs, any one shape, both in the dtype under test.
        oracle: the same computed in float64 on the same rounded inputs.
    """
    if fused.shape != oracle.shape or fused.dtype != eager.dtype:
        return f"shape and dtype are {list(fused.shape)} {fused.dtype}, expected {list(oracle.shape)} {eager.dtype}"
    signal = _rms(oracle)
    if not signal > 0.1:
        return f"the oracle's RMS is {signal:.3g}, too small to judge by"
    error, allowed = _largest(fused - oracle), 2 * _largest(eager - oracle) + 1e-6
    if not error <= allowed:
        return f"largest error {error:.3g}, allowed {allowed:.3g}"
    relative, limit = _rms(fused - oracle) / signal, RELATIVE_RMS[fused.dtype]
    if not relative <= limit:
        return f"relative RMS error {relative:.3g}, allowed {limit:.3g}"
    return None


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _largest(x: Tensor) -> float:
    return x.abs().max().item()
