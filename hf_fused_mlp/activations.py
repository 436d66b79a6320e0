"""The activations the kernels know, one row each.

An activation is recognised by the exact class of the module that a model holds, and by what its forward reads of the
instance, never by a name in a config: a subclass or a look-alike is unknown. Tanh GELU is written four ways in
Transformers, one function up to rounding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fused_mlp.children import class_path


@dataclass(frozen=True)
class Activation:
    """`name` is also the kernels' name for it; `classes` are module paths with class, as `module.Class`."""

    name: str
    classes: tuple[str, ...]
    function: Callable[[Tensor], Tensor]


_HF = "transformers.activations."
_NN = "torch.nn.modules.activation."

ACTIVATIONS = {
    row.name: row
    for row in (
        Activation("silu", (_HF + "SiLUActivation", _NN + "SiLU"), F.silu),
        Activation("gelu", (_HF + "GELUActivation", _NN + "GELU(none)"), F.gelu),
        Activation(
            "gelu_tanh",
            (
                _HF + "GELUTanh",
                _HF + "NewGELUActivation",
                _HF + "FastGELUActivation",
                _HF + "AccurateGELUActivation",
                _NN + "GELU(tanh)",
            ),
            partial(F.gelu, approximate="tanh"),
        ),
        Activation("quick_gelu", (_HF + "QuickGELUActivation",), lambda x: x * torch.sigmoid(1.702 * x)),
        Activation("relu", (_NN + "ReLU",), F.relu),
        Activation("relu2", (_HF + "ReLUSquaredActivation",), lambda x: F.relu(x).square()),
        Activation("identity", (_HF + "LinearActivation", "torch.nn.modules.linear.Identity"), lambda x: x),
    )
}

_NAME_BY_CLASS = {path: row.name for row in ACTIVATIONS.values() for path in row.classes}


def _is_tanh_gelu(act: Any) -> bool:
    return isinstance(act, partial) and act.func is F.gelu and not act.args and act.keywords == {"approximate": "tanh"}


# the attribute that a class's forward reads of the instance, and whether what it holds computes what the table says; a
# method of the class's own does too
_HELD: dict[str, tuple[str, Callable[[Any], bool]]] = {
    _HF + "GELUActivation": ("act", lambda act: act is F.gelu),
    _HF + "GELUTanh": ("act", _is_tanh_gelu),
    _HF + "AccurateGELUActivation": ("precomputed_constant", lambda constant: constant == math.sqrt(2 / math.pi)),
}


def find_activation(module: nn.Module) -> str | None:
    """The key in `ACTIVATIONS` of what `module` computes, or None where that is not certain."""
    cls = type(module)
    path = class_path(cls)
    if path == _NN + "GELU":
        path += f"({module.approximate})"
    name = _NAME_BY_CLASS.get(path)
    if path in _HELD:
        attribute, is_as_made = _HELD[path]
        held = getattr(module, attribute, None)
        if not is_as_made(held) and not _is_method_of(held, module):
            return None
    return name


def _is_method_of(function: Any, module: nn.Module) -> bool:
    """Whether `function` is a method of the module's class, such as `use_gelu_python` puts there."""
    own = getattr(function, "__func__", None)
    return own is not None and function.__self__ is module and own is getattr(type(module), own.__name__, None)
