"""`hf-fused-mlp bench`: one MLP of each published shape, fused against what it replaces and its peers, on this GPU."""

import copy
import datetime
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from torch import Tensor, nn

from hf_fused_mlp.cli import block as one_block
from hf_fused_mlp.cli import results
from hf_fused_mlp.cli.console import console, fail, note, token_counts
from hf_fused_mlp.cli.end_to_end import MODELS, MODES, WORKLOAD, Workload
from hf_fused_mlp.cli.end_to_end import end_to_end as end_to_end_rows
from hf_fused_mlp.cli.end_to_end import table as end_to_end_table
from hf_fused_mlp.cli.host import host as host_rows
from hf_fused_mlp.cli.host import table as host_table
from hf_fused_mlp.cli.peers import DEFAULT, IMPLEMENTATIONS, Unavailable, package_versions
from hf_fused_mlp.cli.results import Header, Row
from hf_fused_mlp.cli.shapes import SHAPES, Shape, build, fused_twin
from hf_fused_mlp.cli.tables import candidates_table, markdown_table, speedup_table
from hf_fused_mlp.fuse import fuse_model
from hf_fused_mlp.integrations import demo
from hf_fused_mlp.tuning.timing import GRAPHS_UP_TO, Timing, round_robin, round_robin_graphs, weight_copies
from hf_fused_mlp.types import MLPKind
from hf_fused_mlp.validation import inaccuracy

TOKENS = "1,16,512,4096"
# what the rows of a measurement of whole models, or of the host, are printed as
USERS_SIDE = {"host": host_table, "end-to-end": end_to_end_table}


