"""The kernel families, by the name that `TileConfig.kernel` gives.

A family is a module with `supports(key)`, the reason why it cannot run a problem; `candidates(key)`, the
configurations that a tuner should try for one that it can; and a function of its own name that makes the launch. What
does not depend on where the tensors are is done there, once, so that a call has little left to do.
"""

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from hf_fused_mlp.kernels import elementwise, gemm, gemv, skinny
from hf_fused_mlp.kernels._launch import Linear
from hf_fused_mlp.reference import linear_ref
from hf_fused_mlp.types import GPU, TORCH, LinearCall, Plan, TileConfig

FAMILIES: dict[str, ModuleType] = {"gemv": gemv, "skinny": skinny, "gemm": gemm, "elementwise": elementwise}

# what `prepare` makes: the function of x, gate, up, down and their biases that gives the MLP's answer
MLP = Callable[..., Tensor]


def _torch(call: LinearCall, config: TileConfig) -> Linear:
    """PyTorch's GEMMs and activation."""
    return lambda x, weight, bias, gate, gate_bias: linear_ref(x, weight, bias, gate, gate_bias, call.activation)


LAUNCHERS: dict[str, Callable[[LinearCall, TileConfig], Linear]] = {
    name: getattr(family, name) for name, family in FAMILIES.items()
} | {"torch": _torch}


def has_rows(x: Tensor) -> bool:
    """Whether `x` `[..., K]` is a matrix to the kernels: rows contiguous, evenly apart, and for their offsets near."""
    try:
        tokens = x.view(-1, x.shape[-1])
    except RuntimeError:  # their distance varies
        return False
    return tokens.stride(1) == 1 and tokens.stride(0) <= 1 << 22


def call_of(x: Tensor, weight: Tensor, gated: bool, activation: str) -> LinearCall:
    """What is known of a launch by an `x` that `has_rows`, with at least one."""
    tokens = x.reshape(-1, x.shape[-1])
    m, k = tokens.shape
    stride = tokens.stride(0) if m > 1 else k  # of one row, the stride may be anything
    return LinearCall(tuple(x.shape[:-1]), m, weight.shape[0], k, stride, gated, activation, x.dtype, x.device)


def prepare(plan: Plan, x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor | None, activation: str) -> MLP:
    """The function that runs `plan` on tensors like these, and their biases, wherever they are.

    `x` is `[..., H]` with at least one token and `has_rows`, and the weights are contiguous. Without `down`, the
    function gives what down would be given.
    """
    call = call_of(x, up, gate is not None, activation)
    run_up = LAUNCHERS[plan.up.kernel](call, plan.up)
    if down is None:
        return lambda x, gate, up, down, gate_bias, up_bias, down_bias: run_up(x, up, up_bias, gate, gate_bias)

    # down may read its weights before h is done, since whatever wrote them was over when up began
    overlap = plan.up != TORCH and GPU.of(x.device).can_overlap
    call = LinearCall(call.lead, call.m, down.shape[0], call.n, call.n, False, "identity", x.dtype, x.device, overlap)
    run_down = LAUNCHERS[plan.down.kernel](call, plan.down)

    def run(x, gate, up, down, gate_bias, up_bias, down_bias):
        return run_down(run_up(x, up, up_bias, gate, gate_bias), down, down_bias, None, None)

    return run


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
        x: `[..., K]`, which `has_rows`.
        weight, gate: `[N, K]`, contiguous.
        bias, gate_bias: `[N]`.
        activation: a key of `ACTIVATIONS`.

    Returns:
        `[..., N]`, dtype of `x`.
    """
    call = call_of(x, weight, gate is not None, activation)
    return LAUNCHERS[config.kernel](call, config)(x, weight, bias, gate, gate_bias)
