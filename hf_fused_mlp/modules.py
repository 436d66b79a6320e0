"""The fused forms of an MLP module.

Projections that have to be called are called, with one kernel between them; what cannot be answered exactly even so
goes to the original forward.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

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
from hf_fused_mlp.recognition import IDENTITIES
from hf_fused_mlp.registry import MLPSpec, altered_reason, call_reason, can_call, reads_first, replaced_reason
from hf_fused_mlp.swap import Fused, fuse
from hf_fused_mlp.types import GPU, MLPKind
from hf_fused_mlp.weights import pack, unpack

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

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if spec := vars(cls).get("fused_spec"):
            projections = spec.gate, spec.up, spec.down
            cls._fused_names = projections, spec.halves, spec.activation, spec.function, spec.dropouts, spec.sequence

    def forward(self, *args, **kwargs):
        # who wraps a module's forward may call it after the module was unfused
        if not isinstance(self, FusedMLP):
            return type(self).forward(self, *args, **kwargs)
        x = args[0] if args else kwargs.get(self.input_name)
        if len(args) + len(kwargs) == 1 and isinstance(x, Tensor):
            out = _compiled(self, x) if torch.compiler.is_compiling() else self._again(x)
            if out is None and _is_ordinary(x):
                out = self._looked_into(x)
            if out is not None:
                return out
        return self.original_class.forward(self, *args, **kwargs)  # not `super()`, which compiled code checks anew

    def _again(self, x: Tensor) -> Tensor | None:
        """The kernels' answer to a call like one they have answered; None for any other, which takes the long way.

        In eager mode the GPU often waits for Python, so each thing is read once, and all must be as usual. Then
        `reasons` has none, the operands fit, and nothing but the result is wanted.
        """
        if (
            not remembered
            or not ops.only_results(x)
            or _has_any_global_hook()
            or self.original_class.forward is not self.original_forward
            or (operands := _usual_operands(self, parameters_at_a_glance, is_left_alone)) is None
        ):
            return None
        return answer(mlp_kind(*operands), (x, *operands[:-1]))

    def _looked_into(self, x: Tensor) -> Tensor | None:
        """The answer of the kernels to as much as they can do here; None where the original forward has to."""
        spec = self.fused_spec
        if no_kernels(x.device) is not None:  # one of the reasons, and all that need be asked on a CPU
            return None
        bypassed, called = _reasons(self, spec, x.device)
        if bypassed is not None:
            return None
        reads_all = called is None and not _autocasts()
        # None where the kernels do not take these tensors: PyTorch answers for them, errors included
        if reads_all and (out := ops.mlp_if_fits(x, *_operands(self, spec))) is not None:
            return out
        if can_call(self, spec) and (h := self._first_half(x)) is not None:
            return self._modules[spec.down](h)
        return None

    def reasons(self, device: torch.device | None = None) -> tuple[str | None, str | None]:
        """Why a call with tokens on `device`, that of the weights unless given, would not run the kernels alone.

        The first is why the original forward would run, all of it; the second why projections would be called, and the
        kernels do the rest. One call may still go either way for what it is: under autocast, say.
        """
        return _reasons(self, self.fused_spec, device)

    def _first_half(self, x: Tensor) -> Tensor | None:
        """What down is given, whatever the projections are now: wrapped, quantized, trained; None if nothing fuses."""
        spec, activation = self.fused_spec, _activation(self, self.fused_spec)
        if not torch.is_grad_enabled() and not _autocasts() and reads_first(self, spec):
            gate, up, _, gate_bias, up_bias, _ = _tensors(self, spec)
            h = ops.mlp_if_fits(x, gate, up, None, gate_bias, up_bias, None, activation)
            if h is not None:
                return h
        if spec.kind is MLPKind.PLAIN:
            return None
        gate, up = self._halves(x)
        if gate.shape == up.shape and gate.dtype == up.dtype and type(gate) is type(up) is Tensor:
            return ops.act_mul(gate, up, activation)
        return ACTIVATIONS[activation].function(gate) * up

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the projections for gate and up give when they are called."""
        raise NotImplementedError

    def operands(self) -> Operands:
        """What `ops.mlp` takes after `x`: weights of gate, up and down, their biases, the activation's name."""
        return _operands(self, self.fused_spec)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.repack()
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        self.repack()


