"""The fused forms of an MLP module.

Projections that have to be called are called, with one kernel between them; what cannot be answered exactly even so
goes to the original forward.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from hf_fused_mlp import ops
from hf_fused_mlp.activations import ACTIVATIONS, find_activation
from hf_fused_mlp.children import (
    device_of,
    is_bare,
    is_left_alone,
    local_tensors,
    parameters_at_a_glance,
    plain_parameters,
)
from hf_fused_mlp.memory import answer, mlp_kind, remembered
from hf_fused_mlp.originals import IDENTITIES, are_own_at_a_glance, functions_are_own, why_functions_are_not_own
from hf_fused_mlp.recognition import reading_of
from hf_fused_mlp.registry import MLPSpec, altered_reason, call_reason, can_call, reads_first, replaced_reason
from hf_fused_mlp.swap import Fused, fuse, generated_classes
from hf_fused_mlp.threads import LOCK, free_when_unread
from hf_fused_mlp.types import GPU, MLPKind
from hf_fused_mlp.weights import pack, unpack, why_not_packed

# weights of gate, up and down, and their biases
Tensors = tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Operands = tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, str]
# what a projection holds, by name
Parameters = Mapping[str, Tensor | None]

_NONE: dict[str, None] = {}


class FusedMLP(Fused):
    """What all fused MLPs share."""

    fused_spec: ClassVar[MLPSpec]
    # what a usual call reads of it: to `torch.compile` a tuple of names is a constant, an object is not
    _fused_names: ClassVar[tuple]
    # what was read of its forward, where that rests on what names of a module mean
    _reading: ClassVar[Any]

    def __init_subclass__(cls, **kwargs):
        if spec := vars(cls).get("fused_spec"):
            projections = spec.gate, spec.up, spec.down
            names = projections, spec.halves, spec.activation, spec.function, spec.dropouts, spec.sequence
            type.__setattr__(cls, "_fused_names", names)
            reading = reading_of(cls.original_forward)
            type.__setattr__(cls, "_reading", reading if reading is not None and reading.meanings else None)

    def forward(self, *args, **kwargs):
        # read once, since another thread may unfuse the module meanwhile; compiled code is spared guards of the class
        traced = torch.compiler.is_compiling()
        cls: Any = self if traced else type(self)
        # who wraps a module's forward may call it after the module was unfused
        if not (isinstance(self, FusedMLP) if traced else issubclass(cls, FusedMLP)):
            return type(self).forward(self, *args, **kwargs)
        x = args[0] if args else kwargs.get(cls.input_name)
        if len(args) + len(kwargs) == 1 and isinstance(x, Tensor):
            out = _compiled(self, x) if traced else _again(self, cls, x)
            if out is None and _is_ordinary(x):
                out = _looked_into(self, cls, x)
            if out is not None:
                return out
        return cls.original_class.forward(self, *args, **kwargs)  # not `super()`, which compiled code checks anew

    def reasons(self, device: torch.device | None = None) -> tuple[str | None, str | None]:
        """Why a call with tokens on `device`, that of the weights unless given, would not run the kernels alone.

        The first is why the original forward would run, all of it; the second why projections would be called, and the
        kernels do the rest. One call may still go either way for what it is: under autocast, say.
        """
        return _reasons(self, type(self), device)

    @staticmethod
    def _halves(module: nn.Module, spec: MLPSpec, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the projections for gate and up give when they are called."""
        raise NotImplementedError

    def operands(self) -> Operands:
        """What `ops.mlp` takes after `x`: weights of gate, up and down, their biases, the activation's name."""
        return _operands(self, self.fused_spec)

    def repack(self) -> None:
        with LOCK:
            if isinstance(self, FusedMLP):  # another thread may have unfused it
                free_when_unread(self._pack(), self)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        FusedMLP.repack(self)
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        self.repack()


