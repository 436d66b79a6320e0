"""Routed experts: the sparse half of a mixture of experts, stacked in 3-D tensors.

Calls that need gradients, or whose weights are not as they were read, run the original forward, which is whatever
`experts_implementation` the model's config names.
"""

from collections.abc import Hashable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_fused_mlp import modes, ops
from hf_fused_mlp.calls import OWN_FORWARD, device_of, has_own_forward
from hf_fused_mlp.families.base import Family
from hf_fused_mlp.launch_cache import answer, experts_kind
from hf_fused_mlp.originals import functions_are_own, why_functions_are_not_own
from hf_fused_mlp.reading.experts import ExpertsSpec, activation_of, find_experts, gate_of, original_of
from hf_fused_mlp.report import Finding
from hf_fused_mlp.swap import Fused, Runs, why_not_swappable
from hf_fused_mlp.types import GPU, ExpertsOperands

DTYPES = torch.float16, torch.bfloat16, torch.float32


class FusedExperts(Fused):
    """Routed experts whose forward is our operator if the caller needs only the output, and else the original."""

    fused_spec: ClassVar[ExpertsSpec]
    _gate_read: ClassVar[Any]

    def __init_subclass__(cls, **kwargs):
        if original := vars(cls).get("original_class"):
            type.__setattr__(cls, "_gate_read", gate_of(original))

    def forward(self, *args, **kwargs):
        cls: Any = type(self)  # read once: another thread may unfuse the module meanwhile
        if not issubclass(cls, FusedExperts):
            return cls.forward(self, *args, **kwargs)
        if len(args) == 3 and not kwargs and _keeps_code(self, cls):
            out = fused_output(self, cls.fused_spec, *args)
            if out is not None:
                return out
        return cls.original_class.forward(self, *args, **kwargs)

    def runs(self, device: torch.device | None = None, elements: int | None = None) -> Runs:
        if has_own_forward(self) or not _keeps_code(self, type(self)):
            return Runs("its forward or its gate was replaced since it was fused, and what took its place runs")
        if operands_of(self, self.fused_spec) is None:
            return Runs("its weights or attributes are no longer those that were read, so the original forward runs")
        reason = None if functions_are_own() else why_functions_are_not_own()
        if self.training:
            reason = "in training mode, where the original forward runs"
        return Runs(reason or modes.no_kernels(device or device_of(self)))

    def call_inputs(self, args: tuple, kwargs: dict) -> tuple[Tensor, ...] | None:
        usual = len(args) == 3 and not kwargs and all(type(value) is Tensor for value in args)
        return args if usual else None

    def by_operator(self, *inputs: Tensor) -> Tensor:
        x, ids, weights = inputs
        operands = operands_of(self, self.fused_spec)
        if operands is None:
            raise RuntimeError(f"{type(self).__name__}: its weights are no longer those that were read")
        return ops.experts(x, ids, weights, operands)


def _keeps_code(module: FusedExperts, cls: type[FusedExperts]) -> bool:
    """True if forward and `_apply_gate` are those that were read."""
    original: Any = cls.original_class
    forward = original.forward
    return (
        forward is cls.original_forward
        and forward.__code__ is cls.original_code
        and gate_of(original) is cls._gate_read
        and "_apply_gate" not in module.__dict__
    )


