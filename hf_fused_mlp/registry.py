"""Which modules are MLPs we may fuse, and the checks an instance has to pass.

What a module computes is read from its forward (`recognition`), or stated for exactly its class by `register_mlp`. It
is fused only if its projections are plain enough to be read without being called.
"""

import re
import weakref
from collections.abc import Callable, MutableMapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from hf_fused_mlp.activations import ACTIVATIONS, find_activation
from hf_fused_mlp.children import (
    OWN_FORWARD,
    has_own_forward,
    is_column_shard,
    is_hooked,
    is_loaded,
    is_plain,
    why_not_plain,
)
from hf_fused_mlp.originals import IDENTITIES, path_of, why_functions_are_not_own
from hf_fused_mlp.recognition import recognise
from hf_fused_mlp.types import MLPKind, MLPSpec

# the classes that `register_mlp` was given, and what the forward of each was then
MLP_SPECS: MutableMapping[type[nn.Module], tuple[MLPSpec, Callable[[], Any]]] = WeakKeyDictionary()


def register_mlp(cls: type[nn.Module], spec: MLPSpec) -> None:
    """Makes `cls`, and no subclass of it, fusable from now on; a later call for the same class replaces the spec.

    Raises:
        TypeError: `cls` is not an `nn.Module` class, or `spec` not an `MLPSpec`.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_mlp: {cls!r} is not an nn.Module class; pass the class, not an instance or a name")
    if not isinstance(spec, MLPSpec):
        raise TypeError(f"register_mlp({cls.__name__}): {spec!r} is not an MLPSpec")
    MLP_SPECS[cls] = spec, _weak(cls.forward)


def _weak(forward: Callable) -> Callable[[], Any]:
    """A function that gives `forward`, which may refer to its class, as long as somebody else keeps it."""
    try:
        return weakref.ref(forward)
    except TypeError:  # a builtin, for example, which refers to no class
        return lambda: forward


def registered_spec(cls: type[nn.Module]) -> MLPSpec | None:
    """The spec that was registered for exactly this class, or None."""
    return MLP_SPECS.get(cls, (None,))[0]


def find_spec(module: nn.Module) -> MLPSpec | None:
    """What `module` computes: as its class was registered, or else as its forward says; None if unknown."""
    registered, read = registered_spec(type(module)), recognise(module)
    if registered is None:
        return read
    # what is registered says what the kernels compute, not what else the forward does in training
    return replace(registered, other_steps=read is None or read.other_steps or registered.other_steps)


_MLP_CLASS = re.compile(r"MLP|Mlp|FeedForward|FFN|GLU|Experts")
_MLP_NAME = re.compile(r"(^|\.)(mlp|ffn|feed_forward|experts)$")


def looks_like_mlp(name: str, module: nn.Module) -> bool:
    """Whether a report should list this module of unknown class as an MLP left alone. Never decides what is fused."""
    if not any(True for _ in module.parameters()):
        return False
    return bool(_MLP_CLASS.search(type(module).__name__) or _MLP_NAME.search(name))


def reject_reason(module: nn.Module, cls: type[nn.Module], spec: MLPSpec) -> str | None:
    """Why `module`, an instance of `cls`, cannot be fused as `spec` says, with the remedy, or None if it can."""
    if cls in MLP_SPECS and cls.forward is not MLP_SPECS[cls][1]():
        return replaced_reason(cls)
    if reason := why_functions_are_not_own():
        return reason
    if reason := altered_reason(module, spec):
        return reason
    linears = {name: module._modules[name] for name in spec.projections}
    if reason := call_reason(module, spec.projections):
        loaded = all(is_loaded(linear) for linear in linears.values())
        return None if loaded and can_call(module, spec) else reason
    return _mismatch(linears, spec)


def replaced_reason(cls: type[nn.Module]) -> str:
    """The words for a class whose forward is no longer the one that a spec is about."""
    return (
        f"the forward of {cls.__name__} was replaced by {path_of(cls.forward)}; undo the patch, or, if it computes "
        f"the same, call register_mlp({cls.__name__}, MLPSpec(...))"
    )


def altered_reason(module: nn.Module, spec: MLPSpec) -> str | None:
    """Why the kernels may not stand in for a call of `module`: something in it is, or has become, not plain.

    A fused module asks whenever a call is unlike those before, so the words are found only when they are needed.
    """
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
            return f"{name} is not a plain dropout or identity, which alone may be left out; pass exclude=[...]"
        if children[name].training and not module.training:
            return f"{name} is in training mode; call eval() on it"
    if spec.activation is None:
        return None
    activation = children[spec.activation]
    if find_activation(activation) is None:
        return unknown_activation_reason(spec.activation, activation)
    if is_hooked(activation):
        return f"{spec.activation} has hooks or a forward of its own; remove them first, or pass exclude=[...]"
    return None


def unknown_activation_reason(name: str, activation: nn.Module) -> str:
    """The words for a child that stands where an MLP has its activation."""
    return (
        f"{name} is {type(activation).__name__}, expected an activation that computes one of "
        f"{', '.join(ACTIVATIONS)}; pass exclude=[...] to leave this module as it is"
    )


def can_call(module: nn.Module, spec: MLPSpec) -> bool:
    """Whether calling some projections leaves something to fuse: a product with the activation, or what is before."""
    if spec.other_steps or spec.down is None:
        return False
    return spec.kind is not MLPKind.PLAIN or (not module.training and reads_first(module, spec))


def reads_first(module: nn.Module, spec: MLPSpec) -> bool:
    """Whether the weights before the activation may be read, those of this process at least.

    Of shards that holds where no gradient is wanted.
    """
    children = [module._modules[name] for name in spec.first]
    return all(map(is_plain, children)) or all(map(is_column_shard, children))


def call_reason(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """Which projection has to be called and why, with the remedy, or None if the weights of all may be read."""
    for name in names:
        if not is_plain(module._modules[name]):
            return f"{name} {why_not_plain(module._modules[name])}"
    return None


def fits(spec: MLPSpec, *shapes: torch.Size) -> bool:
    """Whether the weights of the projections, or of those before the activation, have the shapes of one equation."""
    if any(len(shape) != 2 for shape in shapes):
        return False
    (*_, up) = first = shapes[: len(spec.first)]
    halves = 2 if spec.kind is MLPKind.PACKED else 1
    return first[0] == up and all(up[0] == halves * down[1] for down in shapes[len(first) :])


def _mismatch(linears: dict[str, Any], spec: MLPSpec) -> str | None:
    """In which dtype, device or shape the projections do not go together, or None if they do."""
    tensors = {
        f"{name}.{kind}": tensor
        for name, linear in linears.items()
        for kind, tensor in linear._parameters.items()
        if tensor is not None
    }
    for attribute, remedy in (("dtype", "load with one dtype=..."), ("device", "keep each layer on one device")):
        values = {name: getattr(tensor, attribute) for name, tensor in tensors.items()}
        if len(set(values.values())) > 1:
            found = ", ".join(f"{name} {value}" for name, value in values.items())
            return f"its weights differ in {attribute} ({found}); {remedy}, or pass exclude=[...]"
    if fits(spec, *(linear.weight.shape for linear in linears.values())):
        return None
    shapes = ", ".join(f"{name} {list(linear.weight.shape)}" for name, linear in linears.items())
    return f"the shapes do not fit a {spec.kind.value} MLP ({shapes}); correct the spec given to register_mlp"
