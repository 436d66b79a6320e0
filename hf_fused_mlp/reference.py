"""The MLP equation in plain PyTorch: the oracle of every test, the CPU implementation, and the unfused plan.

It rounds where eager Transformers rounds (after each projection, after the activation, after the product).
"""

import torch.nn.functional as F
from torch import Tensor

from hf_fused_mlp.activations import ACTIVATIONS


def linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    activation: str = "identity",
) -> Tensor:
    """``act(x @ weight.T + bias)``, or with a gate ``act(x @ gate.T + gate_bias) * (x @ weight.T + bias)``.

    Args:
        x: `[..., K]`, any float dtype.
        weight, gate: `[N, K]`.
        bias, gate_bias: `[N]`.
        activation: a key of `ACTIVATIONS`.

    Returns:
        `[..., N]`, dtype of `x`.

    Raises:
        KeyError: unknown activation.
    """
    activate = ACTIVATIONS[activation].function
    if gate is None:
        return activate(F.linear(x, weight, bias))
    return activate(F.linear(x, gate, gate_bias)) * F.linear(x, weight, bias)


def act_mul_ref(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``act(gate) * up`` for any two tensors of one shape; KeyError for an unknown activation."""
    return ACTIVATIONS[activation].function(gate) * up


def mlp_ref(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where `gate` is None; without `down`, what it is given.

    Args:
        x: `[..., H]`, any float dtype.
        gate, up: `[I, H]`, adjacent in memory or not.
        down: `[O, I]`; `O` is `H` in every known model.
        gate_bias, up_bias: `[I]`; down_bias: `[O]`.
        activation: a key of `ACTIVATIONS`.

    Returns:
        `[..., O]`, or `[..., I]` without `down`; dtype of `x`.

    Raises:
        KeyError: unknown activation.
    """
    h = linear_ref(x, up, up_bias, gate, gate_bias, activation)
    return h if down is None else F.linear(h, down, down_bias)
