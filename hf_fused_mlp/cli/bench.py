"""The `hf-fused-mlp bench` commands: options, printing and exiting. The measuring is in `hf_fused_mlp.bench`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_fused_mlp.bench.names import (
    DEFAULT,
    ENCODERS,
    EXPERTS,
    EXPERTS_IMPLEMENTATIONS,
    IMPLEMENTATIONS,
    MODELS,
    MODES,
    ROUTINGS,
    WRAPPINGS,
)
from hf_fused_mlp.cli.bench_options import (
    SHAPE_NAMES,
    TOKENS,
    Dtype,
    Impl,
    Json,
    Plot,
    Shapes,
    Table,
    Tokens,
    dtype_of,
    measured,
    plotter,
)
from hf_fused_mlp.cli.console import fail, progress, require_directory, token_counts
from hf_fused_mlp.integrations import demo

if TYPE_CHECKING:
    from hf_fused_mlp.bench.results import Row


def mlp(
    shapes: Shapes = SHAPE_NAMES,
    m: Tokens = TOKENS,
    dtype: Dtype = "bfloat16",
    impl: Impl = None,
    by_rule: Annotated[
        bool, typer.Option("--by-rule", help="Ignore measured plans, as if none were shipped.")
    ] = False,
    json_file: Json = None,
    table: Table = None,
    plot: Plot = None,
) -> None:
    """MLPs of published models: fused, eager and other packages.

    Outputs are checked before anything is timed. Times are microseconds on the GPU, without the host's time.
    """
    from hf_fused_mlp.bench import mlp as bench

    timed = "forward-by-rule" if by_rule else "forward"
    compare(timed, partial(bench.measure, by_rule=by_rule), shapes, m, dtype, impl, json_file, table, plot)


def training(
    shapes: Shapes = SHAPE_NAMES,
    m: Tokens = TOKENS,
    dtype: Dtype = "bfloat16",
    impl: Impl = None,
    json_file: Json = None,
    table: Table = None,
    plot: Plot = None,
) -> None:
    """Forward and backward of the same MLPs, time and memory.

    Implementations that cannot train are left out.
    """
    from hf_fused_mlp.bench import training as bench

    compare("training", bench.measure, shapes, m, dtype, impl, json_file, table, plot)


def compare(
    timed: str,
    measure: "Callable[..., list[Row]]",
    shapes: str,
    m: str,
    dtype: str,
    impl: str | None,
    json_file: Path | None,
    table: Path | None,
    plot: Path | None,
) -> None:
    """The common part of `mlp` and `training`: times implementations in turn, and prints tables and plots."""
    from hf_fused_mlp.bench.measuring import chosen
    from hf_fused_mlp.bench.peers import packages_of
    from hf_fused_mlp.bench.shapes import SHAPES
    from hf_fused_mlp.bench.tables import lowest_table, markdown_table, speedup_table

    names = chosen("implementation", impl or ("all" if table else ",".join(DEFAULT)), IMPLEMENTATIONS)
    shape_names, tokens, draw = chosen("shape", shapes, SHAPES), token_counts(m), plotter(plot)
    problems = [(SHAPES[name], count) for name in shape_names for count in tokens]
    kind = dtype_of(dtype)
    header, kept, rows = measured(
        timed,
        (measure(shape, count, kind, names) for shape, count in progress(problems, "measuring")),
        json_file,
        table,
        packages=packages_of(names),
        wanted=lambda row: row["shape"] in shape_names and row["m"] in tokens and row["impl"] in names,
    )
    if timed == "forward-by-rule":
        print(lowest_table(rows))
    else:
        print(*(speedup_table(rows, over) for over in ("eager", "peers")), markdown_table(rows), sep="\n\n")
    draw(header, kept)


def candidates(
    shapes: Shapes = SHAPE_NAMES,
    m: Tokens = TOKENS,
    dtype: Dtype = "bfloat16",
    json_file: Json = None,
    table: Table = None,
) -> None:
    """Every tile configuration that the tuner may choose.

    The up and the down launch of an MLP are timed separately.
    """
    from hf_fused_mlp.bench import candidates as bench
    from hf_fused_mlp.bench.measuring import chosen
    from hf_fused_mlp.bench.shapes import SHAPES

    shape_names, tokens = chosen("shape", shapes, SHAPES), token_counts(m)
    problems = [(SHAPES[name], count) for name in shape_names for count in tokens]
    kind = dtype_of(dtype)
    _, _, rows = measured(
        "candidates",
        (bench.measure(shape, count, kind) for shape, count in progress(problems, "measuring")),
        json_file,
        table,
        wanted=lambda row: row["shape"] in shape_names and row["m"] in tokens,
    )
    print(bench.table(rows))


def block(
    hidden: Annotated[int, typer.Argument(min=1, help="Hidden size of the MLP.")] = 4096,
    intermediate: Annotated[
        int | None,
        typer.Option(min=1, help="Intermediate size; 4 times the hidden size.", show_default=False),
    ] = None,
    passes: Annotated[int, typer.Option(min=1, help="Forward passes at each token count.")] = 1000,
    m: Tokens = "1,16,128,512,2048,4096,8192,16384",
    dtype: Dtype = "bfloat16",
    impl: Annotated[
        str, typer.Option(help=f"Implementations, comma-separated, or 'all': {', '.join(IMPLEMENTATIONS)}.")
    ] = "fused,eager,compile",
    json_file: Json = None,
    table: Table = None,
) -> None:
    """Wall-clock time of many forward passes of one MLP.

    The MLP is Llama's. The host's time is included. Says where fusing saves 12 % to 18 %.
    """
    from hf_fused_mlp.bench import block as bench
    from hf_fused_mlp.bench.measuring import chosen
    from hf_fused_mlp.bench.peers import packages_of

    shape, kind, tokens = bench.shape_of(hidden, intermediate), dtype_of(dtype), token_counts(m)
    names = chosen("implementation", impl, IMPLEMENTATIONS)
    header, _, rows = measured(
        "block",
        (bench.measure(shape, count, kind, passes, names) for count in progress(tokens, "measuring")),
        json_file,
        table,
        packages=packages_of(names),
        wanted=lambda row: (
            (row["shape"], row.get("dtype")) == (shape.name, dtype) and row["m"] in tokens and row["impl"] in names
        ),
    )
    if not rows:
        fail(f"{table} has no {dtype} rows of {shape.name} that were asked for")
    print(bench.block_table(rows, header["device"]))


def writeup(
    impl: Annotated[
        str, typer.Option(help=f"Implementations, comma-separated, or 'all': {', '.join(IMPLEMENTATIONS)}.")
    ] = "eager,compile,liger,fused",
    json_file: Json = None,
    table: Table = None,
) -> None:
    """Every kernel launch of the MLP that the published write-up measures.

    A GeGLU MLP (tanh) of 768 x 3072 on 64 x 128 tokens in bfloat16, under torch.profiler with the write-up's schedule.
    """
    from hf_fused_mlp.bench import writeup as bench
    from hf_fused_mlp.bench.measuring import chosen
    from hf_fused_mlp.bench.peers import packages_of

    names = chosen("implementation", impl, IMPLEMENTATIONS)
    batches = (bench.measure(each) for each in [names])
    _, _, rows = measured(
        "writeup", batches, json_file, table, packages=packages_of(names), wanted=lambda row: row["impl"] in names
    )
    print(bench.table(rows))


def host(m: Tokens = TOKENS, dtype: Dtype = "bfloat16", json_file: Json = None, table: Table = None) -> None:
    """Host time of a module call.

    Small MLPs and a norm, original and fused; a call is timed until it returns.
    """
    from hf_fused_mlp.bench import host as bench

    batches = bench.measure(token_counts(m), dtype_of(dtype))
    _, _, rows = measured("host", batches, json_file, table, by=("kind", "m"))
    print(bench.table(rows))


def encoders(
    model: Annotated[str, typer.Option(help=f"Comma-separated, or 'all': {', '.join(ENCODERS)}.")] = "all",
    batch: Annotated[str, typer.Option(help="Texts of 128 tokens, or images, comma-separated.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds in which original and fused take turns.")] = 40,
    dtype: Annotated[str, typer.Option(help="Comma-separated: bfloat16, float16.")] = "bfloat16,float16",
    json_file: Json = None,
    table: Table = None,
) -> None:
    """Eager forwards of small models, which wait for Python.

    BERT, ViT, CLIP, SigLIP, T5, ModernBERT and Pythia with random weights, original and fused in turn.
    """
    from hf_fused_mlp.bench import encoders as bench
    from hf_fused_mlp.bench.measuring import chosen

    names, dtypes = chosen("model", model, ENCODERS), [dtype_of(name) for name in dtype.split(",")]
    batches = bench.measure(names, token_counts(batch), dtypes, rounds)
    print(bench.table(measured("encoders", batches, json_file, table, by=("model", "dtype", "batch"))[2]))


def wrapped(
    wrapping: Annotated[str, typer.Option(help=f"Comma-separated, or 'all': {', '.join(WRAPPINGS)}.")] = "all",
    m: Tokens = TOKENS,
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers of the model.")] = 8,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds in which original and fused take turns.")] = 40,
    json_file: Json = None,
    table: Table = None,
) -> None:
    """Layers with LoRA, quantizers, hooks or parallelism around them.

    Whole decoder layers of a Llama-3-8B shape in bfloat16, eager mode, wall-clock time, original over fused.
    """
    from hf_fused_mlp.bench import wrapped as bench
    from hf_fused_mlp.bench.measuring import chosen

    names = chosen("wrapping", wrapping, bench.WRAPPINGS)
    batches = bench.measure(names, token_counts(m), layers, rounds)
    _, _, rows = measured("wrapped", batches, json_file, table, by=("wrapping", "layers", "m"))
    print(bench.table(rows))


def experts(
    shapes: Annotated[str, typer.Option(help=f"Comma-separated, or 'all': {', '.join(EXPERTS)}.")] = "all",
    m: Tokens = "1,4,16,64,256,1024,4096,16384",
    routing: Annotated[
        str, typer.Option(help=f"How tokens are spread, comma-separated: {', '.join(ROUTINGS)}.")
    ] = "uniform",
    impl: Annotated[
        str, typer.Option(help=f"Comma-separated, or 'all': {', '.join(EXPERTS_IMPLEMENTATIONS)}.")
    ] = "fused,grouped_mm,batched_mm",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds in which implementations take turns.")] = 25,
    dtype: Annotated[str, typer.Option(help="bfloat16, or fp8 as in FP8 checkpoints.")] = "bfloat16",
    json_file: Json = None,
    table: Table = None,
) -> None:
    """Routed experts of published models.

    GPU time of a call, fused and as Transformers runs them, with a different routing in each call. In FP8,
    Transformers' own implementations are included if their kernels load.
    """
    from hf_fused_mlp.bench import experts as bench
    from hf_fused_mlp.bench.measuring import chosen

    shape_names, tokens = chosen("shape", shapes, bench.SHAPES), token_counts(m)
    kinds = chosen("routing", routing, ROUTINGS)
    names = chosen("implementation", impl, EXPERTS_IMPLEMENTATIONS)
    if "fused" not in names:
        fail("bench experts compares with fused; name it in --impl")
    if dtype not in ("bfloat16", "fp8"):
        fail(f"dtype {dtype!r}: expected bfloat16 or fp8")
    fp8 = dtype == "fp8"
    if fp8 and not (shape_names := [name for name in shape_names if bench.SHAPES[name].has_fp8]):
        fail(f"{shapes}: none of these shapes is stored in FP8, whose sizes are multiples of 128")
    problems = [(shape, count, kind) for shape in shape_names for kind in kinds for count in tokens]
    _, _, rows = measured(
        "experts",
        (bench.measure(*problem, names, rounds, fp8) for problem in progress(problems, "measuring")),
        json_file,
        table,
        by=("shape", "dtype", "routing", "m"),
        wanted=lambda row: (
            (row["shape"] in shape_names and row["m"] in tokens and row["routing"] in kinds)
            and (row.get("dtype") == "fp8") is fp8
        ),
    )
    print(bench.table(rows))


def generate(
    model: Annotated[
        str | None,
        typer.Argument(
            help=f"A directory, hub id or config file; {', '.join(MODELS)} with random weights; or {demo.NAME}.",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(MODES)}.")] = ",".join(MODES),
    batch: Annotated[str, typer.Option(help="Requests at once, comma-separated.")] = "1,8,32",
    prompt: Annotated[str, typer.Option(help="Tokens a request, comma-separated.")] = "128",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds in which all forms take turns.")] = 20,
    fp8: Annotated[bool, typer.Option("--fp8", help="With static-compile, also with FP8 weights.")] = False,
    dtype: Dtype = "bfloat16",
    json_file: Json = None,
    table: Table = None,
    plot: Plot = None,
) -> None:
    """Time of a token in `generate` of a whole model.

    Prefill and decoding, original and fused. --table needs no MODEL, and prints all rows of the file.
    """
    from hf_fused_mlp.bench import generate as bench
    from hf_fused_mlp.bench.measuring import chosen

    workloads = [
        bench.Workload(name, requests, length)
        for name in chosen("mode", mode, MODES)
        for length in token_counts(prompt)
        for requests in token_counts(batch)
    ]
    kind, draw = dtype_of(dtype), plotter(plot)
    if table is None and model is None:
        fail("generate needs a MODEL to measure, or --table FILE to print an earlier run")
    if model is not None and not model.endswith(".json"):
        require_directory(model)
    batches = bench.measure(model or "", progress(workloads, "measuring"), kind, rounds, fp8)
    header, kept, rows = measured("end-to-end", batches, json_file, table, by=bench.WORKLOAD)
    print(bench.table(rows))
    draw(header, kept)
