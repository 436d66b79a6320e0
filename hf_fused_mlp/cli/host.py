"""`hf-fused-mlp bench --host`: what a call of one module costs Python and the driver, whatever the GPU does."""

import random
import statistics
import time
from collections.abc import Iterator

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_fused_mlp.cli.results import Row
from hf_fused_mlp.cli.shapes import Shape, build, fused_twin

CALLS = 100  # few enough that the GPU's queue never is full
HIDDEN = 576
SMALL = (
    Shape("gated", "llama.LlamaMLP", HIDDEN, 1536, "silu"),
    Shape("packed", "phi3.Phi3MLP", HIDDEN, 1536, "silu"),
    Shape("plain", "gpt_neox.GPTNeoXMLP", HIDDEN, 1536, "gelu"),
)


@torch.no_grad()
def host(tokens: list[int], dtype: torch.dtype, rounds: int = 30) -> Iterator[list[Row]]:
    """Microseconds of the host for a call of the original and of the fused module."""
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
    """Modules by kind, so small that the GPU keeps up with the host."""
    mlps = [build(shape, dtype) for shape in SMALL]
    yield from zip((shape.name for shape in SMALL), mlps, strict=True)
    yield "norm", LlamaRMSNorm(HIDDEN).to(next(mlps[0].parameters())).eval()


def host_us(module: torch.nn.Module, x: torch.Tensor) -> float:
    """Microseconds a call, until it returns."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        module(x)
    return (time.perf_counter() - start) / CALLS * 1e6


def table(rows: list[Row]) -> str:
    """A line a kind and token count."""
    lines = ["| kind | M | original, us | fused, us | fused / original |", "|---|---:|---:|---:|---:|"]
    us = {(row["kind"], row["m"], row["impl"]): row["host_us"] for row in rows}
    for kind, m, impl in us:
        if impl == "original":
            original, fused = us[kind, m, "original"], us[kind, m, "fused"]
            lines.append(f"| {kind} | {m} | {original:.1f} | {fused:.1f} | {fused / original:.2f} |")
    return "\n".join(lines)
