"""Finds the activation that a module computes, by its exact class and by the attributes that its forward reads.

Names in a config do not count, and a subclass or a look-alike is unknown.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_fused_mlp.activations import ACTIVATIONS, HF, NN
from hf_fused_mlp.calls import class_path
from hf_fused_mlp.originals import own_forwards

_NAME_BY_CLASS = {path: row.name for row in ACTIVATIONS.values() for path in row.classes}


def _is_tanh_gelu(act: Any) -> bool:
    return isinstance(act, partial) and act.func is F.gelu and not act.args and act.keywords == {"approximate": "tanh"}


# classes whose forward depends on an attribute of the instance, with a check that its value matches the table
_HELD: dict[str, tuple[str, Callable[[Any], bool]]] = {
    HF + "GELUActivation": ("act", lambda act: act is F.gelu),
    HF + "GELUTanh": ("act", _is_tanh_gelu),
    HF + "AccurateGELUActivation": ("precomputed_constant", lambda constant: constant == math.sqrt(2 / math.pi)),
}

# classes that write GELU as a formula
_SPELLED_OUT = {HF + name for name in ("NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation")}


# for classes that alone decide the activation; the modules of these classes keep them alive anyway
_names: dict[type, str] = {}


def find_activation(module: nn.Module) -> str | None:
    """The key in `ACTIVATIONS` of the activation that `module` computes, or None if that is not certain."""
    cls = type(module)
    path = class_path(cls)
    if path == NN + "GELU":
        return _NAME_BY_CLASS.get(f"{path}({module.approximate})")
    name = _NAME_BY_CLASS.get(path)
    if path in _HELD:
        attribute, is_as_made = _HELD[path]
        held = getattr(module, attribute, None)
        return name if is_as_made(held) or _is_method_of(held, module) else None
    if name is not None and not torch.compiler.is_compiling() and cls in own_forwards:
        _names[cls] = name
    return name


def activation_at_a_glance(module: nn.Module | None) -> str | None:
    """Fast form of `find_activation` for eager calls."""
    return _names.get(type(module)) or (None if module is None else find_activation(module))


def _is_method_of(function: Any, module: nn.Module) -> bool:
    """True if `function` is a method of the module's own class, which `use_gelu_python` puts there."""
    own = getattr(function, "__func__", None)
    return own is not None and function.__self__ is module and own is getattr(type(module), own.__name__, None)


def is_spelled_out(module: nn.Module) -> bool:
    """Whether PyTorch launches five to eight kernels for this GELU, where `F.gelu` is one."""
    return class_path(type(module)) in _SPELLED_OUT or _is_method_of(getattr(module, "act", None), module)
