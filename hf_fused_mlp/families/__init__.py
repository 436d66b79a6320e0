"""The families: kinds of modules that can be fused. A new one is a file or folder here and a row of `FAMILIES`."""

from hf_fused_mlp.calls import device_of
from hf_fused_mlp.families.base import Family
from hf_fused_mlp.families.experts import ExpertsFamily
from hf_fused_mlp.families.fp8_linear import FP8LinearFamily
from hf_fused_mlp.families.mlp import MLPFamily
from hf_fused_mlp.families.norm import NormFamily
from hf_fused_mlp.swap import Fused
from hf_fused_mlp.tuning.buckets import bucket
from hf_fused_mlp.types import GPU, ProblemKey

__all__ = ["FAMILIES", "Family", "problem_of"]


def problem_of(module: Fused, m: int) -> ProblemKey | None:
    """The problem of a fused MLP with `m` tokens, whose plans are timed against the original; None for other modules.

    Plans of routed experts are timed against the rule's plan instead.
    """
    family = next(family for family in FAMILIES if isinstance(module, family.mixin))
    key = family.problem(module, module.fused_spec, m, GPU.of(device_of(module)))
    return bucket(key) if isinstance(key, ProblemKey) else None


FAMILIES: tuple[Family, ...] = (MLPFamily(), ExpertsFamily(), NormFamily(), FP8LinearFamily())
