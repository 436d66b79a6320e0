"""The fused forms of an MLP.

A call takes the first of these paths that applies: run the original forward where kernels gain nothing
(`launch_cache.left_alone`); repeat a remembered launch; run the whole MLP on kernels; run what kernels can compute and
call the other layers; run the original forward. With few tokens, the original forward also runs if kernels could only
compute the product.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn.modules.module import _has_any_global_hook

from hf_fused_mlp import modes, ops
from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.calls import device_of, has_own_forward, is_bare, runs_class_forward
from hf_fused_mlp.families.mlp.checks import (
    Projections,
    altered_reason,
    are_parameters,
    called_reason,
    can_call,
    has_slow_activation,
    local_parameters,
    must_call,
    read_projections,
    warn_of_variance,
    wrapped_besides,
)
from hf_fused_mlp.launch_cache import answer, leave_alone, left_alone, mlp_kind, remembered
from hf_fused_mlp.originals import (
    IDENTITIES,
    are_own_at_a_glance,
    functions_are_own,
    why_functions_are_not_own,
)
from hf_fused_mlp.reading.activations import activation_at_a_glance, find_activation
from hf_fused_mlp.reading.expression import reading_of
from hf_fused_mlp.reading.mlp import MLPKind, MLPSpec, find_spec, patched_reason, was_patched_since
from hf_fused_mlp.swap import Fused, Runs, generated_classes
from hf_fused_mlp.threads import LOCK, free_when_unread
from hf_fused_mlp.types import ABSENT, Matrix, MLPOperands
from hf_fused_mlp.weights import pack, unpack, why_not_packed
from hf_fused_mlp.weights.formats import can_be_halved, glance, halves, read

# Elements of `x` up to which the original forward runs at once if kernels could only compute the product, between
# layers that are called. On an H100 (`hf-fused-mlp bench wrapped`) 512 tokens of Llama-3-8B gain nothing, 4096 do.
SMALL_INPUT = 1 << 21


class FusedMLP(Fused):
    """The base of all fused MLPs."""

    fused_spec: ClassVar[MLPSpec]
    # the names that an ordinary call reads; `torch.compile` treats a tuple of names as a constant, but not an object
    _fused_names: ClassVar[tuple]
    _first_name: ClassVar[str]
    # the reading of its forward, if it depends on global names
    _reading: ClassVar[Any]

    def __init_subclass__(cls, **kwargs):
        if spec := vars(cls).get("fused_spec"):
            calls_down = spec.down is not None and not spec.other_steps
            names = spec.gate, spec.up, spec.down, spec.halves, spec.activation, spec.function, spec.dropouts
            named = spec.children if spec.unread else None
            type.__setattr__(cls, "_fused_names", (*names, spec.sequence, calls_down, named, cls.batch_invariant))
            type.__setattr__(cls, "_first_name", spec.first[0])
            reading = reading_of(cls.original_forward)
            type.__setattr__(cls, "_reading", reading if reading is not None and reading.meanings else None)

    def forward(self, *args, **kwargs):
        # no attribute of the module is read before this, because each read costs a lot when the rest of the model has
        # filled the processor's caches
        if not is_dynamo_compiling() and (alone := left_alone.get(id(self))) is not None:
            original, sizes, _ = alone
            x = args[0] if args else next(iter(kwargs.values()), None)
            if (
                type(x) is Tensor
                and type(size := x.numel()) is int  # in some traces it is a symbol
                and size in sizes
                and not (torch.is_grad_enabled() and self.training)  # where kernels save memory
            ):
                return original.forward(self, *args, **kwargs)
        # read once, because another thread may unfuse the module meanwhile; this also saves compiled code guards of
        # the class
        traced = is_compiling()
        cls: Any = self if traced else type(self)
        # a wrapper of this forward may call it after the module was unfused
        if not (isinstance(self, FusedMLP) if traced else issubclass(cls, FusedMLP)):
            return type(self).forward(self, *args, **kwargs)
        x = args[0] if args else kwargs.get(cls.input_name)
        if len(args) + len(kwargs) == 1 and isinstance(x, Tensor):
            if not traced and not cls.batch_invariant and must_call(self, cls._first_name) and _is_small(x):
                return cls.original_class.forward(self, *args, **kwargs)
            out = _compiled(self, x) if traced else _replay(self, cls, x)
            if out is None and modes.is_ordinary(x):
                out = _slow_path(self, cls, x)
            if out is not None:
                return out
        return cls.original_class.forward(self, *args, **kwargs)  # not `super()`, which adds guards

    def runs(self, device: torch.device | None = None, elements: int | None = None) -> Runs:
        cls = type(self)
        spec = cls.fused_spec
        if not _keeps_forward(cls):
            return Runs(patched_reason(cls.original_class))
        if reason := why_functions_are_not_own() or altered_reason(self, spec):
            return Runs(reason)
        found = read_projections(self, spec)
        called = "in training mode" if self.training else called_reason(self, spec)
        if called is None and found.up is not None and found.up.data.dtype == torch.float64:
            called = "no kernels for float64; load as bfloat16 or float16"
        if called is not None:
            if not can_call(self, spec, found):
                return Runs(called)
            if self.training and _drops_out(self, spec):
                return Runs("in training mode with dropout")
            if elements is not None and elements <= SMALL_INPUT and not found.first_are_read:
                return Runs(f"for so few tokens one kernel between called layers gains nothing: {called}")
        dtype = None if found.up is None else found.up.data.dtype
        return Runs(modes.no_kernels(device or device_of(self._modules[spec.first[0]]), dtype), called)

    def call_inputs(self, args: tuple, kwargs: dict) -> tuple[Tensor, ...] | None:
        x = args[0] if args else kwargs.get(self.input_name)
        return (x,) if len(args) + len(kwargs) == 1 and isinstance(x, Tensor) else None

    def by_operator(self, *inputs: Tensor) -> Tensor:
        return ops.mlp(*inputs, *self.operands().flat(), batch_invariant=self.batch_invariant)

    def operands(self) -> MLPOperands:
        """The operands of `ops.mlp`, for a module whose projections may all be read."""
        cls = type(self)
        return _operands(self, cls, read_projections(self, cls.fused_spec))

    @staticmethod
    def _call_first(module: nn.Module, spec: MLPSpec, x: Tensor) -> tuple[Tensor, Tensor]:
        """Calls the projections before the activation; returns gate and up."""
        raise NotImplementedError

    def repack(self) -> None:
        left_alone.pop(id(self), None)  # its weights may have another dtype or place now
        with LOCK:
            if isinstance(self, FusedMLP):  # another thread may have unfused it
                free_when_unread(self._pack(), self)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        FusedMLP.repack(self)
        return self

    @staticmethod
    def read_again(module: nn.Module) -> MLPSpec | None:
        return None if was_patched_since(type(module)) else find_spec(module)


class FusedGatedMLP(FusedMLP):
    """``down(act(gate(x)) * up(x))`` with gate and up packed."""

    @staticmethod
    def _call_first(module: nn.Module, spec: MLPSpec, x: Tensor) -> tuple[Tensor, Tensor]:
        return module._modules[spec.gate](x), module._modules[spec.up](x)

    def why_not_packed(self) -> str | None:
        for weights in self._pairs_to_pack():
            if not are_parameters(self, weights):
                return "gate and up cannot be moved: their format does not keep them as parameters"
            if reason := why_not_packed(*weights):
                return reason
        return None

    def _pack(self) -> list[Tensor]:
        replaced = []
        for weights in self._pairs_to_pack():
            # packing gains nothing where the original forward runs
            if modes.no_kernels(weights[0].device, weights[0].dtype) is None and are_parameters(self, weights):
                replaced += pack(*weights)
        return replaced

    def _unpack(self) -> list[Tensor]:
        return unpack(local_parameters(self))

    def _pairs_to_pack(self) -> list[tuple[Any, Any]]:
        """Pairs of tensors to pack: the weights of gate and up, and their scales if there are any.

        Empty if one layer was wrapped or quantized after fusing, because then nothing reads both.
        """
        found = read_projections(self, self.fused_spec)
        if found.gate is None or found.up is None:
            return []
        pairs = [(found.gate.data, found.up.data)]
        if found.gate.scale is not None and found.up.scale is not None:
            pairs.append((found.gate.scale, found.up.scale))
            pairs = [pair for pair in pairs if pair[0].nbytes % 16 == 0]  # otherwise up would not be aligned
        return pairs


class FusedPackedMLP(FusedMLP):
    """``down(act(gate) * up)`` with gate and up the halves of one projection's output, as in the checkpoint."""

    @staticmethod
    def _call_first(module: nn.Module, spec: MLPSpec, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = module._modules[spec.up](x).chunk(2, dim=-1)
        return (up, gate) if spec.up_first else (gate, up)


class FusedPlainMLP(FusedMLP):
    """``down(act(up(x)))``, or its first half; there is nothing to pack."""


# the same classes with kernels whose sums do not depend on the token count; at module level, for pickle


class InvariantGatedMLP(FusedGatedMLP):
    batch_invariant = True


class InvariantPackedMLP(FusedPackedMLP):
    batch_invariant = True


class InvariantPlainMLP(FusedPlainMLP):
    batch_invariant = True


# Functions rather than methods: `torch.compile` guards each name that it looks up in a module, and the host checks
# all guards before each replay of a graph. `cls` is the class of `module`, or in compiled code the module itself.


def _is_small(x: Tensor) -> bool:
    """True for few tokens. Does not read the sizes of fake tensors, because that would be recorded or fail."""
    return type(x) is Tensor and x.numel() <= SMALL_INPUT and torch._C._get_tracing_state() is None


def _replay(module: FusedMLP, cls: type[FusedMLP], x: Tensor) -> Tensor | None:
    """The eager fast path: repeats the launch remembered for this kind of call. None if anything is unusual.

    The GPU often waits for Python here, so each attribute is read once. This returns an output only if the kernels run
    (or their part before a down that must be called), the operands fit, and the caller needs only the output.
    """
    if (
        not remembered
        or not modes.needs_only_output(x)
        or _has_any_global_hook()
        or (operands := _usual_operands(module, cls, glance, activation_at_a_glance, runs_class_forward)) is None
        or not are_own_at_a_glance(operands[3])
        or (forward := cls.original_class.forward) is not cls.original_forward
        or (cls.original_code is not None and forward.__code__ is not cls.original_code)
        or (cls._reading is not None and not cls._reading.holds_for(forward))
    ):
        return None
    gate, up, down, *rest = operands
    if down is not None:
        return answer(mlp_kind(gate, up, down, *rest), (x, *gate, *up, *down), (x, gate, up, down))
    h = answer(mlp_kind(gate, up, ABSENT, *rest), (x, *gate, *up, *ABSENT), (x, gate, up, ABSENT))
    return None if h is None else module._modules[cls.fused_spec.down](h)


def _compiled(module: FusedMLP, x: Tensor) -> Tensor | None:
    """The compiled fast path: the operator. None if anything is unusual.

    `torch.compile` guards everything that is read here. Names, tensors and module attributes that are read under one
    name are cheapest, because the version of a dictionary shows whether they changed.
    """
    if not modes.is_ordinary(x) or modes.autocasts() or modes.no_kernels(x.device) is not None:
        return None
    if x.dtype == torch.float64 or not hf_fused_mlp_keeps_forward(module.original_class) or not functions_are_own():
        return None
    operands = _usual_operands(module, module, read, find_activation, is_bare)
    if operands is None or operands[2] is None:
        return None
    return ops.mlp_if_fits(x, MLPOperands(*operands))


def _slow_path(module: FusedMLP, cls: type[FusedMLP], x: Tensor) -> Tensor | None:
    """Runs the whole MLP, or as much of it as the kernels can; None if the original forward must run."""
    spec = cls.fused_spec
    if modes.no_kernels(x.device, x.dtype) is not None:  # on a CPU nothing else is checked
        return None
    compiling, autocasts, training = is_compiling(), modes.autocasts(), module.training
    if not (hf_fused_mlp_keeps_forward(cls.original_class) if compiling else _keeps_forward(cls)):
        return None
    if not functions_are_own() and (compiling or why_functions_are_not_own() is not None):
        return None
    if altered_reason(module, spec) is not None or (training and _drops_out(module, spec)):
        return None
    found = read_projections(module, spec)
    if found.all_are_read and not autocasts and not training and found.up.data.dtype != torch.float64:
        operands = _operands(module, cls, found)
        if not (compiling or has_slow_activation(module, spec)) and ops.gains_nothing(x, operands, len(spec.first)):
            leave_alone(module, cls.original_class, x)
            if type(module) is not cls:  # another thread has fused it in another form
                left_alone.pop(id(module), None)
            return None
        out = ops.mlp_if_fits(x, operands)
        if out is not None:
            return out
    if cls.batch_invariant and not (compiling or training):
        warn_of_variance("it casts under autocast" if autocasts else called_reason(module, spec))
    if not compiling and _is_small(x) and (torch.is_grad_enabled() or not found.first_are_read):
        return None  # only the product can be fused
    # inputs that the kernels do not take go to PyTorch, which also raises the errors
    if can_call(module, spec, found) and (h := _first_half(module, cls, x, found)) is not None:
        return module._modules[spec.down](h)
    return None


def _first_half(module: FusedMLP, cls: type[FusedMLP], x: Tensor, found: Projections) -> Tensor | None:
    """The input of down, with projections called where they must be; None if nothing can be fused."""
    spec = cls.fused_spec
    activation = _activation(module, spec)
    if found.first_are_read and not torch.is_grad_enabled() and not modes.autocasts():
        h = ops.mlp_if_fits(x, _operands(module, cls, found)._replace(down=ABSENT))
        if h is not None:
            return h
    if spec.kind is MLPKind.PLAIN:
        return None
    gate, up = cls._call_first(module, spec, x)
    if gate.shape == up.shape and gate.dtype == up.dtype and type(gate) is type(up) is Tensor:
        return ops.act_mul(gate, up, activation)
    return ACTIVATIONS[activation].function(gate) * up


def _drops_out(module: nn.Module, spec: MLPSpec) -> bool:
    return any(getattr(module._modules[name], "p", 0) > 0 for name in spec.dropouts)


def _activation(module: FusedMLP, spec: MLPSpec) -> str:
    return spec.function or find_activation(module._modules[spec.activation])


def _operands(module: FusedMLP, cls: type[FusedMLP], found: Projections) -> MLPOperands:
    """The operands that `found` has; `cls` is the class of the module, which another thread may change."""
    spec = cls.fused_spec
    gate, up, down, _ = found
    if spec.halves is not None:
        gate, up = (Matrix(*half) for half in halves(up, *spec.halves))
    return MLPOperands(gate, up, down, _activation(module, spec), cls.batch_invariant)


@torch.compiler.assume_constant_result  # torch 2.11's compiler misreads functions of classes
def hf_fused_mlp_keeps_forward(original: type[nn.Module]) -> bool:
    """True if neither the forward of a fused class nor the meaning of its global names has changed since fusing."""
    return all(map(_keeps_forward, generated_classes(original)))


def _keeps_forward(cls: type[FusedMLP]) -> bool:
    forward = cls.original_class.forward
    return (
        forward is cls.original_forward
        and getattr(forward, "__code__", None) is cls.original_code
        and (cls._reading is None or cls._reading.holds_for(forward))
    )


def _usual_operands(
    module: FusedMLP, cls: type[FusedMLP], read: Callable, find: Callable, runs_own_forward: Callable
) -> tuple[tuple, tuple, tuple, str, bool] | None:
    """The fields of `MLPOperands` for a module without anything unusual, or None.

    In eager calls, down is None if it must be called.

    Args:
        read: gives the matrix of a projection, or None: `formats.read` in compiled code, which runs it once, and
            `formats.glance` in eager calls.
        find: names the activation that a child computes, or None.
        runs_own_forward: whether calling another child runs the forward of its class.
    """
    if module.training or ("forward" in module.__dict__ and has_own_forward(module)):
        return None
    gate_name, up_name, down_name, order, activation, function, dropouts, sequence, calls_down, named, invariant = (
        cls._fused_names
    )
    children = module._modules
    gate = ABSENT if gate_name is None else read(children.get(gate_name))
    if gate is None or (up := read(children.get(up_name))) is None:
        return None
    down = ABSENT if down_name is None else read(children.get(down_name))
    if down is None and not (calls_down and down_name in children):
        return None
    for name in dropouts:
        child = children.get(name)
        if type(child) not in IDENTITIES or not runs_own_forward(child) or child.training:
            return None
    if function is None:
        child = children.get(activation)
        if child is None or (function := find(child)) is None or not runs_own_forward(child):
            return None
    if sequence and tuple(children) != sequence:
        return None
    if named is not None and wrapped_besides(module, named) is not None:
        return None
    if order is not None:
        if not can_be_halved(up):
            return None
        gate, up = halves(up, *order)
    return gate, up, down, function, invariant
