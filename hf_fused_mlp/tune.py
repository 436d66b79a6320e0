"""Measures plans for the MLPs of one model, once. `fuse_model(model, tune=True)` does this after fusing."""

import os
import time
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_fused_mlp import modes
from hf_fused_mlp.calls import device_of, dtype_of
from hf_fused_mlp.families import problem_of
from hf_fused_mlp.logs import logger
from hf_fused_mlp.swap import Fused
from hf_fused_mlp.threads import LOCK
from hf_fused_mlp.tuning.buckets import COUNTS
from hf_fused_mlp.types import GPU, ProblemKey

if TYPE_CHECKING:
    from hf_fused_mlp.tuning.plan_files import TunedPlan

TRIED = 6  # how many of our configurations to try for each launch; `hf-fused-mlp tune` tries all
TOKENS = tuple(count for count in COUNTS if count <= 4096)  # beyond the last, the rule chooses


def unmeasured(model: nn.Module) -> dict[ProblemKey, torch.device]:
    """The problems of the fused MLPs of `model` that have no measured plan, and the GPU to measure each on.

    Modules that call some of their layers, run their original forward or are batch-invariant have no such problems.
    What counts is evaluation mode, whatever mode the model is in.
    """
    problems: dict[ProblemKey, torch.device] = {}
    with LOCK, modes.evaluating(model):
        for module in model.modules():
            if not isinstance(module, Fused) or module.batch_invariant or module.runs() != (None, None):
                continue
            for m in TOKENS:
                if (key := problem_of(module, m)) is not None:
                    problems.setdefault(key, device_of(module))
    if not problems:
        return {}
    from hf_fused_mlp.tuning.cache import tuned_plan  # imports Triton

    return {key: device for key, device in problems.items() if tuned_plan(key) is None}


def tune_model(model: nn.Module) -> None:
    """Measures a plan for each problem of `unmeasured` and adds it to the user's plans, for this and later processes.

    If plans cannot be measured or kept, a warning says why, no error is raised, and the rule chooses.
    """
    places = {(device_of(module), dtype_of(module)) for module in model.modules() if isinstance(module, Fused)}
    if reasons := sorted({reason for place in places if (reason := modes.no_kernels(*place))}):
        logger.warning("tune: nothing is measured where no kernel runs: %s", "; ".join(reasons))
    problems = unmeasured(model)
    if not problems:
        return

    from hf_fused_mlp.tuning import cache  # imports Triton

    def keep(tuned: list["TunedPlan"], gpu: GPU) -> bool:
        try:
            cache.save(tuned, gpu)
        except (OSError, RuntimeError) as error:
            logger.warning("tune: plans cannot be kept (%s); set HF_FUSED_MLP_CACHE to a directory", error)
            return False
        return True

    # before measuring, find out whether plans can be kept
    if not all(keep([], gpu) for gpu in {key.gpu for key in problems}):
        return
    began, count = time.monotonic(), 0
    for key, device in _with_progress(problems):
        try:
            tuned = _measured(key, device)
        except torch.OutOfMemoryError:
            logger.warning("tune: the GPU has no room to measure %s tokens of %s", key.m, _name(key))
        except Exception as error:  # of the GPU or the compiler; the model is fused, and others may be measured
            logger.warning("tune: %s tokens of %s cannot be measured: %s", key.m, _name(key), error)
        else:
            if not keep([tuned], key.gpu):
                return
            count += 1
    logger.info("tune: %d problems measured in %.0f s", count, time.monotonic() - began)


def _measured(key: ProblemKey, device: torch.device) -> "TunedPlan":
    """The plan of `tuner.tune`. Leaves the caller's random generators as they were, and runs without autocast."""
    from hf_fused_mlp.tuning import tuner  # imports Triton

    on_gpu = device.type == "cuda"
    with (
        torch.random.fork_rng([device] if on_gpu else []),
        torch.cuda.device(device if on_gpu else -1),
        torch.autocast(device.type, enabled=False),
    ):
        return tuner.tune(key, device, most=TRIED)


def _with_progress(problems: dict[ProblemKey, torch.device]):
    """The problems, with a progress bar on standard error if that is a terminal or a notebook."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    shown = (console.is_terminal or console.is_jupyter) and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    return track(list(problems.items()), "measuring MLPs", console=console, disable=not shown, transient=True)


def _name(key: ProblemKey) -> str:
    return f"{key.hidden} x {key.intermediate}"