class FusedGatedMLP(FusedMLP):
    """``down(act(gate(x)) * up(x))`` with gate and up packed."""

    @staticmethod
    def _halves(module: nn.Module, spec: MLPSpec, x: Tensor) -> tuple[Tensor, Tensor]:
        return module._modules[spec.gate](x), module._modules[spec.up](x)

    def why_not_packed(self) -> str | None:
        weights = self._weights_to_pack()
        return None if weights is None else why_not_packed(*weights)

    def _pack(self) -> list[Tensor]:
        weights = self._weights_to_pack()
        # where the original forward runs, nothing is gained by it
        return pack(*weights) if weights is not None and no_kernels(weights[0].device) is None else []

    def _unpack(self) -> list[Tensor]:
        # whatever was put around them since, which keeps the parameters
        layers = [layer for name in self.fused_spec.first if (layer := self._modules.get(name)) is not None]
        return unpack(getattr(weight, "_local_tensor", weight) for layer in layers for weight in layer.parameters())

    def _weights_to_pack(self) -> tuple[Tensor, Tensor] | None:
        """Gate and up, unless they were wrapped or quantized after fusing: then nothing reads them together."""
        if not reads_first(self, self.fused_spec):
            return None
        gate, up = (_parameters_of(self, name)["weight"] for name in self.fused_spec.first)
        return gate, up


