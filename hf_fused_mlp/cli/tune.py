"""`hf-fused-mlp tune`: measures the fastest plans for a model's MLPs and experts on this GPU, and keeps them."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from hf_fused_mlp.cli.console import console, fail, output, progress, require_directory, token_counts

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hf_fused_mlp.tuning.plan_files import TunedPlan
    from hf_fused_mlp.types import GPU, ExpertsKey, ExpertsPlan, Plan, ProblemKey, TileConfig

DTYPES = ("bfloat16", "float16", "float32")


def tune(
    model: Annotated[
        str,
        typer.Argument(
            help="A directory or hub id; a shape of `bench mlp` or `bench experts`, or 'all' or 'all-experts'."
        ),
    ],
    m: Annotated[
        str | None,
        typer.Option(
            help="Token counts, comma-separated, rounded up to counts that have plans; default: those up to 16384."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"auto (the model's own) or {', '.join(DTYPES)}.")] = "auto",
    fp8: Annotated[bool, typer.Option("--fp8", help="For FP8 weights with a scale for each block.")] = False,
    file: Annotated[
        Path | None,
        typer.Option(
            "--output",
            dir_okay=False,
            help="A file for the plans; default: your cache. Only plans in the cache are used.",
        ),
    ] = None,
) -> None:
    """Find the fastest kernels for a model's MLPs and experts on this GPU, and keep them.

    Weights are not needed.
    """
    counts = None if m is None else token_counts(m)
    if dtype != "auto" and dtype not in DTYPES:
        fail(f"dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")

    import torch

    from hf_fused_mlp.modes import COMPLETE, FIRST, no_kernels_on
    from hf_fused_mlp.tuning.buckets import COUNTS, bucket
    from hf_fused_mlp.types import GPU, ProblemKey

    keys = problems_of(model, None if dtype == "auto" else getattr(torch, dtype), fp8)
    if not torch.cuda.is_available():
        fail("tune needs a CUDA GPU, and PyTorch finds none; kernels chosen by rule need no tuning")
    gpu = GPU.of(torch.device("cuda", torch.cuda.current_device()))
    reasons = {key: no_kernels_on(gpu, key.dtype, FIRST if isinstance(key, ProblemKey) else COMPLETE) for key in keys}
    if all(reasons.values()):
        fail(next(filter(None, reasons.values())))
    for key, reason in reasons.items():
        if reason:
            console.print(f"left out: {describe_problem(key)}: {reason}", soft_wrap=True, markup=False)

    from hf_fused_mlp.tuning import experts, tuner  # imports Triton

    path = keep([], gpu, file)  # find out before measuring whether it can be written
    tuned = []
    counts = sorted(counts or COUNTS)
    problems = list(
        dict.fromkeys(bucket(replace(key, m=count, gpu=gpu)) for key in keys if not reasons[key] for count in counts)
    )
    for key in progress(problems, "tuning"):
        try:
            tuned.append(tuner.tune(key) if isinstance(key, ProblemKey) else experts.tune(key))
        except torch.OutOfMemoryError:
            problem = f"{describe_problem(key)}, {key.m} tokens"
            console.print(f"skipped, because it does not fit into GPU memory: {problem}", soft_wrap=True)
        else:
            keep(tuned[-1:], gpu, file)
    for table in report(tuned):
        output.print(table)
    output.print(f"{len(tuned)} of {len(problems)} problems tuned; plans are in {path}", soft_wrap=True, markup=False)


def keep(tuned: "list[TunedPlan]", gpu: "GPU", file: Path | None) -> Path:
    from hf_fused_mlp.tuning import cache  # imports Triton

    try:
        return cache.save(tuned, gpu, file)
    except (OSError, RuntimeError) as error:
        fail(f"plans cannot be kept ({error}); name a new file, or one of plans, with --output")


def problems_of(name: str, dtype: "torch.dtype | None", fp8: bool = False) -> "list[ProblemKey | ExpertsKey]":
    """The distinct problems, for one token, of a model, a shape or all shapes; their GPU is a CPU.

    Args:
        dtype: of the tokens; None: the model's, and bf16 in FP8.
        fp8: leave out what cannot be stored in FP8, and store the rest so.
    """
    import torch

    from hf_fused_mlp.bench import experts
    from hf_fused_mlp.bench.shapes import SHAPES, build, to_fp8
    from hf_fused_mlp.fuse import examine
    from hf_fused_mlp.types import GPU, ExpertsKey

    if name == "all" or name in SHAPES:
        shapes = SHAPES.values() if name == "all" else [SHAPES[name]]
        modules = [build(shape, dtype or torch.bfloat16, "meta") for shape in shapes]
    elif name == "all-experts" or name in experts.SHAPES:
        chosen = experts.SHAPES.values() if name == "all-experts" else [experts.SHAPES[name]]
        modules = [experts.build(shape, dtype or torch.bfloat16, "meta") for shape in chosen]
    else:
        modules = [skeleton(name, dtype)]
    if fp8:
        with torch.device("meta"):
            modules = [to_fp8(module) for module in modules]
    gpu = GPU.of(torch.device("cpu"))
    keys = [
        entry.family.problem(entry.module, entry.finding.spec, 1, gpu)
        for module in modules
        for entry in examine(module)
        if entry.finding.spec is not None
    ]
    if not any(keys):
        fail(f"{name} has no MLP or experts that would be fused, so there is nothing to tune")
    found = [key for key in dict.fromkeys(keys) if key is not None]
    if not fp8:
        return found
    experts_keys = [replace(key, storage="fp8") for key in found if isinstance(key, ExpertsKey) and has_fp8(key)]
    mlp_keys = [replace(key, dtype=dtype or key.dtype) for key in found if key.storage == "fp8"]
    if not experts_keys and not mlp_keys:
        fail(f"{name} has no weights that can be stored in FP8 with a scale for each block")
    return [*mlp_keys, *experts_keys]


def has_fp8(key: "ExpertsKey") -> bool:
    """Whether Transformers stores such experts in FP8."""
    from hf_fused_mlp.types import SCALE_BLOCK

    sizes = key.hidden % SCALE_BLOCK, key.intermediate % SCALE_BLOCK
    return key.layout == "planes" and not key.bias and sizes == (0, 0)


def skeleton(name: str, dtype: "torch.dtype | None") -> "nn.Module":
    """The model of a directory or hub id, without weights."""
    require_directory(name)

    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        return AutoModel.from_config(config, dtype=dtype or config.dtype or torch.bfloat16)


def report(tuned: "list[TunedPlan]") -> Iterator[Table]:
    """One table per MLP: for each token count the plan, its time, and its speedup over the unfused path.

    Experts are compared with the rule's plan instead.
    """
    from hf_fused_mlp.types import ExpertsKey

    for title, entries in groupby(tuned, lambda entry: describe_problem(entry.key)):
        first, *rest = entries
        other = "rule" if isinstance(first.key, ExpertsKey) else "unfused"
        table = Table("M", "up", "down", "us", f"{other}, us", "gain", title=title, title_justify="left")
        for index in (0, 3, 4, 5):
            table.columns[index].justify = "right"
        for entry in (first, *rest):
            times = f"{entry.plan_us:.1f}", f"{entry.other_us:.1f}"
            gain = f"{entry.other_us / entry.plan_us:.2f}x"
            table.add_row(str(entry.key.m), *describe_plan(entry.plan), *times, gain)
        yield table


def describe_problem(key: "ProblemKey | ExpertsKey") -> str:
    from hf_fused_mlp.types import ExpertsKey

    kind = "gated" if key.gated else "plain"
    bias = ", bias" if key.bias else ""
    dtype = str(key.dtype).removeprefix("torch.") + ("" if key.storage == "float" else f", weights in {key.storage}")
    if isinstance(key, ExpertsKey):
        sizes = f"{key.experts} experts, {key.top_k} a token, {key.hidden} x {key.intermediate}"
        return f"{sizes} {kind} {key.activation}{bias}, {key.layout}, {dtype}"
    return f"{key.hidden} x {key.intermediate} {kind} {key.activation}{bias}, {dtype}"


def describe_plan(plan: "Plan | ExpertsPlan") -> tuple[str, str]:
    """Describes up and down; for experts, the order and the rows of a tile come first."""
    order = getattr(plan, "order", None)
    up = describe_config(plan.up)
    if order is not None:
        up = f"{order} {plan.rows}: {up}"  # type: ignore[union-attr]
    return up, describe_config(plan.down)


def describe_config(config: "TileConfig") -> str:
    """Describes the kernel and the tile sizes that it uses."""
    tile = "x".join(str(size) for size in (config.block_m, config.block_n, config.block_k) if size > 1)
    return f"{config.kernel} {tile}".rstrip()
