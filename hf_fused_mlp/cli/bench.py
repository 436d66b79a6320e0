"""`hf-fused-mlp bench`: one MLP of each published shape, fused against what it replaces, on this GPU."""

import copy
import datetime
import json
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.progress import track
from torch import nn

from hf_fused_mlp.cli.console import console, fail
from hf_fused_mlp.cli.shapes import SHAPES, Shape, build
from hf_fused_mlp.fuse import fuse_model
from hf_fused_mlp.tuning.timing import GRAPHS_UP_TO, Timing, round_robin, round_robin_graphs, weight_copies
from hf_fused_mlp.types import MLPKind
from hf_fused_mlp.validation import inaccuracy


def bench(
    shapes: Annotated[str, typer.Option(help="Shapes, comma-separated, or 'all'.")] = "llama-3-8b,pythia-6.9b",
    m: Annotated[str, typer.Option(help="Token counts, comma-separated.")] = "1,16,512,4096",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    candidates: Annotated[bool, typer.Option("--candidates", help="Time every tile configuration instead.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the measurements.")] = None,
    table: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Measure nothing; print these rows of an earlier run's JSON."),
    ] = None,
) -> None:
    """Time fused MLPs against Transformers' own, on the GPU: correctness first, then in turn within one run."""
    names = list(SHAPES) if shapes == "all" else shapes.split(",")
    if unknown := [name for name in names if name not in SHAPES]:
        fail(f"unknown shape {unknown[0]!r}; the shapes are {', '.join(SHAPES)}")
    try:
        tokens = [int(count) for count in m.split(",")]
    except ValueError:
        fail(f"m {m!r}: expected token counts, comma-separated, such as 1,16")
    if dtype not in ("bfloat16", "float16"):
        fail(f"dtype {dtype!r}: expected bfloat16 or float16")

    if table is not None:
        rows = json.loads(table.read_text())["rows"]
        rows = [row for row in rows if row["shape"] in names and row["m"] in tokens]
    elif torch.cuda.is_available():
        result = environment()
        problems = [(SHAPES[name], count) for name in names for count in tokens]
        rows = []
        for shape, count in track(problems, "measuring", console=console):
            rows += (measure_candidates if candidates else measure)(shape, count, getattr(torch, dtype))
        if json_file is not None:
            lines = ",\n  ".join(json.dumps(row) for row in rows)
            json_file.write_text(f'{json.dumps(result)[:-1]}, "rows": [\n  {lines}\n]}}\n')
    else:
        fail("bench needs a CUDA GPU, and PyTorch finds none; `bench --table FILE` prints an earlier run")
    print(candidates_table(rows) if any("launch" in row for row in rows) else markdown_table(rows))


def environment() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "transformers": metadata.version("transformers"),
        "date": datetime.date.today().isoformat(),
        "copy_tbps": round(copy_tbps(), 3),
    }


def copy_tbps() -> float:
    """Terabytes a second that a large copy on the device moves, bytes read plus bytes written."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    timing = round_robin({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * source.nbytes / timing.median_us / 1e6


@torch.no_grad()
def measure(shape: Shape, m: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The rows of one shape at `m` tokens: eager, fused, and the two bare GEMMs that no kernel can do without."""
    eager = build(shape, dtype)
    fused = fuse_model(copy.deepcopy(eager), strict=True)
    x = torch.randn(m, shape.hidden, device="cuda", dtype=dtype)
    if reason := inaccuracy(fused(x), eager(x), copy.deepcopy(eager).double()(x.double())):
        raise AssertionError(f"{shape.name}, M = {m}: the fused MLP is wrong, so it is not timed: {reason}")

    if m <= GRAPHS_UP_TO:
        copies = weight_copies(sum(p.nbytes for p in eager.parameters()))
        sets = [implementations(copy.deepcopy(eager), copy.deepcopy(fused), x) for _ in range(copies)]
        timings = round_robin_graphs({name: [calls[name] for calls in sets] for name in sets[0]})
    else:
        timings = round_robin(implementations(eager, fused, x))
    return [row(shape, m, dtype, fused.mlp_spec.kind, name, timing) for name, timing in timings.items()]