class FusedGatedMLP(FusedMLP):
    """``down(act(gate(x)) * up(x))`` with gate and up packed."""

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._modules[self.fused_spec.gate](x), self._modules[self.fused_spec.up](x)

    def repack(self) -> None:
        self._on_weights(pack)

    def _unpack(self) -> None:
        self._on_weights(unpack)

    def _on_weights(self, function) -> None:
        # projections that were wrapped or quantized after fusing keep their weights where they are
        if reads_first(self, self.fused_spec):
            function(*(_parameters_of(self, name)["weight"] for name in self.fused_spec.first))


class FusedPackedMLP(FusedMLP):
    """``down(act(gate) * up)`` with gate and up the halves of one projection's output, as the checkpoint has it."""

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = self._modules[self.fused_spec.up](x).chunk(2, dim=-1)
        return (up, gate) if self.fused_spec.up_first else (gate, up)


class FusedPlainMLP(FusedMLP):
    """``down(act(up(x)))``, or half of it; there is nothing to pack."""


# functions rather than methods: `torch.compile` guards each name that it looks up in a module, and the host checks all
# guards before each replay of a graph


def _compiled(module: FusedMLP, x: Tensor) -> Tensor | None:
    """The operator's answer where all is as usual; None for any other call, which takes the long way.

    Whatever is read here `torch.compile` checks before each replay. It is spared that where all is names, tensors and
    attributes of modules, each under one name, of which dictionaries tell whether anything changed.
    """
    if not _is_ordinary(x) or _autocasts() or no_kernels(x.device) is not None or x.dtype == torch.float64:
        return None
    operands = _usual_operands(module, plain_parameters, is_bare)
    return None if operands is None else ops.mlp_if_fits(x, *operands)


def _reasons(module: FusedMLP, spec: MLPSpec, device: torch.device | None) -> tuple[str | None, str | None]:
    # the compiler of torch 2.11 misreads functions of classes; what it traces was checked when it was fused
    if not torch.compiler.is_compiling() and (
        reason := replaced_reason(module.original_class, module.original_forward)
    ):
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


def _operands(module: FusedMLP, spec: MLPSpec) -> Operands:
    return *_tensors(module, spec), _activation(module, spec)


def _activation(module: FusedMLP, spec: MLPSpec) -> str:
    return spec.function or find_activation(module._modules[spec.activation])


def _tensors(module: FusedMLP, spec: MLPSpec) -> Tensors:
    return _read(spec.halves, *(_parameters_of(module, name) for name in (spec.gate, spec.up, spec.down)))


def _parameters_of(module: FusedMLP, name: str | None) -> Parameters:
    return _NONE if name is None else local_tensors(module._modules[name])


def _usual_operands(module: FusedMLP, parameters_of: Callable, is_untouched: Callable) -> Operands | None:
    """The operands of a module in which all is as usual, or None to look closer.

    `parameters_of` gives what a projection holds, or None; `is_untouched` says whether calling another child would do
    what its class does. Compiled code asks both in full, once; eager calls ask at a glance each time.
    """
    if module.training or "forward" in module.__dict__:
        return None
    projections, halves, activation, function, dropouts, sequence = module._fused_names
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
    if not torch.compiler.is_compiling() and GPU.of(device).capability < (8, 0):
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
        and (not ops.is_watched() or _exports_without_dynamo())
        and (torch.compiler.is_compiling() or (type(x) in (Tensor, nn.Parameter) and not ops.is_transformed()))
    )


def _exports_without_dynamo() -> bool:
    """Whether `torch.export` is what watches, which takes the operator for a function like any other."""
    # dynamo of torch 2.11 takes the first for true at all times
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


_BASES = {
    MLPKind.GATED: FusedGatedMLP,
    MLPKind.PACKED: FusedPackedMLP,
    MLPKind.PLAIN: FusedPlainMLP,
    MLPKind.HALF: FusedPlainMLP,
}


def fuse_module(module: nn.Module, spec: MLPSpec) -> None:
    """Turns `module`, which `reject_reason` has passed, into its fused form, in place."""
    fuse(module, _BASES[spec.kind], spec)


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
