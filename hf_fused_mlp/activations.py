"""The activations the kernels know, one row each.

An activation is recognised by the exact class of the module that a model holds, never by a name in a config: a
subclass or a look-alike is unknown. Tanh GELU is written four ways in Transformers, one function up to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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


def find_activation(module: nn.Module) -> str | None:
    """The key in `ACTIVATIONS` of what `module` computes, or None where that is not certain."""
    cls = type(module)
    path = class_path(cls)
    if cls is nn.GELU:
        path += f"({module.approximate})"
    name = _NAME_BY_CLASS.get(path)
    return None if name is None or module._modules else name  # one given a child may call that
