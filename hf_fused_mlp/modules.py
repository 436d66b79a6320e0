"""The fused forms of an MLP module.

Projections that have to be called are called, with one kernel between them; what cannot be answered exactly even so
goes to the original forward.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from hf_fused_mlp import ops
from hf_fused_mlp.activations import ACTIVATIONS, find_activation
from hf_fused_mlp.children import device_of, is_left_alone, local_tensors, parameters_at_a_glance
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

    def forward(self, *args, **kwargs):
        # who wraps a module's forward may call it after the module was unfused
        if not isinstance(self, FusedMLP):
            return type(self).forward(self, *args, **kwargs)
        x = args[0] if args else kwargs.get(self.input_name)
        is_alone = len(args) + len(kwargs) == 1
        if is_alone and args and not torch.compiler.is_compiling() and (out := self._again(x)) is not None:
            return out
        if is_alone and isinstance(x, Tensor) and _is_ordinary(x):
            spec = self.fused_spec
            bypassed, called = _reasons(self, spec, x.device)
            if bypassed is None:
                reads_all = called is None and not _autocasts()
                # None where the kernels do not take these tensors: PyTorch answers for them, errors included
                if reads_all and (out := ops.mlp_if_fits(x, *_operands(self, spec))) is not None:
                    return out
                if can_call(self, spec) and (h := self._first_half(x)) is not None:
                    return self._modules[spec.down](h)
        return super().forward(*args, **kwargs)

    def _again(self, x) -> Tensor | None:
        """The kernels' answer to a call like one they have answered; None for any other, which takes the long way.

        In eager mode the GPU often waits for Python, so each thing is read once, and all must be as usual. Then
        `reasons` has none, the operands fit, and nothing but the result is wanted.
        """
        spec, own = self.fused_spec, self.__dict__
        if (
            not ops.HAS_TRITON
            or not ops.runs_now(x)
            or _has_any_global_hook()
            or own["training"]
            or "forward" in own
            or self.original_class.forward is not self.original_forward
            or spec.sequence
            or spec.dropouts
        ):
            return None
        children, read = own["_modules"], []
        for name in (spec.gate, spec.up, spec.down):
            parameters = _NONE if name is None else parameters_at_a_glance(children.get(name))
            if parameters is None:
                return None
            read.append(parameters)
        activation = spec.function
        if activation is None:
            if not is_left_alone(module := children.get(spec.activation)):
                return None
            activation = find_activation(module)
        return ops.on_gpu().mlp_again(x, (*_read(spec, *read), activation))

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
    return _read(spec, *(_parameters_of(module, name) for name in (spec.gate, spec.up, spec.down)))


def _parameters_of(module: FusedMLP, name: str | None) -> Parameters:
    return _NONE if name is None else local_tensors(module._modules[name])


def _read(spec: MLPSpec, gate: Parameters, up: Parameters, down: Parameters) -> Tensors:
    """Weights and biases out of what the projections hold, which for one that is not there is nothing."""
    if spec.kind is not MLPKind.PACKED:
        weights = gate.get("weight"), up["weight"], down.get("weight")
        return *weights, gate.get("bias"), up.get("bias"), down.get("bias")
    halves = up["weight"].chunk(2)
    biases = (None, None) if up["bias"] is None else up["bias"].chunk(2)
    if spec.up_first:
        halves, biases = halves[::-1], biases[::-1]
    return *halves, down.get("weight"), *biases, down.get("bias")


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
        and (torch.compiler.is_compiling() or (type(x) in (Tensor, nn.Parameter) and not ops.is_transformed()))
    )


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
