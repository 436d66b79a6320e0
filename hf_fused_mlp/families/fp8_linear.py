"""Projections of FP8 checkpoints, including those of attention, fused on request.

Transformers loads the kernels of `FP8Linear` from the Hub at run time. Our kernels need no download. A fused MLP reads
its projections directly, whether they are fused or not.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from hf_fused_mlp import modes, ops
from hf_fused_mlp.calls import OWN_FORWARD, device_of, has_own_forward
from hf_fused_mlp.families.base import Family
from hf_fused_mlp.launch_cache import answer, mlp_kind
from hf_fused_mlp.originals import runs_own_forward
from hf_fused_mlp.report import Finding
from hf_fused_mlp.swap import Fused, Runs, why_not_swappable
from hf_fused_mlp.types import ABSENT, GPU, MLPOperands
from hf_fused_mlp.weights.blocks import unusable_scales
from hf_fused_mlp.weights.formats import fp8_matrix, is_fp8_linear, is_loaded, why_not_fp8


class FusedFP8Linear(Fused):
    """``x @ weight.T + bias`` with FP8 weights: the first launch of an MLP without gate and activation."""

    def forward(self, *args, **kwargs):
        # read once, because another thread may unfuse the module meanwhile; this also saves compiled code guards of
        # the class
        traced = torch.compiler.is_compiling()
        cls: Any = self if traced else type(self)
        # a wrapper of this forward may call it after the module was unfused
        if not (isinstance(self, FusedFP8Linear) if traced else issubclass(cls, FusedFP8Linear)):
            return type(self).forward(self, *args, **kwargs)
        x = args[0] if args else kwargs.get(cls.input_name)
        if len(args) + len(kwargs) == 1 and isinstance(x, Tensor):
            out = _product(self, cls, x)
            if out is not None:
                return out
        return cls.original_class.forward(self, *args, **kwargs)  # not `super()`, which adds guards

    def runs(self, device: torch.device | None = None, elements: int | None = None) -> Runs:
        if has_own_forward(self):
            return Runs(OWN_FORWARD)
        reason = _why_not_read(self) or _why_not_own(type(self).original_class)
        return Runs(reason or modes.no_kernels(device or device_of(self), least=modes.COMPLETE))

    @staticmethod
    def read_again(module: nn.Module) -> str | None:
        return "linear" if fp8_matrix(module) is not None else None


def _product(linear: FusedFP8Linear, cls: type[FusedFP8Linear], x: Tensor) -> Tensor | None:
    """The kernels' output, or None if the original forward must run."""
    if (matrix := fp8_matrix(linear)) is None or not runs_own_forward(cls.original_class):
        return None
    if not torch.compiler.is_compiling() and modes.needs_only_output(x):
        kind = mlp_kind(ABSENT, matrix, ABSENT, "identity")
        out = answer(kind, (x, *ABSENT, *matrix, *ABSENT), (x, ABSENT, matrix, ABSENT))
        if out is not None:
            return out
    if not modes.is_ordinary(x) or modes.no_kernels(x.device, least=modes.COMPLETE) is not None or matrix.data.is_meta:
        return None
    # the original ignores autocast
    with torch.autocast(x.device.type, enabled=False):
        return ops.mlp_if_fits(x, MLPOperands(ABSENT, matrix, ABSENT, "identity"))


class FP8LinearFamily(Family):
    """`FP8Linear`s of Transformers, fused on request."""

    name, noun, option = "fp8_linears", "FP8 linear", "fp8_linears"
    none_found = "strict: found no FP8Linear to fuse; call fuse_model without fp8_linears=True"
    mixin = FusedFP8Linear

    def examine(self, module: nn.Module) -> Finding | None:
        if not is_fp8_linear(module) or ((matrix := fp8_matrix(module)) is not None and matrix.scale is None):
            return None  # or its weight stayed in floats
        return Finding.of(why_not_swappable(module, FusedFP8Linear, "linear") or _reject_reason(module), "linear")

    def resembles(self, name: str, module: nn.Module, holds_known: bool) -> str | None:
        return None

    def mixin_for(self, spec: Hashable, batch_invariant: bool) -> type[Fused]:
        return FusedFP8Linear

    def why_variant(self, module: nn.Module, spec: Hashable) -> str:
        return f"no kernels for {self.noun}s have sums that ignore the token count"

    def problem(self, module: nn.Module, spec: Hashable, m: int, gpu: GPU) -> None:
        return None


def _reject_reason(module: nn.Module) -> str | None:
    """Why `module` cannot be fused, with the remedy, or None if it can."""
    if has_own_forward(module):
        return OWN_FORWARD
    matrix = fp8_matrix(module)
    reason = _why_not_read(module) or _why_not_own(type(module))
    return reason if reason or matrix is None else unusable_scales(matrix.scale)


def _why_not_read(module: nn.Module) -> str | None:
    """Why no call will have readable weights, or None. Weights that a hook fetches for each call are readable."""
    matrix = fp8_matrix(module)
    return None if matrix is not None and is_loaded(module) else why_not_fp8(module)


def _why_not_own(cls: type[nn.Module]) -> str | None:
    return None if runs_own_forward(cls) else f"the forward of {cls.__name__} was replaced; undo the patch"
