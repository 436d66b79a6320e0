"""RMSNorms: one launch in place of about eight. This helps eager decoding, where the GPU waits for Python.

Compiled code and calls that need gradients run the original forward.
"""

from collections.abc import Hashable
from types import CodeType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_fused_mlp import modes, ops
from hf_fused_mlp.calls import OWN_FORWARD, device_of, has_own_forward
from hf_fused_mlp.families.base import Family
from hf_fused_mlp.launch_cache import answer
from hf_fused_mlp.originals import rsqrt_is_own, why_functions_are_not_own
from hf_fused_mlp.reading.norm import NormSpec, find_norm
from hf_fused_mlp.report import Finding
from hf_fused_mlp.swap import Fused, Runs, why_not_swappable
from hf_fused_mlp.types import GPU


class FusedRMSNorm(Fused):
    """An RMSNorm whose forward is one launch if the caller needs only the output, and the original otherwise."""

    fused_spec: ClassVar[NormSpec]
    _helper_code: ClassVar[tuple[CodeType, ...]]

    def __init_subclass__(cls, **kwargs):
        if spec := vars(cls).get("fused_spec"):
            type.__setattr__(cls, "_helper_code", tuple(function.__code__ for _, function in spec.helpers))

    def forward(self, *args, **kwargs):
        # read once, because another thread may unfuse the module meanwhile; this also saves compiled code guards of
        # the class
        traced = torch.compiler.is_compiling()
        cls: Any = self if traced else type(self)
        # a wrapper of this forward may call it after the module was unfused
        if not (isinstance(self, FusedRMSNorm) if traced else issubclass(cls, FusedRMSNorm)):
            return type(self).forward(self, *args, **kwargs)
        if len(args) == 1 and not kwargs and not traced:
            out = _launched(self, cls, args[0])
            if out is not None:
                return out
        return cls.original_class.forward(self, *args, **kwargs)  # not `super()`, which adds guards

    def runs(self, device: torch.device | None = None, elements: int | None = None) -> Runs:
        if has_own_forward(self) or _operands(self, type(self)) is None:
            return Runs(
                "its forward, its weight or its epsilon was replaced after fusing, so the original forward runs"
            )
        reason = None if rsqrt_is_own() else why_functions_are_not_own()
        return Runs(reason or modes.no_kernels(device or device_of(self), self._parameters["weight"].dtype))

    @staticmethod
    def read_again(module: nn.Module) -> NormSpec | None:
        return find_norm(module)


def _launched(norm: FusedRMSNorm, cls: type[FusedRMSNorm], x: Any) -> Tensor | None:
    """The kernel's output, or None if the original forward must run."""
    if not modes.needs_only_output(x) or not rsqrt_is_own() or (operands := _operands(norm, cls)) is None:
        return None
    weight, eps = operands
    form = cls.fused_spec.form
    out = answer((form, eps), (x, weight), (x, weight))
    if out is None and modes.HAS_TRITON and modes.runs_now(x):
        return ops.on_gpu().rms_norm(x, weight, eps, form)
    return None if out is NotImplemented else out


def _operands(norm: FusedRMSNorm, cls: type[FusedRMSNorm]) -> tuple[nn.Parameter, float] | None:
    """Weight and epsilon; None if the module or its class has changed since it was read."""
    spec, own, original = cls.fused_spec, norm.__dict__, cls.original_class
    weight, eps = own["_parameters"].get("weight"), own.get(spec.eps)
    forward: Any = original.forward
    if forward is not cls.original_forward or getattr(forward, "__code__", None) is not cls.original_code:
        return None
    if type(weight) is not nn.Parameter or type(eps) is not float or forward.__globals__.get("torch") is not torch:
        return None
    for (name, function), code in zip(spec.helpers, cls._helper_code) if spec.helpers else ():  # noqa: B905
        if name in own or getattr(original, name, None) is not function or function.__code__ is not code:
            return None
    return weight, eps


class NormFamily(Family):
    """RMSNorms, fused on request."""

    name, noun, option = "norms", "norm", "norms"
    none_found = "strict: found no RMSNorm to fuse; call fuse_model without norms=True"
    mixin = FusedRMSNorm

    def examine(self, module: nn.Module) -> Finding | None:
        if (spec := find_norm(module)) is None:
            return None
        return Finding.of(why_not_swappable(module, FusedRMSNorm, spec) or _reject_reason(module, spec), spec)

    def resembles(self, name: str, module: nn.Module, holds_known: bool) -> str | None:
        class_name = type(module).__name__
        if not class_name.endswith("RMSNorm"):
            return None
        return f"{class_name} has a forward that is not recognised as an RMSNorm"

    def mixin_for(self, spec: Hashable, batch_invariant: bool) -> type[Fused]:
        return FusedRMSNorm

    def why_variant(self, module: nn.Module, spec: Hashable) -> None:
        return None  # each row has a program of its own

    def problem(self, module: nn.Module, spec: Hashable, m: int, gpu: GPU) -> None:
        return None


def _reject_reason(module: nn.Module, spec: NormSpec) -> str | None:
    """Why `module` cannot be fused according to `spec`, with the remedy, or None if it can."""
    if has_own_forward(module) or any(name in module.__dict__ for name, _ in spec.helpers):
        return OWN_FORWARD
    if module._modules or module._buffers or module._parameters.keys() != {"weight"}:
        held = ", ".join((*module._modules, *module._buffers, *module._parameters)) or "nothing"
        return f"it holds {held}, expected only a weight; pass exclude=[...] to skip this module"
    return None
