"""`hf-fused-mlp bench training`: forward and backward of one MLP, and the memory that a step allocates."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hf_fused_mlp.bench.measuring import judged, mlp_row
from hf_fused_mlp.bench.peers import IMPLEMENTATIONS
from hf_fused_mlp.bench.results import Row
from hf_fused_mlp.bench.shapes import Shape, build, fused_twin
from hf_fused_mlp.tuning.timing import round_robin


def measure(shape: Shape, m: int, dtype: torch.dtype, names: list[str]) -> list[Row]:
    """Times forward and backward of one shape on `[M, H]` tokens, with gradients of tokens and weights.

    Forward outputs are checked here. The tests compare the gradients of the fused MLP.

    Args:
        names: keys of `IMPLEMENTATIONS`; those that cannot train are left out.

    Returns:
        One row for each implementation, with the peak allocation of a step in megabytes as `peak_mb`.

    Raises:
        AssertionError: the fused MLP is outside its tolerance.
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
        mlp_row(shape, m, dtype, fused.fused_spec.kind, name, timing) | {"peak_mb": round(peak_mb(steps[name]), 1)}
        for name, timing in timings.items()
    ]


def peak_mb(call: Callable[[], object]) -> float:
    """Megabytes that a second call allocates at its peak, beyond what was allocated before it."""
    call()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