def bench(
    shapes: Annotated[str, typer.Option(help="Shapes, comma-separated, or 'all'.")] = "llama-3-8b,pythia-6.9b",
    block: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="HIDDEN",
            help="Time many forward passes of one Llama MLP of this size instead, by the clock on the wall.",
        ),
    ] = None,
    intermediate: Annotated[
        int | None, typer.Option(min=1, help="With --block; 4 times the hidden size.", show_default=False)
    ] = None,
    passes: Annotated[int, typer.Option(min=1, help="With --block.")] = 1000,
    m: Annotated[
        str | None,
        typer.Option(
            help=f"Token counts, comma-separated. Default: {TOKENS}; with --block, {one_block.TOKENS}.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    impl: Annotated[
        str | None,
        typer.Option(
            help=f"Implementations, comma-separated, or 'all': {', '.join(IMPLEMENTATIONS)}. What is not installed is "
            f"left out. Default: {','.join(DEFAULT)}; with --table, all in the file.",
            show_default=False,
        ),
    ] = None,
    candidates: Annotated[bool, typer.Option("--candidates", help="Time every tile configuration instead.")] = False,
    training: Annotated[
        bool, typer.Option("--training", help="Time forward and backward, and what they keep.")
    ] = False,
    host: Annotated[bool, typer.Option("--host", help="Time what a call costs the host instead.")] = False,
    end_to_end: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help=f"Time `generate` of a whole model instead: a directory, hub id or config file, {', '.join(MODELS)} "
            f"with random weights, or {demo.NAME}.",
        ),
    ] = None,
    mode: Annotated[str, typer.Option(help=f"With --end-to-end: {', '.join(MODES)}.")] = ",".join(MODES),
    batch: Annotated[str, typer.Option(help="With --end-to-end: requests at once, comma-separated.")] = "1,8,32",
    prompt: Annotated[str, typer.Option(help="With --end-to-end: tokens a request, comma-separated.")] = "128",
    rounds: Annotated[int, typer.Option(min=2, help="With --end-to-end: rounds in which all forms take turns.")] = 20,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            dir_okay=False,
            help="Where to write the measurements; a file of the same system keeps its other problems.",
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Measure nothing; print these rows of an earlier run's JSON."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="A directory for SVG plots of all rows of the JSON, or else of this run."),
    ] = None,
) -> None:
    """Time fused MLPs against Transformers' own and peers, on the GPU: correctness first, then in turn in one run."""
    if sum((candidates, training, host, end_to_end is not None, block is not None)) > 1:
        fail("--candidates, --training, --host, --end-to-end and --block are measurements of their own; name one")
    if plot is not None and (candidates or host or block is not None):
        fail("--plot draws MLPs of published models, and models; leave out --candidates, --host and --block")
    if dtype not in ("bfloat16", "float16"):
        fail(f"dtype {dtype!r}: expected bfloat16 or float16")
    if block is not None:
        shape, m, impl = one_block.shape_of(block, intermediate), m or one_block.TOKENS, impl or one_block.NAMES
        bench_block(shape, m, dtype, impl, passes, json_file, table)
        return
    if intermediate is not None:
        fail("--intermediate is a size of --block's MLP; add --block, or leave it out")
    m = m or TOKENS
    shape_names = chosen("shape", shapes, SHAPES)
    impl_names = chosen("implementation", impl or ("all" if table else ",".join(DEFAULT)), IMPLEMENTATIONS)
    tokens = token_counts(m)
    if plot is not None:
        try:
            from hf_fused_mlp.cli.plots import draw
        except ImportError as error:
            fail(f"--plot needs matplotlib ({error}); pip install 'hf-fused-mlp[bench]'")

    if table is not None:
        header, kept = results.read(table)
        if plot is not None and header.get("timed") == "host":
            fail(f"{table} has host times, of which there is no plot; leave out --plot")
        rows = kept
        if header.get("timed") not in USERS_SIDE:
            rows = [row for row in kept if row["shape"] in shape_names and row["m"] in tokens]
            rows = [row for row in rows if row.get("impl", impl_names[0]) in impl_names]
    elif not torch.cuda.is_available():
        fail("bench needs a CUDA GPU, and PyTorch finds none; `bench --table FILE` prints an earlier run")
    elif host or end_to_end is not None:
        workloads = [
            Workload(name, requests, length)
            for name in chosen("mode", mode, MODES)
            for length in token_counts(prompt)
            for requests in token_counts(batch)
        ]
        header, kept, rows = measure_users_side(
            end_to_end, workloads, rounds, tokens, getattr(torch, dtype), json_file
        )
    else:
        timed = "candidates" if candidates else "training" if training else "forward"
        measures: dict[str, Callable[[Shape, int, torch.dtype], list[Row]]] = {
            "candidates": measure_candidates,
            "training": partial(measure_training, names=impl_names),
            "forward": partial(measure, names=impl_names),
        }
        problems = [(SHAPES[name], count) for name in shape_names for count in tokens]
        batches = (
            measures[timed](shape, count, getattr(torch, dtype))
            for shape, count in track(problems, "measuring", console=console)
        )
        header, kept, rows = collect(timed, impl_names, json_file, batches)
    if show := USERS_SIDE.get(header.get("timed", "")):
        print(show(rows))
    elif any("launch" in row for row in rows):
        print(candidates_table(rows))
    else:
        print(*(speedup_table(rows, over) for over in ("eager", "peers")), markdown_table(rows), sep="\n\n")
    if plot is not None:
        draw(plot, header, [row for row in kept if "impl" in row])


def measure_users_side(
    model: str | None,
    workloads: list[Workload],
    rounds: int,
    tokens: list[int],
    dtype: torch.dtype,
    json_file: Path | None,
) -> tuple[Header, list[Row], list[Row]]:
    """What the user waits for: `generate` of a whole model, or without one the host's time for one MLP."""
    by: tuple[str, ...]
    if model is None:
        timed, batches, by = "host", host_rows(tokens, dtype), ("kind", "m")
    else:
        timed, batches, by = "end-to-end", end_to_end_rows(model, workloads, dtype, rounds), WORKLOAD
    return collect(timed, [], json_file, batches, partial(results.replaced, by=by))