class FusedPackedMLP(FusedMLP):
    """``down(act(gate) * up)`` with gate and up the halves of one projection's output, as the checkpoint has it."""

    @staticmethod
    def _halves(module: nn.Module, spec: MLPSpec, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = module._modules[spec.up](x).chunk(2, dim=-1)
        return (up, gate) if spec.up_first else (gate, up)


class FusedPlainMLP(FusedMLP):
    """``down(act(up(x)))``, or half of it; there is nothing to pack."""


# functions rather than methods, since `torch.compile` guards each name that it looks up in a module, and the host
# checks all guards before each replay of a graph. They are given a module and its class; compiled, the module twice.


def _again(module: FusedMLP, cls: type[FusedMLP], x: Tensor) -> Tensor | None:
    """The kernels' answer to a call like one they have answered; None for any other, which takes the long way.

    In eager mode the GPU often waits for Python, so each thing is read once, and all must be as usual. Then `reasons`
    has none, the operands fit, and nothing but the result is wanted.
    """
    forward: Any = cls.original_class.forward
    if (
        not remembered
        or not ops.only_results(x)
        or _has_any_global_hook()
        or forward is not cls.original_forward
        or (cls.original_code is not None and forward.__code__ is not cls.original_code)
        or (cls._reading is not None and not cls._reading.holds_for(forward))
        or (operands := _usual_operands(module, cls, parameters_at_a_glance, is_left_alone)) is None
        or not are_own_at_a_glance(operands[-1])
    ):
        return None
    return answer(mlp_kind(*operands), (x, *operands[:-1]))


def _compiled(module: FusedMLP, x: Tensor) -> Tensor | None:
    """The operator's answer where all is as usual; None for any other call, which takes the long way.

    Whatever is read here `torch.compile` checks before each replay. It is spared that where all is names, tensors and
    attributes of modules, each under one name, of which dictionaries tell whether anything changed.
    """
    if not _is_ordinary(x) or _autocasts() or no_kernels(x.device) is not None or x.dtype == torch.float64:
        return None
    if not hf_fused_mlp_keeps_forward(module.original_class) or not functions_are_own():
        return None
    operands = _usual_operands(module, module, plain_parameters, is_bare)
    return None if operands is None else ops.mlp_if_fits(x, *operands)


def _looked_into(module: FusedMLP, cls: type[FusedMLP], x: Tensor) -> Tensor | None:
    """The answer of the kernels to as much as they can do here; None where the original forward has to."""
    spec = cls.fused_spec
    if no_kernels(x.device) is not None:  # one of the reasons, and all that need be asked on a CPU
        return None
    bypassed, called = _reasons(module, cls, x.device)
    if bypassed is not None:
        return None
    reads_all = called is None and not _autocasts()
    # None where the kernels do not take these tensors: PyTorch answers for them, errors included
    if reads_all and (out := ops.mlp_if_fits(x, *_operands(module, spec))) is not None:
        return out
    if can_call(module, spec) and (h := _first_half(module, cls, x)) is not None:
        return module._modules[spec.down](h)
    return None


@torch.compiler.assume_constant_result  # the compiler of torch 2.11 misreads functions of classes
def hf_fused_mlp_keeps_forward(original: type[nn.Module]) -> bool:
    """Whether a class that was fused still has the forward that it had then, and its names mean what they did."""
    return all(map(_keeps_forward, generated_classes(original)))


def _keeps_forward(cls: type[FusedMLP]) -> bool:
    forward = cls.original_class.forward
    return (
        forward is cls.original_forward
        and getattr(forward, "__code__", None) is cls.original_code
        and (cls._reading is None or cls._reading.holds_for(forward))
    )


def _why_functions_are_not_own() -> str | None:
    return "a function of PyTorch was replaced" if torch.compiler.is_compiling() else why_functions_are_not_own()


def _reasons(module: FusedMLP, cls: type[FusedMLP], device: torch.device | None) -> tuple[str | None, str | None]:
    spec = cls.fused_spec
    if not (hf_fused_mlp_keeps_forward(cls.original_class) if torch.compiler.is_compiling() else _keeps_forward(cls)):
        return replaced_reason(cls.original_class), None
    if not functions_are_own() and (reason := _why_functions_are_not_own()) is not None:
        return reason, None
    if reason := altered_reason(module, spec):
        return reason, None
    called = "in training mode" if module.training else call_reason(module, spec.projections)
    if called is None and _parameters_of(module, spec.up)["weight"].dtype == torch.float64:
        called = "no kernels for float64; load as bfloat16 or float16"
    if called is not None:
        if not can_call(module, spec):
            return called, None
        if module.training and any(getattr(module._modules[name], "p", 0) > 0 for name in spec.dropouts):
            return "in training mode, where it drops out", None
    return no_kernels(device or device_of(module._modules[spec.first[0]])), called


def _first_half(module: FusedMLP, cls: type[FusedMLP], x: Tensor) -> Tensor | None:
    """What down is given, whatever the projections are now: wrapped, quantized, trained; None if nothing fuses."""
    spec = cls.fused_spec
    activation = _activation(module, spec)
    if not torch.is_grad_enabled() and not _autocasts() and reads_first(module, spec):
        gate, up, _, gate_bias, up_bias, _ = _tensors(module, spec)
        h = ops.mlp_if_fits(x, gate, up, None, gate_bias, up_bias, None, activation)
        if h is not None:
            return h
    if spec.kind is MLPKind.PLAIN:
        return None
    gate, up = cls._halves(module, spec, x)
    if gate.shape == up.shape and gate.dtype == up.dtype and type(gate) is type(up) is Tensor:
        return ops.act_mul(gate, up, activation)
    return ACTIVATIONS[activation].function(gate) * up


def _operands(module: FusedMLP, spec: MLPSpec) -> Operands:
    return *_tensors(module, spec), _activation(module, spec)


def _activation(module: FusedMLP, spec: MLPSpec) -> str:
    return spec.function or find_activation(module._modules[spec.activation])


def _tensors(module: FusedMLP, spec: MLPSpec) -> Tensors:
    return _read(spec.halves, *(_parameters_of(module, name) for name in (spec.gate, spec.up, spec.down)))


def _parameters_of(module: FusedMLP, name: str | None) -> Parameters:
    return _NONE if name is None else local_tensors(module._modules[name])


def _usual_operands(
    module: FusedMLP, cls: type[FusedMLP], parameters_of: Callable, is_untouched: Callable
) -> Operands | None:
    """The operands of a module in which all is as usual, or None to look closer.

    `parameters_of` gives what a projection holds, or None; `is_untouched` says whether calling another child would do
    what its class does. Compiled code asks both in full, once; eager calls ask at a glance each time.
    """
    if module.training or "forward" in module.__dict__:
        return None
    projections, halves, activation, function, dropouts, sequence = cls._fused_names
    children, read = module._modules, []
    for name in projections:
        parameters = _NONE if name is None else parameters_of(children.get(name))
        if parameters is None:
            return None
        read.append(parameters)
    for name in dropouts:
        child = children.get(name)
        if type(child) not in IDENTITIES or not is_untouched(child) or child.training:
            return None
    if function is None:
        child = children.get(activation)
        if child is None or (function := find_activation(child)) is None or not is_untouched(child):
            return None
    if sequence and tuple(children) != sequence:
        return None
    if halves is not None and (bias := read[1]["bias"]) is not None and bias.shape != read[1]["weight"].shape[:1]:
        return None  # what cannot be halved, which a glance lets through
    return *_read(halves, *read), function


def _read(halves: tuple[int, int] | None, gate: Parameters, up: Parameters, down: Parameters) -> Tensors:
    """Weights and biases out of what the projections hold, which for one that is not there is nothing."""
    if halves is None:
        weights = gate.get("weight"), up["weight"], down.get("weight")
        return *weights, gate.get("bias"), up.get("bias"), down.get("bias")
    gates, ups = halves
    weights = up["weight"].chunk(2)
    biases = (None, None) if up["bias"] is None else up["bias"].chunk(2)
    return weights[gates], weights[ups], down.get("weight"), biases[gates], biases[ups], down.get("bias")


def no_kernels(device: torch.device) -> str | None:
    """Why nothing of ours runs there, or None."""
    if not ops.HAS_TRITON:
        return "Triton is not installed; install triton for your platform"
    if device.type != "cuda":
        return f"on {device}, where the original forward runs; move the model to a GPU"
    # not asked while compiling, where it would break the graph; the operator then runs PyTorch's GEMMs
    if torch.compiler.is_compiling():
        return None
    # fake tensors may be on a device that is not there
    if not torch.cuda.is_initialized() and not torch.cuda.is_available():
        return f"on {device}, which PyTorch does not find here"
    if GPU.of(device).capability < (8, 0):
        return f"no kernels for {GPU.of(device).name}; they need CUDA compute capability 8.0 or later"
    return None


def _autocasts() -> bool:
    return torch.is_autocast_enabled("cuda")


def _is_ordinary(x: Tensor) -> bool:
    """Whether nothing watches or transforms what is done to `x`, which is what its shape and strides say."""
    return (
        x.layout is torch.strided
        and not x.is_nested
        and not _has_any_global_hook()
        and not ops.is_watched()
        and not _is_exporting()
        and (torch.compiler.is_compiling() or _is_real(x))
    )


def _is_real(x: Tensor) -> bool:
    """Whether operations on `x` run as they are, under no mode and no transformation."""
    dispatched = torch._C._len_torch_dispatch_stack() > 0
    return type(x) in (Tensor, nn.Parameter) and not dispatched and not ops.is_transformed()


def _is_exporting() -> bool:
    """Whether a program is being made that is to run elsewhere, where our operators may not be known."""
    # the flag, since dynamo of torch 2.11 takes `torch.compiler.is_exporting()` for true at all times
    return torch.compiler._is_exporting_flag or (
        not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None
    )


_MIXINS = {
    MLPKind.GATED: FusedGatedMLP,
    MLPKind.PACKED: FusedPackedMLP,
    MLPKind.PLAIN: FusedPlainMLP,
    MLPKind.HALF: FusedPlainMLP,
}


def mixin_of(spec: MLPSpec) -> type[FusedMLP]:
    """What is mixed into the class of a module that computes `spec`."""
    return _MIXINS[spec.kind]


def fuse_module(module: nn.Module, spec: MLPSpec) -> None:
    """Turns `module`, which `reject_reason` has passed, into its fused form, in place."""
    fuse(module, mixin_of(spec), spec)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode meanwhile; then every module's own mode again."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
