"""The speed of a model, eager and fused with norms: `audit` without the profiler."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from hf_fused_mlp.profiling.intervals import speedup
from hf_fused_mlp.profiling.measure import as_it_came, forms_of, time_forms
from hf_fused_mlp.profiling.report import Speedup
from hf_fused_mlp.profiling.request import Request

FORMS = ("original", "fused_norms")


@dataclass(frozen=True)
class Timed:
    """A step of one phase: microseconds of each form, medians of paired rounds, and what fusing gained."""

    phase: str
    original_us: float
    fused_norms_us: float
    speedup: Speedup


def measure_speed(model: nn.Module, request: Request, tell: Callable[[str], None]) -> list[Timed]:
    """Times prefill and decode of `request` and restores the model. `tell` is called with the name of each step."""
    with as_it_came(model), torch.no_grad():
        walls = time_forms(request, forms_of(model), FORMS, tell)
    prompt = request.ids.shape[1]
    names = {"prefill": f"prefill, {prompt} tokens", "decode": f"decode, one token after {prompt}"}
    return timed({names[phase]: rounds for phase, rounds in walls.items()})


def timed(walls: dict[str, dict[str, list[float]]]) -> list[Timed]:
    """One row per phase, from the rounds of each form."""
    rows = []
    for phase, rounds in walls.items():
        original, fused = (rounds[form] for form in FORMS)
        rows.append(Timed(phase, statistics.median(original), statistics.median(fused), speedup(original, fused)))
    return rows
