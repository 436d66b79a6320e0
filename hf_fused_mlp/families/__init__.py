"""The families: kinds of modules that can be fused. A new one is a file or folder here and a row of `FAMILIES`."""

from hf_fused_mlp.families.base import Family
from hf_fused_mlp.families.experts import ExpertsFamily
from hf_fused_mlp.families.fp8_linear import FP8LinearFamily
from hf_fused_mlp.families.mlp import MLPFamily
from hf_fused_mlp.families.norm import NormFamily

__all__ = ["FAMILIES", "Family"]

FAMILIES: tuple[Family, ...] = (MLPFamily(), ExpertsFamily(), NormFamily(), FP8LinearFamily())
