"""Dense MLPs: gated, packed and plain, whole or up to the activation."""

import re
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from hf_fused_mlp.families.base import Family
from hf_fused_mlp.families.mlp.checks import CALLED, called_reason, reject_reason, unknown_activation_reason
from hf_fused_mlp.families.mlp.fused import (
    FusedGatedMLP,
    FusedMLP,
    FusedPackedMLP,
    FusedPlainMLP,
    InvariantGatedMLP,
    InvariantPackedMLP,
    InvariantPlainMLP,
)
from hf_fused_mlp.modes import no_kernels, why_variant
from hf_fused_mlp.originals import is_patched
from hf_fused_mlp.reading.activations import find_activation
from hf_fused_mlp.reading.expression import reading_of
from hf_fused_mlp.reading.mlp import MLPKind, MLPSpec, find_spec, is_known, patched_reason, unknown_child
from hf_fused_mlp.report import Finding
from hf_fused_mlp.swap import Fused, why_not_swappable
from hf_fused_mlp.types import GPU, ProblemKey, storage_of
from hf_fused_mlp.weights.formats import described, read

_MIXINS: dict[MLPKind, type[Fused]] = {
    MLPKind.GATED: FusedGatedMLP,
    MLPKind.PACKED: FusedPackedMLP,
    MLPKind.PLAIN: FusedPlainMLP,
    MLPKind.HALF: FusedPlainMLP,
}
_INVARIANT_MIXINS: dict[MLPKind, type[Fused]] = {
    MLPKind.GATED: InvariantGatedMLP,
    MLPKind.PACKED: InvariantPackedMLP,
    MLPKind.PLAIN: InvariantPlainMLP,
    MLPKind.HALF: InvariantPlainMLP,
}
_CLASS = re.compile(r"MLP|Mlp|FeedForward|FFN|GLU|Experts")
_NAME = re.compile(r"(^|\.)(mlp|ffn|feed_forward|experts)$")


class MLPFamily(Family):
    """Dense MLPs, always on."""

    name, noun, option = "mlps", "MLP", None
    none_found = "strict: found no MLP to fuse; register an unknown class with register_mlp"
    mixin = FusedMLP

    def examine(self, module: nn.Module) -> Finding | None:
        if (spec := find_spec(module)) is None:
            return None
        return Finding.of(why_not_swappable(module, _MIXINS[spec.kind], spec) or reject_reason(module, spec), spec)

    def resembles(self, name: str, module: nn.Module, holds_known: bool) -> str | None:
        if not _looks_like_mlp(name, module) or _only_wraps(module) or (holds_known and not _stacks_matrices(module)):
            return None
        return _unknown_reason(module)

    def mixin_for(self, spec: Hashable, batch_invariant: bool) -> type[Fused]:
        assert isinstance(spec, MLPSpec)
        return (_INVARIANT_MIXINS if batch_invariant else _MIXINS)[spec.kind]

    def why_variant(self, module: nn.Module, spec: Hashable) -> str | None:
        assert isinstance(spec, MLPSpec)
        if reason := called_reason(module, spec):
            return f"{CALLED} ({reason})"
        matrices: list[Any] = [read(module._modules[name]) for name in spec.projections]
        first = matrices[0].data
        # of a GPU that is not there, as fake tensors claim one, nothing is known
        gpu = GPU.of(torch.device("cpu") if no_kernels(first.device) else first.device)
        return why_variant(storage_of(*matrices), first.dtype, gpu)

    def problem(self, module: nn.Module, spec: Hashable, m: int, gpu: GPU) -> ProblemKey | None:
        assert isinstance(spec, MLPSpec)
        children: dict[str, Any] = module._modules
        matrices = [described(children[name]) for name in spec.projections]
        activation = spec.function or find_activation(children[str(spec.activation)])
        if spec.down is None or activation is None or None in matrices:
            return None
        if (storage := storage_of(*matrices)) is None:  # type: ignore[arg-type]
            return None
        *_, up, down = matrices
        # `FusedGatedMLP` does not pack FP8 matrices if up or its scales would not be aligned
        is_fp8_pair = spec.kind is MLPKind.GATED and up.scale is not None
        is_aligned = not is_fp8_pair or (up.scale.nbytes % 16 == 0 and up.data.nbytes % 16 == 0)
        return ProblemKey(
            m=m,
            hidden=up.data.shape[1],
            intermediate=down.data.shape[1],
            out=down.data.shape[0],
            gated=spec.kind is not MLPKind.PLAIN,
            activation=activation,
            dtype=up.data.dtype if up.scale is None else torch.bfloat16,
            bias=any(matrix.bias is not None for matrix in matrices),
            one_block=not spec.up_first
            and is_aligned
            and (not isinstance(module, FusedMLP) or module.why_not_packed() is None),
            gpu=gpu,
            storage=storage,
        )


def _looks_like_mlp(name: str, module: nn.Module) -> bool:
    if type(module).__name__.endswith("RMSNorm") or not any(True for _ in module.parameters()):
        return False
    return bool(_CLASS.search(type(module).__name__) or _NAME.search(name))


def _only_wraps(module: nn.Module) -> bool:
    """True if a module contains nothing but one other module, which the report lists."""
    children = list(module.children())
    return len(children) == 1 and not module._parameters and _looks_like_mlp("", children[0])


def _stacks_matrices(module: nn.Module) -> bool:
    """True if a module directly holds the weights of routed experts."""
    return any(parameter is not None and parameter.dim() == 3 for parameter in module._parameters.values())


def _unknown_reason(module: nn.Module) -> str:
    """Why a module that looks like an MLP is skipped."""
    if experts := _routed_experts(module):
        return f"routed experts, whose weights are one tensor ({experts}), in an unknown class; they run unchanged"
    cls: Any = type(module)
    if is_patched(cls):
        return patched_reason(cls)
    if name := unknown_child(module):
        return unknown_activation_reason(name, module.get_submodule(name))
    bases = [base for base in cls.__mro__[1:] if getattr(base, "forward", cls.forward) is not cls.forward]
    known = next((base.__name__ for base in bases if is_known(base)), None)
    what = f", a subclass of {known}," if known else ""
    reading = reading_of(cls.forward)
    text = f"; reading stops at `{reading.unread}`" if reading is not None and reading.unread else ""
    return (
        f"{cls.__name__}{what} has a forward that is not recognised as a gated or plain MLP{text}; if it "
        f"computes one anyway, call register_mlp({cls.__name__}, MLPSpec(...)) first"
    )


def _routed_experts(module: nn.Module) -> str | None:
    """The first tensor in `module` that stacks matrices; the weights of convolutions and vectors do not count."""
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(path, recurse=False):
            if parameter.dim() == 3 and 1 not in parameter.shape[1:] and not isinstance(owner, nn.Conv1d):
                return f"{name} {list(parameter.shape)}"
    return None
