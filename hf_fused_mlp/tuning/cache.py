"""Looks up measured plans: first in the user's file, then in the one that ships with the package.

A file is read at the first look-up for its GPU, and kept for the life of the process.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from platformdirs import user_cache_dir

from hf_fused_mlp.launch_cache import left_alone, remembered
from hf_fused_mlp.logs import logger
from hf_fused_mlp.tuning.buckets import bucket
from hf_fused_mlp.tuning.plan_files import TunedPlan, read, write
from hf_fused_mlp.types import GPU, ExpertsKey, ExpertsPlan, Plan, ProblemKey

# the keys of plans
Key = ProblemKey | ExpertsKey

SHIPPED = Path(__file__).parent / "plans"

# the plans that did not run
unusable: set[Plan | ExpertsPlan] = set()


def user_file(gpu: GPU) -> Path:
    """The user's plans for `gpu`. Environments with other versions of PyTorch and Triton have files of their own.

    Raises:
        RuntimeError: as `user_directory`.
    """
    versions = f"torch {torch.__version__} triton {triton.__version__}"
    return user_directory() / file_name(f"{gpu.name} {gpu.num_sms} {versions}")


def user_directory() -> Path:
    """The user's directory: `$HF_FUSED_MLP_CACHE`, `$HF_HOME/hf-fused-mlp`, or one in the system's cache directory.

    Raises:
        RuntimeError: there is no home directory to find that place by.
    """
    if own := os.environ.get("HF_FUSED_MLP_CACHE"):
        directory = own
    elif shared := os.environ.get("HF_HOME"):
        directory = os.path.join(os.path.expandvars(shared), "hf-fused-mlp")
    else:
        directory = user_cache_dir("hf-fused-mlp", appauthor=False)
    return Path(directory).expanduser()


def shipped_file(gpu: GPU) -> Path:
    """Such as `nvidia-h100-80gb-hbm3-132.json`; one GPU's name may stand for several sizes."""
    return SHIPPED / file_name(f"{gpu.name} {gpu.num_sms}")


def file_name(what: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", what.lower()) + ".json"


def user_plan(key: Key) -> Any:
    """The plan that was measured on this machine, with the versions of PyTorch and Triton that run now."""
    tuned = _user_tuned(key)
    return tuned.plan if tuned else None


def shipped_plan(key: Key) -> Any:
    """The plan that came with the package, measured on the same GPU and kernels but maybe with other versions.

    Plans ship for bf16. They also serve fp16, which moves as many bytes and multiplies as fast.
    """
    tuned = _shipped_tuned(key)
    return tuned.plan if tuned else None


def tuned_plan(key: Key) -> TunedPlan | None:
    """The measured plan for `key`, with its times; None if none was measured, or if it does not run here."""
    tuned = _user_tuned(key) or _shipped_tuned(key)
    return None if tuned is None or tuned.plan in unusable else tuned


def save(tuned: Iterable[TunedPlan], gpu: GPU, path: Path | None = None) -> Path:
    """Adds plans to `path` (default: the user's file), where the next call finds them. Returns the path.

    Raises:
        OSError: the file cannot be written, or is one of something else.
        RuntimeError: there is no home directory for the user's file.
    """
    path = path or user_file(gpu)
    write(path, tuned, gpu)
    forget()
    return path


def forget() -> None:
    """Empties the memory of this process; files are read again at the next look-up."""
    _user_plans.cache_clear()
    _shipped_plans.cache_clear()
    remembered.clear()
    left_alone.clear()
    unusable.clear()


def _user_tuned(key: Key) -> TunedPlan | None:
    return _user_plans(key.gpu).get(bucket(key))


def _shipped_tuned(key: Key) -> TunedPlan | None:
    if key.dtype == torch.float16:
        key = replace(key, dtype=torch.bfloat16)
    return _shipped_plans(key.gpu).get(bucket(key))


@cache
def _user_plans(gpu: GPU) -> dict[Key, TunedPlan]:
    try:
        path = user_file(gpu)
    except RuntimeError as error:
        logger.warning("the user's plan cache is disabled (%s); set HF_FUSED_MLP_CACHE to a directory", error)
        return {}
    return _with_halves(read(path, gpu))


@cache
def _shipped_plans(gpu: GPU) -> dict[Key, TunedPlan]:
    return _with_halves(read(shipped_file(gpu), gpu, any_version=True))


def _with_halves(plans: dict[Key, TunedPlan]) -> dict[Key, TunedPlan]:
    """`plans`, and for the same MLPs without down the plan of one that has it."""
    halves = {replace(key, out=0): tuned for key, tuned in plans.items() if isinstance(key, ProblemKey)}
    return halves | plans
