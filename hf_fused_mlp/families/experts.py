"""Routed experts: the sparse half of a mixture of experts, stacked in 3-D tensors.

Calls that need gradients, or whose weights have changed since they were read, run the original forward, which runs the
`experts_implementation` that the model's config names.
"""

from collections.abc import Hashable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from hf_fused_mlp import modes, ops
from hf_fused_mlp.calls import OWN_FORWARD, device_of, has_own_forward
from hf_fused_mlp.families.base import Family
from hf_fused_mlp.launch_cache import answer, experts_kind
from hf_fused_mlp.ops.experts import DTYPES, share_scales, stacks_fit
from hf_fused_mlp.originals import functions_are_own, why_functions_are_not_own
from hf_fused_mlp.reading.experts import (
    ExpertsSpec,
    activation_of,
    find_experts,
    form_of,
    has_own_gate,
    hf_fused_mlp_wraps,
    interface_of,
    keeps_names,
    multiplies_by_scales,
    original_of,
)
from hf_fused_mlp.reading.implementations import implementation_of, runs_transformers_own
from hf_fused_mlp.report import Finding
from hf_fused_mlp.swap import Fused, Runs, why_not_swappable
from hf_fused_mlp.types import FP8, GPU, ExpertsKey, ExpertsOperands, next_power_of_two
from hf_fused_mlp.weights.blocks import are_blocks, unusable_scales, why_not_blocks

# the names of the number of experts per token in configs; the modules do not store it
TOP_K = "num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k"


class FusedExperts(Fused):
    """Routed experts whose forward is our operator if the caller needs only the output, and the original otherwise."""

    fused_spec: ClassVar[ExpertsSpec]
    # the registry in which the original forward looks up the implementation
    _interface: ClassVar[Any]

    def __init_subclass__(cls, **kwargs):
        if "original_class" in vars(cls):
            type.__setattr__(cls, "_interface", interface_of(cls.original_forward))

    def forward(self, *args, **kwargs):
        cls: Any = type(self)  # read once: another thread may unfuse the module meanwhile
        if not issubclass(cls, FusedExperts):
            return cls.forward(self, *args, **kwargs)
        if len(args) == 3 and not kwargs and _keeps_code(self, cls) and runs_transformers_own(self, cls._interface):
            out = fused_output(self, cls.fused_spec, *args)
            if out is not None:
                return out
        return cls.original_class.forward(self, *args, **kwargs)

    def runs(self, device: torch.device | None = None, elements: int | None = None) -> Runs:
        if has_own_forward(self) or not _keeps_code(self, type(self)):
            return Runs("its forward or its gate was replaced after fusing, so the replacement runs")
        reason = why_not_kernels(self, self.fused_spec) or _other_implementation(self, self._interface)
        if reason is None and not functions_are_own():
            reason = why_functions_are_not_own()
        if reason is None and self.training:
            reason = "in training mode, where the original forward runs"
        return Runs(reason or modes.no_kernels(device or device_of(self), least=modes.COMPLETE))

    def call_inputs(self, args: tuple, kwargs: dict) -> tuple[Tensor, ...] | None:
        usual = len(args) == 3 and not kwargs and all(type(value) is Tensor for value in args)
        return args if usual else None

    @staticmethod
    def read_again(module: nn.Module) -> ExpertsSpec | str | None:
        return find_experts(module)

    @staticmethod
    def _also_read(original: Any) -> tuple:
        loop, gate = original_of(original.forward), getattr(original, "_apply_gate", None)
        linear = getattr(original, "linear", None)
        return tuple(part for read in (loop, gate, linear) for part in (read, getattr(read, "__code__", None)))

    @staticmethod
    def exact_output(exact: nn.Module, *inputs: Tensor) -> Tensor:
        # the loop of the class, because other implementations do not take float64
        return (original_of(type(exact).forward) or type(exact).forward)(exact, *inputs)

    def by_operator(self, *inputs: Tensor) -> Tensor:
        x, ids, weights = inputs
        operands = operands_of(self, self.fused_spec)
        if operands is None:
            raise RuntimeError(f"{type(self).__name__}: its weights or attributes changed after fusing")
        return ops.experts(x, ids, weights, operands)


