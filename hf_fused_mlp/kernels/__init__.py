"""The kernel families, by the name that `TileConfig.kernel` gives.

Every family is a function of `(x, weight, bias, gate, gate_bias, activation, config)`, the reference in PyTorch among
them, so that a plan can put any family on either launch of an MLP.
"""

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from hf_fused_mlp.kernels import gemm, gemv, skinny
from hf_fused_mlp.reference import linear_ref
from hf_fused_mlp.types import TileConfig

FAMILIES: dict[str, ModuleType] = {"gemv": gemv, "skinny": skinny, "gemm": gemm}

LAUNCHERS: dict[str, Callable[..., Tensor]] = {
    "torch": linear_ref,
    **{name: getattr(family, name) for name, family in FAMILIES.items()},
}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    config: TileConfig,
) -> Tensor:
    """``act(x @ gate.T + gate_bias) * (x @ weight.T + bias)``, or ``act(x @ weight.T + bias)``, as `config` says.

    Args:
        x: `[M, K]`, contiguous in its last dimension.
        weight, gate: `[N, K]`, contiguous.
        bias, gate_bias: `[N]`.
        activation: a key of `ACTIVATIONS`.

    Returns:
        `[M, N]`, dtype of `x`.
    """
    return LAUNCHERS[config.kernel](x, weight, bias, gate, gate_bias, activation, config)