def collect(
    timed: str,
    names: list[str],
    json_file: Path | None,
    batches: Iterable[list[Row]],
    merge: Callable[[list[Row], list[Row]], list[Row]] = results.merged,
) -> tuple[Header, list[Row], list[Row]]:
    """The header, the rows of `json_file` with those of this run, and the latter; written after each of `batches`."""
    header = environment(names) | {"timed": timed}
    kept: list[Row] = []
    rows: list[Row] = []
    if json_file is not None:
        header, kept = results.resume(json_file, header)
    for measured in batches:
        rows += measured
        kept = merge(kept, measured)
        if json_file is not None:
            results.write(json_file, header, kept)
    return header, kept, rows


def chosen(what: str, names: str, known: dict[str, Any]) -> list[str]:
    """The names asked for, in the order of `known`."""
    asked = list(known) if names == "all" else names.split(",")
    if unknown := [name for name in asked if name not in known]:
        fail(f"unknown {what} {unknown[0]!r}; the {what}s are {', '.join(known)}")
    return [name for name in known if name in asked]


def environment(names: list[str]) -> Header:
    """What a figure depends on."""
    from hf_fused_mlp.tuning.plan_files import kernel_hashes  # imports Triton

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "transformers": metadata.version("transformers"),
        "kernels": kernel_hashes(),
        "date": datetime.date.today().isoformat(),
        "copy_tbps": round(copy_tbps(), 3),
        "peers": package_versions(names),
    }