def _keeps_code(module: FusedExperts, cls: type[FusedExperts]) -> bool:
    """True if forward, loop, `_apply_gate` and for FP8 `linear` are those that were read.

    The decorator may have wrapped the loop again, as it does with `FP8Experts` for each model that is loaded.
    """
    original: Any = cls.original_class
    forward, code, loop, loop_code, gate, gate_code, linear, linear_code = cls.was_read
    return (
        (original.forward is forward or hf_fused_mlp_wraps(original.forward, loop))
        and forward.__code__ is code
        and getattr(loop, "__code__", None) is loop_code
        and getattr(original, "_apply_gate", None) is gate
        and getattr(gate, "__code__", None) is gate_code
        and (linear is None or (original.linear is linear and linear.__code__ is linear_code))
        and keeps_names(loop)
        and keeps_names(gate)
        and not has_own_gate(module)
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
    if spec.act_fn and _has_any_global_hook():
        return None
    if (operands := operands_of(module, spec)) is None:
        return None
    if torch.compiler.is_compiling():
        usual = (
            modes.is_ordinary(x) and not modes.autocasts() and modes.no_kernels(x.device, least=modes.COMPLETE) is None
        )
        return ops.experts_if_fits(x, ids, weights, operands) if usual else None
    if not modes.needs_only_output(x) or type(ids) is not Tensor or type(weights) is not Tensor:
        return None
    tensors = x, ids, weights, *operands.tensors
    out = answer(experts_kind(operands), tensors, tensors)
    if out is None and modes.runs_now(x) and modes.no_kernels(x.device, least=modes.COMPLETE) is None:
        out = ops.experts_if_fits(x, ids, weights, operands)
    return out


def _is_plain(tensor: Any) -> bool:
    return type(tensor) is nn.Parameter or type(tensor) is Tensor


def operands_of(module: nn.Module, spec: ExpertsSpec) -> ExpertsOperands | None:
    """The weights, if module and weights are as they were read."""
    own = module.__dict__
    for name, value in spec.flags:
        if own.get(name) is not value:
            return None
    if (form := form_of(module, spec)) is None or (spec.act_fn and activation_of(module) != form.activation):
        return None
    parameters = own["_parameters"]
    up, down = parameters.get(spec.up), parameters.get(spec.down)
    up_bias = down_bias = None
    # expert parallelism puts bare tensors there; and what an instance has under the name hides the parameter
    if not (_is_plain(up) and _is_plain(down)) or spec.up in own or spec.down in own:
        return None
    if spec.up_bias is not None:
        up_bias, down_bias = parameters.get(spec.up_bias), parameters.get(spec.down_bias)
        if not (_is_plain(up_bias) and _is_plain(down_bias)) or spec.up_bias in own or spec.down_bias in own:
            return None
    count = own.get("num_experts")
    if (
        type(count) is not int
        or up.dim() == 0
        or count != up.shape[0]
        or (spec.in_fp32 and up.dtype is not torch.float32)
    ):
        return None
    if spec.up_scale is None or up.dtype != FP8:
        return ExpertsOperands(up, down, up_bias, down_bias, form)  # type: ignore[arg-type]
    up_scale, down_scale = parameters.get(spec.up_scale), parameters.get(spec.down_scale)
    if not (_is_plain(up_scale) and _is_plain(down_scale)) or spec.up_scale in own or spec.down_scale in own:
        return None
    if "linear" in own or own.get("activation_scheme") == "static" or not are_blocks(own.get("block_size")):
        return None
    return ExpertsOperands(up, down, None, None, form, up_scale, down_scale)  # type: ignore[arg-type]


def _why_not_scaled(module: nn.Module, spec: ExpertsSpec) -> str | None:
    """Why kernels read no scales of the stacks of `module`, with the remedy; None if they do, or if it has floats."""
    own, parameters = module.__dict__, module._parameters
    for name, scale_name in ((spec.up, spec.up_scale), (spec.down, spec.down_scale)):
        weight, scale = parameters.get(name), parameters.get(str(scale_name))
        if weight is None or weight.dtype != FP8:
            continue
        if not _is_plain(scale):
            return f"{name} is in FP8 and has no scales {scale_name}; load the checkpoint as it was quantized"
        if "linear" in own:
            return "its method linear was replaced on the instance; undo the patch"
        if reason := why_not_blocks(weight, scale, own.get("block_size"), own.get("activation_scheme") == "static"):
            return f"{name} {reason}"
        if spec.form.gated and name == spec.up and share_scales(weight):
            return (
                f"{name} packs gate and up {list(weight.shape)}, whose halves share scales; "
                "pass exclude=[...] to skip it"
            )
    return None


def why_not_kernels(module: nn.Module, spec: ExpertsSpec) -> str | None:
    """Why no call of `module` can run kernels, judging by its weights and attributes; None if some can."""
    parameters = {name: module._parameters.get(name) for name in spec.parameters}
    given: list[Any] = [parameter for parameter in parameters.values() if _is_plain(parameter)]
    if spec.in_fp32 and any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in given):
        return f"{type(module).__name__} computes in fp32, regardless of the dtype of its weights; load it in fp32"
    count = module.__dict__.get("num_experts")
    if other := [parameter for parameter in given if parameter.dim() and len(parameter) != count]:
        return f"num_experts is {count!r}, and its weights are those of {len(other[0])} experts"
    if reason := _why_not_scaled(module, spec):
        return reason
    if (operands := operands_of(module, spec)) is None:
        return "its weights or attributes changed after fusing, so the original forward runs"
    if not stacks_fit(*operands):
        found = ", ".join(
            f"{name} {list(p.shape)} {p.dtype} {p.device}" for name, p in parameters.items() if p is not None
        )
        return (
            f"its weights do not fit together ({found}); load with one dtype of fp16, bf16 and fp32, or FP8, on one "
            "device"
        )
    return None


