"""`hf-fused-mlp bench mlp`: one MLP of a published model, fused, eager and as other packages compute it."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_fused_mlp.bench.measuring import judged, mlp_row, prepared
from hf_fused_mlp.bench.results import Row
from hf_fused_mlp.bench.shapes import Shape, build, fused_twin
from hf_fused_mlp.tuning.timing import GRAPHS_UP_TO, round_robin, round_robin_graphs, weight_copies


@torch.no_grad()
def measure(shape: Shape, m: int, dtype: torch.dtype, names: list[str], by_rule: bool = False) -> list[Row]:
    """Times the forward of one shape on `[M, H]` tokens, in microseconds on the GPU.

    Up to `GRAPHS_UP_TO` tokens the calls run in CUDA graphs over copies of the weights that exceed the L2.

    Args:
        names: keys of `IMPLEMENTATIONS`.
        by_rule: leave measured plans aside.

    Returns:
        One row for each implementation that is available here.

    Raises:
        AssertionError: the fused MLP is outside its tolerance.
    """
    from hf_fused_mlp.ops import dispatch  # imports Triton

    with dispatch.by_rule() if by_rule else nullcontext():
        return _measure(shape, m, dtype, names)


def _measure(shape: Shape, m: int, dtype: torch.dtype, names: list[str]) -> list[Row]:
    torch.compiler.reset()  # earlier problems count towards a limit, past which functions stay eager
    # under no_grad too, some peers keep tensors for a backward unless the weights are frozen
    eager = build(shape, dtype).requires_grad_(False)
    fused = fused_twin(eager)
    x = torch.randn(m, shape.hidden, device=next(eager.parameters()).device, dtype=dtype)
    calls = judged(names, eager, fused, x, f"{shape.name}, M = {m}", _prepared)
    if m <= GRAPHS_UP_TO:
        sets = {name: [call] for name, call in calls.items()}
        for _ in range(weight_copies(sum(p.nbytes for p in eager.parameters())) - 1):
            eager_copy = copy.deepcopy(eager)
            fused_copy = fused_twin(eager_copy)
            for name in calls:
                sets[name].append(_prepared(name, eager_copy, fused_copy, x))
        timings = round_robin_graphs(sets)
    else:
        timings = round_robin(calls)
    return [mlp_row(shape, m, dtype, fused.fused_spec.kind, name, timing) for name, timing in timings.items()]


def _prepared(name: str, eager: nn.Module, fused: Any, x: Tensor) -> Callable[[], Tensor]:
    """The call to time. Of ours the operator: a module leaves calls that wait for the host to its original forward."""
    return partial(fused.by_operator, x) if name == "fused" else prepared(name, eager, fused, x)
