"""The kernel families, by the name that `TileConfig.kernel` gives.

A family is a module with a launcher of its own name; `supports(key)`, the reason why it cannot run a problem; and
`candidates(key)`, the configurations that a tuner should try for one that it can.
"""

from types import ModuleType

from torch import Tensor

from hf_fused_mlp.kernels import elementwise, gemm, gemv, skinny
from hf_fused_mlp.reference import linear_ref
from hf_fused_mlp.types import GPU, TORCH, Plan, TileConfig

FAMILIES: dict[str, ModuleType] = {"gemv": gemv, "skinny": skinny, "gemm": gemm, "elementwise": elementwise}

LAUNCHERS = {name: getattr(family, name) for name, family in FAMILIES.items()}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    config: TileConfig,
    overlap: bool = False,
) -> Tensor:
    """``act(x @ gate.T + gate_bias) * (x @ weight.T + bias)``, or ``act(x @ weight.T + bias)``, as `config` says.

    Args:
        x: `[M, K]`, contiguous in its last dimension.
        weight, gate: `[N, K]`, contiguous.
        bias, gate_bias: `[N]`.
        activation: a key of `ACTIVATIONS`.
        overlap: begin while the launch before, which must be one of ours, is finishing. For GPUs that `can_overlap`.

    Returns:
        `[M, N]`, dtype of `x`.
    """
    if config.kernel == "torch":
        return linear_ref(x, weight, bias, gate, gate_bias, activation)
    return LAUNCHERS[config.kernel](x, weight, bias, gate, gate_bias, activation, config, overlap)


def run_plan(
    plan: Plan,
    tokens: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """The MLP for `tokens` `[M, H]` with `M` at least 1, contiguous in the last dimension, and contiguous weights.

    Without `down`, what it would be given.
    """
    h = linear(tokens, up, up_bias, gate, gate_bias, activation, plan.up)
    if down is None:
        return h
    # down may read its weights before h is done, since whatever wrote them was over when up began
    overlap = plan.up != TORCH and GPU.of(h.device).can_overlap
    return linear(h, down, down_bias, None, None, "identity", plan.down, overlap)
