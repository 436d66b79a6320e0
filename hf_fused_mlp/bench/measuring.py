"""Common parts of the measurements: the header of a run, collecting its rows, and checking outputs before timing."""

import copy
import datetime
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_fused_mlp.bench import results
from hf_fused_mlp.bench.peers import IMPLEMENTATIONS, Unavailable
from hf_fused_mlp.bench.results import Header, Row
from hf_fused_mlp.bench.shapes import Shape
from hf_fused_mlp.numerics.fp8 import dequantized, fp8_by_reference
from hf_fused_mlp.reading.mlp import MLPKind
from hf_fused_mlp.tuning.timing import GRAPHS_UP_TO, Timing, round_robin
from hf_fused_mlp.validation import inaccuracy

logger = logging.getLogger(__name__)


def chosen(what: str, names: str, known: Collection[str]) -> list[str]:
    """Splits the comma-separated `names`, `all` for every one, and returns them in the order of `known`.

    Raises:
        ValueError: a name is not in `known`; `what` is the noun of the message.
    """
    asked = list(known) if names == "all" else names.split(",")
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"unknown {what} {unknown[0]!r}; the {what}s are {', '.join(known)}")
    return [name for name in known if name in asked]


def collect(
    timed: str,
    batches: Iterable[list[Row]],
    json_file: Path | None = None,
    packages: Iterable[str] = (),
    by: tuple[str, ...] | None = None,
) -> tuple[Header, list[Row], list[Row]]:
    """Runs a measurement and writes `json_file` after each of its batches of rows.

    Args:
        timed: which measurement it is, a key of `results.COMMANDS`.
        batches: yields the rows of one problem at a time.
        json_file: a file to add to, or None.
        packages: distributions whose versions the header records.
        by: the fields that identify a problem; None for shape, dtype and M.

    Returns:
        The header, all rows of the file after this run, and the rows of this run.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: the file cannot be added to, see `results.resume`.
    """
    merge = results.merged if by is None else partial(results.replaced, by=by)
    header = environment(packages) | {"timed": timed}
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


def environment(packages: Iterable[str]) -> Header:
    """The system that a measurement depends on; `packages` that are not installed are left out."""
    from hf_fused_mlp.tuning.plan_files import kernel_hashes  # imports Triton

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "transformers": metadata.version("transformers"),
        "kernels": kernel_hashes(),
        "date": datetime.date.today().isoformat(),
        "copy_tbps": round(copy_tbps(), 3),
        "peers": versions(packages),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those distributions that are installed, sorted by name."""
    found = {}
    for package in sorted(set(packages)):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def copy_tbps() -> float:
    """Measures a 1 GiB copy on the device, in terabytes per second, reads plus writes."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    timing = round_robin({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * source.nbytes / timing.median_us / 1e6


def prepared(name: str, eager: nn.Module, fused: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """The call of the implementation `name` on `x`."""
    return IMPLEMENTATIONS[name].prepare(eager, fused, x)


def judged(
    names: list[str],
    eager: nn.Module,
    fused: nn.Module,
    x: Tensor,
    problem: str,
    prepare: Callable[..., Callable[[], Tensor]] = prepared,
) -> dict[str, Callable]:
    """Prepares implementations and calls each once, which compiles and tunes it, then checks its answer.

    Peers that are not available or fail are logged and left out. A peer whose answer is inaccurate is logged and kept.

    Args:
        names: keys of `IMPLEMENTATIONS`.
        eager, fused: the two forms of one MLP, which share their weights.
        x: `[M, H]`.
        problem: names shape and M in messages.
        prepare: gives the call of a name; by default that of its implementation.

    Returns:
        The calls to time, by name.

    Raises:
        AssertionError: the fused MLP is outside the tolerance of `validation.inaccuracy`.
    """
    in_float, calls = (eager(x), copy.deepcopy(eager).double()(x.double())), {}
    for name in names:
        implementation = IMPLEMENTATIONS[name]
        try:
            call = prepare(name, eager, fused, x)
            answer = call()
            if x.is_cuda and len(x) <= GRAPHS_UP_TO and not x.requires_grad:
                with torch.cuda.graph(torch.cuda.CUDAGraph()):
                    call()
        except Unavailable as error:
            logger.warning("%s: %s", name, error)
            continue
        except Exception as error:
            if implementation.role not in ("peer", "quantized"):
                raise
            first_line = str(error).partition("\n")[0]
            logger.warning("%s: failed at %s: %s: %s", name, problem, type(error).__name__, first_line)
            continue
        calls[name] = call
        if implementation.role in ("floor", "quantized"):
            continue
        in_fp8 = implementation.in_fp8
        expected, oracle = in_float if in_fp8 is None else _references_in_fp8(in_fp8(copy.deepcopy(eager)), x)
        if reason := inaccuracy(answer, expected, oracle, quantized=in_fp8 is not None):
            if implementation.role == "ours":
                raise AssertionError(f"{problem}, {name}: the fused MLP is wrong, so it is not timed: {reason}")
            logger.warning("%s: inaccurate at %s, timed all the same: %s", name, problem, reason)
    return calls


def _references_in_fp8(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What an MLP of `FP8Linear`s gives with Transformers' arithmetic, and in float64 without quantizing tokens."""
    with fp8_by_reference(module):
        expected = module(x)
    return expected, copy.deepcopy(dequantized(module)).double()(x.double())


def mlp_row(shape: Shape, m: int, dtype: torch.dtype, kind: MLPKind, impl: str, timing: Timing) -> Row:
    """A row of `bench mlp` and `bench training`."""
    return {
        "shape": shape.name,
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "kind": kind.value,
        "activation": shape.activation,
        "dtype": name_of(dtype),
        "m": m,
        "impl": impl,
        **rounded(timing),
    }


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def rounded(timing: Timing) -> dict[str, float]:
    """The fields of a timing, in microseconds with two decimals."""
    return {name: round(value, 2) for name, value in asdict(timing).items()}