def copy_tbps() -> float:
    """Terabytes a second that a large copy on the device moves, bytes read plus bytes written."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    timing = round_robin({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * source.nbytes / timing.median_us / 1e6


@torch.no_grad()
def measure(shape: Shape, m: int, dtype: torch.dtype, names: list[str]) -> list[Row]:
    """The rows of one shape at `m` tokens, one for each implementation that answers here."""
    torch.compiler.reset()  # what earlier problems compiled counts towards a limit, past which functions stay eager
    # under no_grad too, some peers keep what a backward would need unless the weights are frozen
    eager = build(shape, dtype).requires_grad_(False)
    fused = fused_twin(eager)
    x = torch.randn(m, shape.hidden, device=next(eager.parameters()).device, dtype=dtype)
    calls = judged(names, eager, fused, x, f"{shape.name}, M = {m}")

    if m <= GRAPHS_UP_TO:
        sets = {name: [call] for name, call in calls.items()}
        for _ in range(weight_copies(sum(p.nbytes for p in eager.parameters())) - 1):
            eager_copy = copy.deepcopy(eager)
            fused_copy = fused_twin(eager_copy)
            for name in calls:
                sets[name].append(IMPLEMENTATIONS[name].prepare(eager_copy, fused_copy, x))
        timings = round_robin_graphs(sets)
    else:
        timings = round_robin(calls)
    return [row(shape, m, dtype, fused.fused_spec.kind, name, timing) for name, timing in timings.items()]


def measure_training(shape: Shape, m: int, dtype: torch.dtype, names: list[str]) -> list[Row]:
    """The rows of forward and backward, gradients of the tokens and of all weights; `peak_mb` is what they allocate.

    The gradients of the implementations that can train are not compared here: the tests do that for ours.
    """
    torch.compiler.reset()
    eager = build(shape, dtype).train()
    fused = fused_twin(eager)
    x = torch.randn(m, shape.hidden, device=next(eager.parameters()).device, dtype=dtype, requires_grad=True)
    names = [name for name in names if IMPLEMENTATIONS[name].trains]
    calls = judged(names, eager, fused, x, f"{shape.name}, M = {m}")
    grad, leaves = torch.randn_like(x), [x, *eager.parameters()]

    def step(call: Callable[[], Tensor]) -> None:
        for leaf in leaves:
            leaf.grad = None
        call().backward(grad)

    steps = {name: partial(step, call) for name, call in calls.items()}
    timings = round_robin(steps)
    return [
        row(shape, m, dtype, fused.fused_spec.kind, name, timing) | {"peak_mb": round(peak_mb(steps[name]), 1)}
        for name, timing in timings.items()
    ]


def bench_block(
    shape: Shape, m: str, dtype: str, impl: str, passes: int, json_file: Path | None, table: Path | None
) -> None:
    """`bench --block`: measures, or reads `table`, and prints."""
    tokens, names = token_counts(m), chosen("implementation", impl, IMPLEMENTATIONS)
    if table is not None:
        header, kept = results.read(table)
        rows = [row for row in kept if (row["shape"], row.get("dtype")) == (shape.name, dtype)]
        rows = [row for row in rows if row["m"] in tokens and row["impl"] in names]
        if not rows:
            fail(f"{table} has no {dtype} rows of {shape.name} that were asked for")
    elif torch.cuda.is_available():
        judge = partial(judged, names)
        batches = (
            one_block.measure(shape, count, getattr(torch, dtype), passes, judge)
            for count in track(tokens, "measuring", console=console)
        )
        header, _, rows = collect("block", names, json_file, batches)
    else:
        fail("bench needs a CUDA GPU, and PyTorch finds none; `--block HIDDEN --table FILE` prints an earlier run")
    print(one_block.block_table(rows, header["device"]))


def peak_mb(call: Callable[[], object]) -> float:
    """Megabytes that a call has allocated at its peak, beyond what it finds."""
    call()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def judged(names: list[str], eager: nn.Module, fused: nn.Module, x: Tensor, problem: str) -> dict[str, Callable]:
    """The calls of those implementations that answer here, each having answered, and so compiled and tuned.

    A wrong answer of ours ends the run. A peer's is noted and timed all the same; its failure is noted.
    """
    expected, oracle = eager(x), copy.deepcopy(eager).double()(x.double())
    calls = {}
    for name in names:
        implementation = IMPLEMENTATIONS[name]
        try:
            call = implementation.prepare(eager, fused, x)
            answer = call()
            if x.is_cuda and len(x) <= GRAPHS_UP_TO and not x.requires_grad:
                with torch.cuda.graph(torch.cuda.CUDAGraph()):
                    call()
        except Unavailable as error:
            note(f"{name}: {error}")
            continue
        except Exception as error:
            if implementation.role != "peer":
                raise
            note(f"{name}: failed at {problem}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            continue
        calls[name] = call
        if implementation.role == "floor":
            continue
        if reason := inaccuracy(answer, expected, oracle):
            if implementation.role == "ours":
                raise AssertionError(f"{problem}: the fused MLP is wrong, so it is not timed: {reason}")
            note(f"{name}: inaccurate at {problem}, timed all the same: {reason}")
    return calls


@torch.no_grad()
def measure_candidates(shape: Shape, m: int, dtype: torch.dtype) -> list[Row]:
    """Every configuration of both launches of one shape at `m` tokens, fastest first."""
    from hf_fused_mlp.dispatch import problem_key  # these two import Triton
    from hf_fused_mlp.tuning.tuner import time_candidates

    mlp: Any = fuse_model(build(shape, dtype), strict=True)
    gate, up, down, *biases, activation = mlp.operands()
    key = problem_key(m, gate, up, down, activation, bias=any(bias is not None for bias in biases))
    rows = []
    for launch, linear_key in (("up", key.up), ("down", key.down)):
        timings = sorted(time_candidates(linear_key).items(), key=lambda item: item[1].median_us)
        for config, timing in timings:
            rows.append({"shape": shape.name, "m": m, "launch": launch, **asdict(config), **rounded(timing)})
    return rows


def row(shape: Shape, m: int, dtype: torch.dtype, kind: MLPKind, impl: str, timing: Timing) -> Row:
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