@torch.no_grad()
def measure_candidates(shape: Shape, m: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Every configuration of both launches of one shape at `m` tokens, fastest first."""
    from hf_fused_mlp.dispatch import problem_key  # these two import Triton
    from hf_fused_mlp.tuning.tuner import time_candidates

    mlp = fuse_model(build(shape, dtype), strict=True)
    gate, up, down, *_, activation = mlp.operands()
    key = problem_key(m, gate, up, down, activation)
    rows = []
    for launch, linear_key in (("up", key.up), ("down", key.down)):
        timings = sorted(time_candidates(linear_key).items(), key=lambda item: item[1].median_us)
        for config, timing in timings:
            rows.append({"shape": shape.name, "m": m, "launch": launch, **asdict(config), **rounded(timing)})
    return rows


def implementations(eager: nn.Module, fused: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """What is timed, each a call without arguments."""
    gate, up, down, *_ = fused.operands()
    first = up if gate is None else torch.cat((gate, up))
    h = torch.randn(x.shape[0], down.shape[1], device=x.device, dtype=x.dtype)

    def two_gemms():
        F.linear(x, first)
        F.linear(h, down)

    return {"eager": lambda: eager(x), "fused": lambda: fused(x), "two-gemms": two_gemms}


def row(shape: Shape, m: int, dtype: torch.dtype, kind: MLPKind, impl: str, timing: Timing) -> dict[str, Any]:
    return {
        "shape": shape.name,
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "kind": kind.value,
        "activation": shape.activation,
        "dtype": str(dtype).removeprefix("torch."),
        "m": m,
        "impl": impl,
        **rounded(timing),
    }


def rounded(timing: Timing) -> dict[str, float]:
    return {name: round(value, 2) for name, value in asdict(timing).items()}


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table: median microseconds, and how many times faster than eager fused is."""
    times: dict[tuple, dict[str, float]] = {}
    for entry in rows:
        times.setdefault((entry["shape"], entry["dtype"], entry["m"]), {})[entry["impl"]] = entry["median_us"]
    lines = [
        "| shape | dtype | M | eager, us | fused, us | two bare GEMMs, us | fused over eager |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for problem, us in times.items():
        cells = *problem, *(f"{us[impl]:.1f}" for impl in ("eager", "fused", "two-gemms"))
        lines.append(f"| {' | '.join(map(str, cells))} | {us['eager'] / us['fused']:.2f}x |")
    return "\n".join(lines)


def candidates_table(rows: list[dict[str, Any]]) -> str:
    """For each launch, PyTorch's time and the three fastest configurations of ours."""
    launches: dict[tuple, list[dict[str, Any]]] = {}
    for entry in rows:
        launches.setdefault((entry["shape"], entry["m"], entry["launch"]), []).append(entry)
    lines = ["| shape | M | launch | PyTorch, us | fastest of ours: M x N x K tile, us |", "|---|---:|---|---:|---|"]
    for launch, entries in launches.items():
        library = next(entry["median_us"] for entry in entries if entry["kernel"] == "torch")
        ours = [entry for entry in entries if entry["kernel"] != "torch"][:3]
        fastest = "; ".join(f"{describe(entry)}: {entry['median_us']:.1f}" for entry in ours)
        lines.append(f"| {' | '.join(map(str, launch))} | {library:.1f} | {fastest} |")
    return "\n".join(lines)


def describe(config: dict[str, Any]) -> str:
    tile = "x".join(str(config[name]) for name in ("block_m", "block_n", "block_k"))
    return f"{config['kernel']} {tile}, {config['num_warps']} warps, {config['num_stages']} stages"
