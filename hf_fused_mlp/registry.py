"""Which modules are MLPs we may fuse: one row an architecture, and the checks an instance has to pass.

A row states what a class computes. An instance is fused only if its class is exactly that of a row (a subclass may
compute something else) and its projections are plain enough to be read without being called.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from hf_fused_mlp.activations import ACTIVATIONS, find_activation
from hf_fused_mlp.types import MLPKind


@dataclass(frozen=True)
class MLPSpec:
    """What an MLP class computes, by the names of its attributes.

    Args:
        kind: which of the three equations.
        up, down: names of the `nn.Linear` projections; for a packed MLP `up` holds the rows of gate, then those of up.
        activation: name of the activation module.
        gate: name of the gate projection; for a gated MLP only.

    Raises:
        ValueError: `gate` missing for a gated MLP, or given for another.
    """

    kind: MLPKind
    up: str
    down: str
    activation: str
    gate: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "kind", MLPKind(self.kind))
        if (self.kind is MLPKind.GATED) != (self.gate is not None):
            expected = "the gate projection's name" if self.kind is MLPKind.GATED else "None"
            raise ValueError(f"MLPSpec(kind={self.kind.value!r}, gate={self.gate!r}): gate must be {expected}")

    @property
    def projections(self) -> tuple[str, ...]:
        """The names of the `nn.Linear` children, gate first where there is one."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)


_SWIGLU = MLPSpec(MLPKind.GATED, gate="gate_proj", up="up_proj", down="down_proj", activation="act_fn")

# classes of Transformers by path, since none is imported before a model is loaded; classes of the user by identity
MLP_SPECS: dict[str | type, MLPSpec] = {
    "transformers.models.llama.modeling_llama.LlamaMLP": _SWIGLU,
    "transformers.models.mistral.modeling_mistral.MistralMLP": _SWIGLU,
    "transformers.models.qwen2.modeling_qwen2.Qwen2MLP": _SWIGLU,
    "transformers.models.qwen3.modeling_qwen3.Qwen3MLP": _SWIGLU,
    "transformers.models.gemma.modeling_gemma.GemmaMLP": _SWIGLU,
    "transformers.models.gemma2.modeling_gemma2.Gemma2MLP": _SWIGLU,
    "transformers.models.gemma3.modeling_gemma3.Gemma3MLP": _SWIGLU,
    "transformers.models.olmo2.modeling_olmo2.Olmo2MLP": _SWIGLU,
    "transformers.models.phi3.modeling_phi3.Phi3MLP": MLPSpec(
        MLPKind.PACKED, up="gate_up_proj", down="down_proj", activation="activation_fn"
    ),
    "transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXMLP": MLPSpec(
        MLPKind.PLAIN, up="dense_h_to_4h", down="dense_4h_to_h", activation="act"
    ),
    "transformers.models.phi.modeling_phi.PhiMLP": MLPSpec(
        MLPKind.PLAIN, up="fc1", down="fc2", activation="activation_fn"
    ),
    # its residual dropout acts in training only, where fused modules run the original forward
    "transformers.models.starcoder2.modeling_starcoder2.Starcoder2MLP": MLPSpec(
        MLPKind.PLAIN, up="c_fc", down="c_proj", activation="act"
    ),
}


# what `forward` was when a class was registered
_registered_forwards: dict[type, Callable] = {}


def class_path(cls: type) -> str:
    """Module path and qualified name."""
    return f"{cls.__module__}.{cls.__qualname__}"


