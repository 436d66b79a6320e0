"""Checks an instance of a known MLP class, and says which of its projections can be read."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.calls import OWN_FORWARD, has_own_forward, is_hooked, is_wrapped
from hf_fused_mlp.logs import logger
from hf_fused_mlp.originals import IDENTITIES, LINEAR, why_functions_are_not_own
from hf_fused_mlp.reading.activations import find_activation, is_spelled_out
from hf_fused_mlp.reading.mlp import MLPKind, MLPSpec, patched_reason, was_patched_since
from hf_fused_mlp.types import ABSENT, Matrix
from hf_fused_mlp.weights.blocks import unusable_scales
from hf_fused_mlp.weights.formats import can_be_halved, is_loaded, is_partial, may_be_read, read, why_called

# what a report and a warning say of modules that shall be batch-invariant
CALLED = "a layer must be called, which may add in another order for another token count"


class Projections(NamedTuple):
    """The matrices of an MLP: None for a layer that must be called, `ABSENT` for one that does not exist.

    `partial` is true if gate and up are this process's rows of a tensor-parallel weight.
    """

    gate: Matrix | None
    up: Matrix | None
    down: Matrix | None
    partial: bool

    @property
    def first_are_read(self) -> bool:
        """True if everything before the activation may be read, at least if no gradient is needed."""
        return self.gate is not None and self.up is not None

    @property
    def all_are_read(self) -> bool:
        """True if no layer has to be called."""
        return self.first_are_read and self.down is not None and not self.partial


def read_projections(module: nn.Module, spec: MLPSpec) -> Projections:
    """Reads the projections that need not be called. Builds no messages, so it is cheap enough for calls."""
    children = module._modules
    gate, up = (ABSENT if name is None else read(children.get(name)) for name in (spec.gate, spec.up))
    if gate is None or up is None or (spec.halves is not None and not can_be_halved(up)):
        return Projections(None, None, None, False)
    partial = [is_partial(children[name]) for name in spec.first]
    if any(partial):
        # a whole weight does not fit a shard, and nothing after the activation may be read
        return Projections(gate, up, None, True) if all(partial) else Projections(None, None, None, False)
    return Projections(gate, up, ABSENT if spec.down is None else _read_whole(children.get(spec.down)), False)


def must_call(module: nn.Module, first: str) -> bool:
    """True if an eager call must call layers: a wrapped one named `first`, or all under autocast or in training."""
    linear = module._modules.get(first)
    return (
        (type(linear) is not LINEAR and not may_be_read(linear))
        or torch._C._is_any_autocast_enabled()
        or (module.training and torch.is_grad_enabled())
    )


def _read_whole(linear: nn.Module | None) -> Matrix | None:
    """The matrix of a projection; None if the layer must be called, or if this process has a shard of it."""
    matrix = read(linear)
    return None if matrix is None or is_partial(linear) else matrix


def altered_reason(module: nn.Module, spec: MLPSpec) -> str | None:
    """Why the kernels may not replace a call of `module`, apart from its projections; None if they may."""
    if has_own_forward(module):
        return OWN_FORWARD
    children = module._modules
    for name in spec.children:
        if name not in children:
            return f"it has no submodule {name!r}, which its spec names; correct the spec given to register_mlp"
    if spec.sequence and tuple(children) != spec.sequence:
        return f"its children are {', '.join(children)}, no longer {', '.join(spec.sequence)}; undo the change"
    for name in spec.dropouts:
        if type(children[name]) not in IDENTITIES or is_hooked(children[name]):
            return f"{name} is not a plain dropout or identity, so it cannot be left out; pass exclude=[...]"
        if children[name].training and not module.training:
            return f"{name} is in training mode; call eval() on it"
    if spec.unread and (name := wrapped_besides(module, spec.children)) is not None:
        return _hooked_reason(name)
    if spec.activation is None:
        return None
    activation = children[spec.activation]
    if find_activation(activation) is None:
        return unknown_activation_reason(spec.activation, activation)
    if is_hooked(activation):
        return _hooked_reason(spec.activation)
    return None


def wrapped_besides(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """The first module inside, except the children of these names, that has hooks or a forward on the instance."""
    for name, child in module._modules.items():
        if name not in names and child is not None:
            for path, inner in child.named_modules(prefix=name):
                if is_wrapped(inner):
                    return path
    return None


def _hooked_reason(name: str) -> str:
    return f"{name} has hooks or a replaced forward; remove them first, or pass exclude=[...]"


def unknown_activation_reason(name: str, activation: nn.Module) -> str:
    """Why an MLP whose activation is not in the table is skipped."""
    return (
        f"{name} is {type(activation).__name__}, expected an activation that computes one of "
        f"{', '.join(ACTIVATIONS)}; if it computes one of them, call register_mlp with MLPSpec(..., function=...) "
        "first, or pass exclude=[...] to skip this module"
    )


def called_reason(module: nn.Module, spec: MLPSpec) -> str | None:
    """Which projection must be called and why, with the remedy; None if all may be read."""
    for name in spec.projections:
        if (matrix := _read_whole(module._modules[name])) is None:
            return f"{name} {why_called(module._modules[name])}"
        if spec.halves is not None and name == spec.up and not can_be_halved(matrix):
            return (
                f"{name} packs gate and up {list(matrix.data.shape)}, whose halves share scales; "
                "pass exclude=[...] to skip it"
            )
    return None


@cache
def warn_of_variance(reason: str | None) -> None:
    """Logs once that a layer of a batch-invariant module is called, and why."""
    logger.warning("batch_invariant: %s (%s)", CALLED, reason or "no kernels for float64")


def can_call(module: nn.Module, spec: MLPSpec, found: Projections) -> bool:
    """True if something is left to fuse when projections are called: the product, or everything before down."""
    if spec.other_steps or spec.down is None:
        return False
    return spec.kind is not MLPKind.PLAIN or (not module.training and found.first_are_read)


def reject_reason(module: nn.Module, spec: MLPSpec) -> str | None:
    """Why `module` cannot be fused according to `spec`, with the remedy, or None if it can."""
    cls = type(module)
    if was_patched_since(cls):
        return patched_reason(cls)
    if reason := why_functions_are_not_own() or altered_reason(module, spec):
        return reason
    projections: dict[str, Any] = {name: module._modules[name] for name in spec.projections}
    matrices: dict[str, Any] = {name: read(projection) for name, projection in projections.items()}
    for name, matrix in matrices.items():
        if matrix is not None and (reason := unusable_scales(matrix.scale)):
            return f"{name} {reason}"
    if reason := called_reason(module, spec):
        loaded = all(is_loaded(projection) for projection in projections.values())
        return None if loaded and can_call(module, spec, read_projections(module, spec)) else reason
    return _mismatch(matrices, spec)


def _mismatch(matrices: dict[str, Any], spec: MLPSpec) -> str | None:
    """Why the projections do not fit together in dtype, device or shape, or None if they do."""
    weights = {f"{name}.weight": data for name, (data, _, _) in matrices.items()}
    biases = {f"{name}.bias": bias for name, (_, _, bias) in matrices.items() if bias is not None}
    are_floats = all(scale is None for _, scale, _ in matrices.values())
    everything = weights | biases
    of_one_dtype = (everything,) if are_floats else (weights, biases)
    rules = [("dtype", tensors, "load with one dtype=...") for tensors in of_one_dtype]
    for attribute, tensors, remedy in (*rules, ("device", everything, "keep each layer on one device")):
        values = {name: getattr(tensor, attribute) for name, tensor in tensors.items()}
        if len(set(values.values())) > 1:
            found = ", ".join(f"{name} {value}" for name, value in values.items())
            return f"its weights differ in {attribute} ({found}); {remedy}, or pass exclude=[...]"
    if _fits(spec, *(matrix.data.shape for matrix in matrices.values())):
        return None
    shapes = ", ".join(f"{name} {list(matrix.data.shape)}" for name, matrix in matrices.items())
    return f"the shapes do not fit a {spec.kind.value} MLP ({shapes}); correct the spec given to register_mlp"


def _fits(spec: MLPSpec, *shapes: torch.Size) -> bool:
    """True if the weights of the projections have the shapes of one equation."""
    (*_, up) = first = shapes[: len(spec.first)]
    halves = 2 if spec.kind is MLPKind.PACKED else 1
    return first[0] == up and all(up[0] == halves * down[1] for down in shapes[len(first) :])


def has_slow_activation(module: Any, spec: MLPSpec) -> bool:
    """Whether the original's activation takes many kernels, so that one of ours always gains something."""
    return spec.activation is not None and is_spelled_out(module._modules[spec.activation])


def local_parameters(module: Any) -> list[Any]:
    """The parameters before the activation, including those of later wrappers; of shards, the local part."""
    layers = [layer for name in module.fused_spec.first if (layer := module._modules.get(name)) is not None]
    return [getattr(weight, "_local_tensor", weight) for layer in layers for weight in layer.parameters()]


def are_parameters(module: Any, weights: tuple[Any, Any]) -> bool:
    """False if a format returns new tensors instead of its parameters, so that packing them would have no effect."""
    held = {id(parameter) for parameter in local_parameters(module)}
    return all(id(weight) in held for weight in weights)
