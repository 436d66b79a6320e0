"""`hf-fused-mlp bench host`: the host time of a module call (Python and the driver), original and fused."""

import random
import statistics
import time
from collections.abc import Iterator

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_fused_mlp.bench.results import Row
from hf_fused_mlp.bench.shapes import Shape, build, fused_twin

CALLS = 100  # few enough that the queue of the GPU never fills up
HIDDEN = 576
SMALL = (
    Shape("gated", "llama.LlamaMLP", HIDDEN, 1536, "silu"),
    Shape("packed", "phi3.Phi3MLP", HIDDEN, 1536, "silu"),
    Shape("plain", "gpt_neox.GPTNeoXMLP", HIDDEN, 1536, "gelu"),
)


@torch.no_grad()
def measure(tokens: list[int], dtype: torch.dtype, rounds: int = 30) -> Iterator[list[Row]]:
    """Times calls of small MLPs and a norm until they return, without waiting for the GPU.

    Args:
        tokens: values of M; inputs are `[1, M, HIDDEN]`.
        rounds: rounds in which original and fused take turns; a first one is not counted.

    Yields:
        For each module kind and M the rows of both forms, medians in microseconds per call.
    """
    for kind, original in _small(dtype):
        is_norm = kind == "norm"
        forms = {"original": original, "fused": fused_twin(original, strict=not is_norm, norms=is_norm)}
        for m in tokens:
            x = torch.randn(1, m, HIDDEN, device=next(original.parameters()).device, dtype=dtype)
            times: dict[str, list[float]] = {impl: [] for impl in forms}
            for round_ in range(1 + rounds):
                for impl in random.sample(list(forms), 2):
                    us = host_us(forms[impl], x)
                    if round_:
                        times[impl].append(us)
            yield [
                {"kind": kind, "m": m, "impl": impl, "host_us": round(statistics.median(values), 2)}
                for impl, values in times.items()
            ]


def _small(dtype: torch.dtype) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules by kind, small enough that the GPU keeps up with the host."""
    mlps = [build(shape, dtype) for shape in SMALL]
    yield from zip((shape.name for shape in SMALL), mlps, strict=True)
    yield "norm", LlamaRMSNorm(HIDDEN).to(next(mlps[0].parameters())).eval()


def host_us(module: torch.nn.Module, x: torch.Tensor) -> float:
    """Microseconds until a call returns, the mean of `CALLS` calls."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        module(x)
    return (time.perf_counter() - start) / CALLS * 1e6


def table(rows: list[Row]) -> str:
    """One line per module kind and token count."""
    lines = ["| kind | M | original, us | fused, us | fused / original |", "|---|---:|---:|---:|---:|"]
    us = {(row["kind"], row["m"], row["impl"]): row["host_us"] for row in rows}
    for kind, m, impl in us:
        if impl == "original":
            original, fused = us[kind, m, "original"], us[kind, m, "fused"]
            lines.append(f"| {kind} | {m} | {original:.1f} | {fused:.1f} | {fused / original:.2f} |")
    return "\n".join(lines)
