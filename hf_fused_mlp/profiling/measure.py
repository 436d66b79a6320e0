"""Measures the forms of a model: wall-clock times in turn, then each form once under the profiler."""

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_fused_mlp.fuse import examine
from hf_fused_mlp.modes import evaluating
from hf_fused_mlp.profiling.report import LABELS
from hf_fused_mlp.profiling.request import Request
from hf_fused_mlp.profiling.trace import Breakdown, record
from hf_fused_mlp.swap import Fused, fuse, unfuse_module

PROFILED_STEPS = {"prefill": 1, "decode": 8}  # at most
# how to fuse a module: the class to mix in, and the spec
Recipe = tuple[type[Fused], Hashable]
Tell = Callable[[str], None]  # called with the name of the next step


@dataclass(frozen=True)
class Forms:
    """The forms of a model: its MLPs and norms by name, and for each form the `recipes` of its fused modules."""

    mlps: dict[str, nn.Module]
    norms: dict[str, nn.Module]
    recipes: dict[str, dict[str, Recipe]]

    def apply(self, form: str) -> None:
        """Puts the model into that form."""
        set_fused(self.mlps | self.norms, self.recipes[form])


def forms_of(model: nn.Module) -> Forms:
    """Finds the forms of a model; leaves it unfused."""
    set_fused({entry.name: entry.module for entry in examine(model) if entry.family.option in (None, "norms")}, {})
    of_option: dict[str | None, dict[str, nn.Module]] = {None: {}, "norms": {}}
    fusable: dict[str | None, dict[str, Recipe]] = {None: {}, "norms": {}}
    for entry in examine(model):
        option, finding = entry.family.option, entry.finding
        if option in of_option:
            of_option[option][entry.name] = entry.module
            if finding.state == "fusable":
                mixin: Any = entry.family.mixin_for(finding.spec, False)
                fusable[option][entry.name] = mixin, finding.spec
    recipes = {"original": {}, "fused": fusable[None], "fused_norms": fusable[None] | fusable["norms"]}
    return Forms(of_option[None], of_option["norms"], recipes)


def worth_timing(forms: Forms) -> list[str]:
    """The original, and each form with more kernels of ours than the one before. Leaves the model fused."""
    forms.apply("fused_norms")
    added = {"fused": forms.mlps, "fused_norms": forms.norms}
    run_kernels = {
        form: any(isinstance(module, Fused) and module.runs()[0] is None for module in modules.values())
        for form, modules in added.items()
    }
    return ["original", *(form for form, kernels in run_kernels.items() if kernels)]


@contextmanager
def as_it_came(model: nn.Module) -> Iterator[None]:
    """A context in evaluation mode. Afterwards the same modules as before are fused and in training mode."""
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


def time_forms(request: Request, forms: Forms, timed: Sequence[str], tell: Tell) -> dict[str, dict[str, list[float]]]:
    """The microseconds of one step in each round, by phase and form.

    Every round times every form, so that slow changes, such as the clock of a warming GPU, cancel out in the ratios
    within a round. The form that comes first changes.
    """
    walls: dict[str, dict[str, list[float]]] = {phase: {form: [] for form in timed} for phase in PROFILED_STEPS}
    # the first round compiles kernels, so its times do not count
    for round_ in range(1 + request.rounds):
        first = round_ % len(timed)
        for form in (*timed[first:], *timed[:first]):
            tell(f"{LABELS[form]}, round {round_} of {request.rounds}" if round_ else f"{LABELS[form]}, warm-up")
            forms.apply(form)
            with request.decoding() as step:
                step()  # the first calls after a change look up plans
            start = _now(request)
            state = request.prefill()
            middle = _now(request)
            with request.for_decoding():
                for _ in range(request.new_tokens):
                    state = request.step(*state)
            end = _now(request)
            if round_:
                walls["prefill"][form].append((middle - start) * 1e6)
                walls["decode"][form].append((end - middle) * 1e6 / request.new_tokens)
    return walls


def _now(request: Request) -> float:
    """The time in seconds, after the GPUs have finished their work."""
    for gpu in request.gpus:
        torch.cuda.synchronize(gpu)
    return time.perf_counter()


def profile_forms(
    request: Request, forms: Forms, timed: Sequence[str], folder: Path | None, tell: Tell
) -> dict[str, dict[str, Breakdown]]:
    """The parts of one step, by phase and form."""
    steps: dict[str, dict[str, Breakdown]] = {phase: {} for phase in PROFILED_STEPS}
    for form in timed:
        tell(f"{LABELS[form]}, profiler")
        forms.apply(form)
        for phase in PROFILED_STEPS:
            file = folder and folder / f"{phase}-{form}.json"
            count = min(PROFILED_STEPS[phase], request.new_tokens)
            with request.decoding() if phase == "decode" else nullcontext(request.prefill) as step:
                steps[phase][form] = record(step, count, forms.mlps, request.ids.is_cuda, file)
    return steps