def _other_implementation(module: nn.Module, interface: Any) -> str | None:
    """The reason if the original forward would run a function that is neither Transformers' nor ours."""
    if runs_transformers_own(module, interface):
        return None
    return (
        f"experts_implementation={implementation_of(module)!r} is not one of Transformers' own, so it runs unchanged"
    )


class ExpertsFamily(Family):
    """Routed experts, always on."""

    name, noun, option = "experts", "experts module", None
    none_found = "strict: found no routed experts to fuse"
    mixin = FusedExperts

    def examine(self, module: nn.Module) -> Finding | None:
        spec = find_experts(module)
        if spec is None:
            return None
        if isinstance(spec, str):
            stacks = [name for name in ("gate_up_proj", "up_proj", "down_proj") if name in module._parameters]
            reason = (
                _why_not_plain(module, stacks, multiplies_by_scales(type(module)))
                or f"{spec}; pass exclude=[...] to skip this module"
            )
            return Finding("skipped", reason)
        return Finding.of(why_not_swappable(module, FusedExperts, spec) or _reject_reason(module, spec), spec)

    def resembles(self, name: str, module: nn.Module, holds_known: bool) -> None:
        return None  # a stack of matrices that nothing is known about is listed among the MLPs

    def mixin_for(self, spec: Hashable, batch_invariant: bool) -> type[Fused]:
        return FusedExperts

    def why_variant(self, module: nn.Module, spec: Hashable) -> str:
        return f"no kernels for {self.noun}s have sums that ignore the token count"

    def problem(self, module: nn.Module, spec: Hashable, m: int, gpu: GPU) -> ExpertsKey | None:
        assert isinstance(spec, ExpertsSpec)
        config, operands = getattr(module, "config", None), operands_of(module, spec)
        top_k = next((n for name in TOP_K if type(n := getattr(config, name, None)) is int), None)
        if operands is None or top_k is None or not stacks_fit(*operands):
            return None
        up, down, up_bias, down_bias, form, up_scale, _ = operands
        hidden, intermediate = down.shape[1:] if form.layout == "planes" else down.mT.shape[1:]
        return ExpertsKey(
            m=next_power_of_two(m),
            experts=up.shape[0],
            top_k=top_k,
            hidden=hidden,
            intermediate=intermediate,
            layout=form.layout,
            gated=form.gated,
            activation=form.activation,
            dtype=up.dtype if up_scale is None else torch.bfloat16,
            bias=up_bias is not None or down_bias is not None,
            gpu=gpu,
            storage="float" if up_scale is None else "fp8",
        )


def _reject_reason(module: nn.Module, spec: ExpertsSpec) -> str | None:
    """Why `module` cannot be fused as `spec` says, with the remedy, or None if it can."""
    if has_own_forward(module):
        if original_of(type(module).forward) is None:
            return OWN_FORWARD
        return (
            "its forward was replaced on the instance, as expert and tensor parallelism do; "
            'experts_implementation="hf_fused_mlp" fuses what that calls; or pass exclude=[...]'
        )
    if reason := _why_not_plain(module, spec.parameters, spec.up_scale is not None):
        return reason
    forward: Any = type(module).forward
    if reason := why_not_kernels(module, spec) or _other_implementation(module, interface_of(forward)):
        return reason
    for name, scale in ((spec.up, spec.up_scale), (spec.down, spec.down_scale)):
        if module._parameters[name].dtype == FP8 and (reason := unusable_scales(module._parameters[scale])):
            return f"{name} {reason}"
    return None


def _why_not_plain(module: nn.Module, names: Iterable[str], scaled: bool) -> str | None:
    """Which of these weights no kernel reads, quantized ones for example, with the remedy, or None.

    `scaled` says that they may be in FP8.
    """
    for name in names:
        parameter = module._parameters.get(name)
        if scaled and type(parameter) is nn.Parameter and parameter.dtype == FP8:
            continue
        if type(parameter) is not nn.Parameter or parameter.dtype not in DTYPES:
            found = "missing" if parameter is None else f"{type(parameter).__name__} of {parameter.dtype}"
            return (
                f"{name} is {found}, expected a Parameter of fp16, bf16 or fp32; load without quantization_config, "
                "and fuse before weights are sharded"
            )
    return None
