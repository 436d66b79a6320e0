"""Both forms of a model at work: timed in turn by the wall clock, then each once under the profiler."""

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from hf_fused_mlp.modes import evaluating
from hf_fused_mlp.profiling.request import Request
from hf_fused_mlp.profiling.trace import Breakdown, record
from hf_fused_mlp.swap import Fused, fuse, unfuse_module

PROFILED_STEPS = {"prefill": 1, "decode": 8}  # at most
Forms = dict[str, Callable[[], None]]
# what fuses a module: the class to mix in, and the spec
Recipe = tuple[type[Fused], Hashable]


@contextmanager
def as_it_came(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards the same modules are fused, and the same in training mode, as before."""
    modules = dict(model.named_modules())
    fused = {name: module.fused_recipe() for name, module in modules.items() if isinstance(module, Fused)}
    with evaluating(model):
        try:
            yield
        finally:
            set_fused(modules, fused)


def set_fused(modules: dict[str, nn.Module], recipes: Mapping[str, Recipe]) -> None:
    """Fuses the modules that have a recipe and unfuses the others; unlike `fuse_model`, logs nothing."""
    for name, module in modules.items():
        if name in recipes and not isinstance(module, Fused):
            fuse(module, *recipes[name])
        elif name not in recipes and isinstance(module, Fused):
            unfuse_module(module)


def time_forms(request: Request, forms: Forms) -> dict[str, dict[str, list[float]]]:
    """By phase and form, the microseconds of one step in each round."""
    walls: dict[str, dict[str, list[float]]] = {phase: {form: [] for form in forms} for phase in PROFILED_STEPS}
    # the first round compiles kernels, so its times do not count; forms take turns at being first
    for round_ in range(1 + request.rounds):
        for form in sorted(forms, reverse=round_ % 2 == 0):
            forms[form]()
            start = _now(request)
            state = request.prefill()
            middle = _now(request)
            for _ in range(request.new_tokens):
                state = request.step(*state)
            end = _now(request)
            if round_:
                walls["prefill"][form].append((middle - start) * 1e6)
                walls["decode"][form].append((end - middle) * 1e6 / request.new_tokens)
    return walls


def _now(request: Request) -> float:
    """Seconds, once the GPUs have done what they were given."""
    for gpu in request.gpus:
        torch.cuda.synchronize(gpu)
    return time.perf_counter()


def profile_forms(
    request: Request, forms: Forms, mlps: dict[str, nn.Module], folder: Path | None
) -> dict[str, dict[str, Breakdown]]:
    """By phase and form, what a step consists of."""
    steps: dict[str, dict[str, Breakdown]] = {phase: {} for phase in PROFILED_STEPS}
    for form, change in forms.items():
        change()
        for phase, step in (("prefill", request.prefill), ("decode", request.decoding())):
            file = folder and folder / f"{phase}-{form}.json"
            count = min(PROFILED_STEPS[phase], request.new_tokens)
            steps[phase][form] = record(step, count, mlps, request.ids.is_cuda, file)
    return steps
