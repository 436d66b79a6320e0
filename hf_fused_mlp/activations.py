"""The activations that the kernels compute, one row each. `reading.activations` finds them in a model.

Transformers has four spellings of tanh GELU, which differ only by rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """One activation, named as in the kernels; `classes` are the modules that compute it, `package.module.Class`."""

    name: str
    classes: tuple[str, ...]
    function: Callable[[Tensor], Tensor]


HF = "transformers.activations."
NN = "torch.nn.modules.activation."

ACTIVATIONS = {
    row.name: row
    for row in (
        Activation("silu", (HF + "SiLUActivation", NN + "SiLU"), F.silu),
        Activation("gelu", (HF + "GELUActivation", NN + "GELU(none)"), F.gelu),
        Activation(
            "gelu_tanh",
            (
                HF + "GELUTanh",
                HF + "NewGELUActivation",
                HF + "FastGELUActivation",
                HF + "AccurateGELUActivation",
                NN + "GELU(tanh)",
            ),
            partial(F.gelu, approximate="tanh"),
        ),
        Activation("quick_gelu", (HF + "QuickGELUActivation",), lambda x: x * torch.sigmoid(1.702 * x)),
        Activation("relu", (NN + "ReLU",), F.relu),
        Activation("relu2", (HF + "ReLUSquaredActivation",), lambda x: F.relu(x).square()),
        Activation("identity", (HF + "LinearActivation", "torch.nn.modules.linear.Identity"), lambda x: x),
    )
}