def fused_output(module: nn.Module, spec: ExpertsSpec, x: Any, ids: Any, weights: Any) -> Tensor | None:
    """Our operator's output; None if the original forward must run.

    Args:
        x: `[M, H]`.
        ids, weights: `[M, k]`.
    """
    if not (isinstance(x, Tensor) and isinstance(ids, Tensor) and isinstance(weights, Tensor)):
        return None
    # in training mode too, since reentrant checkpointing turns gradients off and computes the outputs again later
    if torch.is_grad_enabled() or module.training or not functions_are_own():
        return None
    if (operands := operands_of(module, spec)) is None:
        return None
    if torch.compiler.is_compiling():
        usual = modes.is_ordinary(x) and not modes.autocasts() and modes.no_kernels(x.device) is None
        return ops.experts_if_fits(x, ids, weights, operands) if usual else None
    if not modes.needs_only_output(x) or type(ids) is not Tensor or type(weights) is not Tensor:
        return None
    *stacks, _ = operands
    tensors = x, ids, weights, *stacks
    out = answer(experts_kind(operands), tensors, tensors)
    if out is None and modes.runs_now(x) and modes.no_kernels(x.device) is None:
        out = ops.experts_if_fits(x, ids, weights, operands)
    return out


def operands_of(module: nn.Module, spec: ExpertsSpec) -> ExpertsOperands | None:
    """The weights, if module and weights are as they were read."""
    own = module.__dict__
    for name, value in spec.held:
        if own.get(name) != value:
            return None
    if spec.act_fn and activation_of(module) != spec.form.activation:
        return None
    parameters = own["_parameters"]
    up, down = parameters.get(spec.up), parameters.get(spec.down)
    up_bias = None if spec.up_bias is None else parameters.get(spec.up_bias)
    down_bias = None if spec.down_bias is None else parameters.get(spec.down_bias)
    for tensor in (up, down) if spec.up_bias is None else (up, down, up_bias, down_bias):
        if type(tensor) is not nn.Parameter and type(tensor) is not Tensor:  # expert parallelism puts tensors there
            return None
    return ExpertsOperands(up, down, up_bias, down_bias, spec.form)  # type: ignore[arg-type]


class ExpertsFamily(Family):
    """Routed experts, always on."""

    name, noun, option = "experts", "experts module", None
    none_found = "strict: found no routed experts to fuse"
    mixin = FusedExperts

    def examine(self, module: nn.Module) -> Finding | None:
        if isinstance(module, FusedExperts):
            return Finding("fused", module.runs().original)
        spec = find_experts(module)
        if spec is None:
            return None
        if isinstance(spec, str):
            stacks = [name for name in ("gate_up_proj", "up_proj", "down_proj") if name in module._parameters]
            reason = _why_not_plain(module, stacks) or f"{spec}; pass exclude=[...] to leave this module as it is"
            return Finding("skipped", reason)
        return Finding.of(why_not_swappable(module, FusedExperts, spec) or _reject_reason(module, spec), spec)

    def resembles(self, name: str, module: nn.Module, holds_known: bool) -> None:
        return None  # a stack of matrices that nothing is known about is listed among the MLPs

    def mixin_for(self, spec: Hashable) -> type[Fused]:
        return FusedExperts

    def problem(self, module: nn.Module, spec: Hashable, m: int, gpu: GPU) -> None:
        return None


def _reject_reason(module: nn.Module, spec: ExpertsSpec) -> str | None:
    """Why `module` cannot be fused as `spec` says, with the remedy, or None if it can."""
    if has_own_forward(module):
        if original_of(type(module).forward) is None:
            return OWN_FORWARD
        return (
            "its forward was replaced on the instance, as expert and tensor parallelism do; "
            'experts_implementation="hf_fused_mlp" fuses what that calls; or pass exclude=[...]'
        )
    return _why_not_plain(module, filter(None, (spec.up, spec.down, spec.up_bias, spec.down_bias)))


def _why_not_plain(module: nn.Module, names: Iterable[str]) -> str | None:
    """Which of these weights no kernel reads, quantized ones for example, with the remedy, or None."""
    for name in names:
        parameter = module._parameters.get(name)
        if type(parameter) is not nn.Parameter or parameter.dtype not in DTYPES:
            found = "missing" if parameter is None else f"{type(parameter).__name__} of {parameter.dtype}"
            return (
                f"{name} is {found}, expected a Parameter of fp16, bf16 or fp32; load without quantization_config, "
                "and fuse before weights are sharded"
            )
    return None
