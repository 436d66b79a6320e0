"""`hf-fused-mlp bench writeup`: every kernel launch of the MLP that the published write-up measures.

The write-up times a GeGLU MLP (tanh) of 768 x 3072 on 64 x 128 tokens in bf16 with `torch.profiler` and the schedule
wait=1, warmup=1, active=3. This makes the same table, with the time of a whole call.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from hf_fused_mlp.bench.measuring import judged, mlp_row
from hf_fused_mlp.bench.results import Row
from hf_fused_mlp.bench.shapes import Shape, build, fused_twin
from hf_fused_mlp.profiling.trace import ON_GPU
from hf_fused_mlp.tuning.timing import round_robin

SHAPE = Shape("writeup-768x3072", "gemma2.Gemma2MLP", 768, 3072, "gelu_pytorch_tanh")
TOKENS = 64 * 128
WAIT, WARMUP, ACTIVE = 1, 1, 3
_GEMM = re.compile("gemm|nvjet|cutlass|cublas", re.IGNORECASE)


@torch.no_grad()
def measure(names: list[str], dtype: torch.dtype = torch.bfloat16) -> list[Row]:
    """Profiles and times one call of each implementation.

    Args:
        names: keys of `IMPLEMENTATIONS`.

    Returns:
        One row for each implementation that is available here. `kernels` lists the launches of a call in order, each
        with its name and its mean microseconds over the profiled calls; the median is of a whole call, unprofiled.

    Raises:
        AssertionError: the fused MLP is outside its tolerance.
        RuntimeError: the profiler saw no kernels.
    """
    torch.compiler.reset()
    eager = build(SHAPE, dtype).requires_grad_(False)
    fused = fused_twin(eager)
    x = torch.randn(TOKENS, SHAPE.hidden, device=next(eager.parameters()).device, dtype=dtype)
    calls = judged(names, eager, fused, x, f"{SHAPE.name}, M = {TOKENS}")
    kernels = {name: profiled(call) for name, call in calls.items()}
    timings = round_robin(calls)
    kind = fused.fused_spec.kind
    return [
        mlp_row(SHAPE, TOKENS, dtype, kind, name, timing) | {"kernels": kernels[name]}
        for name, timing in timings.items()
    ]


def profiled(call: Callable[[], object]) -> list[dict[str, Any]]:
    """The kernel launches of one call, as returned by `launches_of`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        with profile(
            activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA],
            schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
        ) as profiler:
            for _ in range(WAIT + WARMUP + ACTIVE):
                call()
                torch.cuda.synchronize()  # a kernel belongs to the step in which it was launched
                profiler.step()
        events = json.loads(path.read_text(), strict=False)["traceEvents"]
    return launches_of(events)


def launches_of(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kernels of a trace of `ACTIVE` calls, in the order of one call, with their mean time in microseconds.

    Raises:
        RuntimeError: there are no kernels, or the calls launch different ones.
    """
    found = sorted((event for event in events if event.get("cat") in ON_GPU), key=lambda event: event["ts"])
    if not found:
        raise RuntimeError("the profiler saw no kernels; end other profilers of this GPU")
    count, rest = divmod(len(found), ACTIVE)
    steps = [found[step * count :][:count] for step in range(ACTIVE)]
    names = [[event["name"] for event in step] for step in steps]
    if rest or any(step != names[0] for step in names):
        raise RuntimeError(f"{ACTIVE} calls launch different kernels: {', '.join(event['name'] for event in found)}")
    return [
        {"name": same[0]["name"], "us": round(sum(event["dur"] for event in same) / ACTIVE, 2)}
        for same in zip(*steps, strict=True)
    ]


def table(rows: list[Row]) -> str:
    """One line per implementation, eager first: launches, the milliseconds of each, their sum, and a whole call."""
    columns = ("", "launches", "each launch, ms", "pointwise, ms", "kernels, ms", "whole call, ms", "over eager")
    lines = [f"| {' | '.join(columns)} |", "|---|---:|---|---:|---:|---:|---:|"]
    rows = sorted(rows, key=lambda row: (row["impl"] == "fused", row["impl"] != "eager"))
    eager = next((row["median_us"] for row in rows if row["impl"] == "eager"), None)
    for row in rows:
        kernels = [
            ("GEMM" if _GEMM.search(kernel["name"]) else "pointwise", kernel["us"]) for kernel in row["kernels"]
        ]
        pointwise = sum(us for what, us in kernels if what == "pointwise")
        cells = [row["impl"], str(len(kernels)), ", ".join(f"{what} {us / 1e3:.3f}" for what, us in kernels)]
        cells += [f"{pointwise / 1e3:.4f}" if pointwise else "-", f"{sum(us for _, us in kernels) / 1e3:.4f}"]
        cells += [f"{row['median_us'] / 1e3:.4f}", f"{eager / row['median_us']:.2f}x" if eager else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _what(kernel: str) -> str:
    return "GEMM" if _GEMM.search(kernel) else "pointwise"