def register_mlp(cls: type[nn.Module], spec: MLPSpec) -> None:
    """Makes `cls`, and no subclass of it, fusable from now on; a later call for the same class replaces the spec.

    Raises:
        TypeError: `cls` is not an `nn.Module` class, or `spec` not an `MLPSpec`.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_mlp: {cls!r} is not an nn.Module class; pass the class, not an instance or a name")
    if not isinstance(spec, MLPSpec):
        raise TypeError(f"register_mlp({cls.__name__}): {spec!r} is not an MLPSpec")
    MLP_SPECS[cls] = spec
    _registered_forwards[cls] = cls.forward


def find_spec(cls: type[nn.Module]) -> MLPSpec | None:
    """The spec of exactly this class, or None."""
    return MLP_SPECS.get(cls) or MLP_SPECS.get(class_path(cls))


def _is_patched(cls: type[nn.Module]) -> bool:
    """Whether `cls.forward` is another function than the one that the spec of `cls` was written for."""
    forward = cls.forward
    if cls in _registered_forwards:
        return forward is not _registered_forwards[cls]
    return forward.__module__ != cls.__module__ or forward.__qualname__ != f"{cls.__qualname__}.forward"


_MLP_CLASS = re.compile(r"MLP|Mlp|FeedForward|FFN|GLU|Experts")
_MLP_NAME = re.compile(r"(^|\.)(mlp|ffn|feed_forward|experts)$")


def looks_like_mlp(name: str, module: nn.Module) -> bool:
    """Whether a report should list this module of unknown class as an MLP left alone. Never decides what is fused."""
    if not any(True for _ in module.parameters()):
        return False
    return bool(_MLP_CLASS.search(type(module).__name__) or _MLP_NAME.search(name))


def reject_reason(module: nn.Module, cls: type[nn.Module], spec: MLPSpec) -> str | None:
    """Why `module`, an instance of `cls`, cannot be fused as `spec` says, with the remedy, or None if it can."""
    linears = {name: getattr(module, name, None) for name in spec.projections}
    return altered_reason(module, cls, spec) or _mismatch(linears, spec)


def altered_reason(module: nn.Module, cls: type[nn.Module], spec: MLPSpec) -> str | None:
    """Why the kernels may not stand in for a call of `module`: something in it is, or has become, not plain.

    A fused module asks at every call, so the way to None is short and the words are found only when they are needed.
    """
    # the compiler of torch 2.11 misreads a function's __qualname__; what it traces was checked when it was fused
    if not torch.compiler.is_compiling() and _is_patched(cls):
        forward = f"{cls.forward.__module__}.{cls.forward.__qualname__}"
        return (
            f"the forward of {cls.__name__} was replaced by {forward}; undo the patch, or, if it computes the same, "
            f"call register_mlp({cls.__name__}, MLPSpec(...))"
        )
    if _has_own_forward(module):
        return (
            "its forward was replaced on the instance, as some patches do, and accelerate where a model is on several "
            "devices; load on one device, fuse before the patch, or pass exclude=[...]"
        )
    children = module._modules
    missing = [name for name in (*spec.projections, spec.activation) if name not in children]
    if missing:
        return f"it has no submodule {missing[0]!r}, which its spec names; correct the spec given to register_mlp"
    for name in spec.projections:
        if not is_plain(children[name]):
            return f"{name} {_why_not_plain(children[name])}"
    activation = children[spec.activation]
    if find_activation(activation) is None:
        return (
            f"{spec.activation} is {type(activation).__name__}, expected an activation that computes one of "
            f"{', '.join(ACTIVATIONS)}; pass exclude=[...] to leave this module as it is"
        )
    if _is_hooked(activation):
        return f"{spec.activation} has hooks or a forward of its own; remove them first, or pass exclude=[...]"
    return None


def is_plain(linear: nn.Module) -> bool:
    """Whether a projection's weights may be read in place of calling it.

    The class alone does not tell: several quantizers keep it `nn.Linear` and change what is inside.
    """
    if type(linear) is not nn.Linear:
        return False
    weight = linear._parameters.get("weight")
    return (
        type(weight) is nn.Parameter
        and weight.dtype in _PLAIN_DTYPES
        and not weight.is_meta
        and not linear._modules
        and not linear._buffers
        and len(linear._parameters) == 2
        and not _is_hooked(linear)
    )


_PLAIN_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def _is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module does anything but run its class's forward."""
    attributes = module.__dict__
    return bool(
        _has_own_forward(module)
        or "_hf_hook" in attributes
        or attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
    )


def _has_own_forward(module: nn.Module) -> bool:
    """Whether the instance shadows its class's forward; accelerate leaves the class's own behind when it lets go."""
    own = module.__dict__.get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _why_not_plain(linear: nn.Module) -> str:
    """The words for what `is_plain` has found."""
    if type(linear) is not nn.Linear:
        return (
            f"is {class_path(type(linear))}, expected nn.Linear; load without quantization_config, "
            "merge or unload the adapter, or pass exclude=[...]"
        )
    weight = linear._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return (
            f"holds a {type(weight).__name__} as weight, expected nn.Parameter; load without quantization or sharding"
        )
    if weight.is_meta:
        return "has its weight on meta (offloaded, or not loaded yet); load with a device_map that keeps it in memory"
    if weight.dtype not in _PLAIN_DTYPES:
        return (
            f"has a weight of {weight.dtype}, expected a float of at least two bytes; load without quantization_config"
        )
    if _is_hooked(linear):
        return (
            "has hooks or a forward of its own (accelerate's offload among them); remove them, or pass exclude=[...]"
        )
    extra = [*linear._modules, *linear._buffers, *(linear._parameters.keys() - {"weight", "bias"})]
    return f"carries {', '.join(extra)} besides weight and bias; load without quantization, or pass exclude=[...]"


def _mismatch(linears: dict[str, nn.Linear], spec: MLPSpec) -> str | None:
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
    up, down = linears[spec.up].weight, linears[spec.down].weight
    halves = 2 if spec.kind is MLPKind.PACKED else 1
    if up.shape[0] == halves * down.shape[1] and (spec.gate is None or linears[spec.gate].weight.shape == up.shape):
        return None
    shapes = ", ".join(f"{name} {list(linear.weight.shape)}" for name, linear in linears.items())
    return f"the shapes do not fit a {spec.kind.value} MLP ({shapes}); correct the spec given to register_mlp"
