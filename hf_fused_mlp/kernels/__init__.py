"""The kernels that a plan may name, one file each; `KERNELS` is their table.

A file has `supports(key)`, the reason why its kernel cannot run a problem; `candidates(key)`, the configurations that
a tuner should try; and a function of its own name that makes the launch. Whatever does not depend on the addresses of
tensors is computed there, once, so that a call has little to do.
"""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

from torch import Tensor

from hf_fused_mlp.kernels import (
    elementwise,
    epilogue,
    fp8_dequantized,
    fp8_gemm,
    fp8_gemv,
    fp8_skinny,
    gemm,
    gemv,
    skinny,
    transposed_skinny,
    wide,
)
from hf_fused_mlp.kernels._launch import Linear
from hf_fused_mlp.reference import dequantize, linear_ref
from hf_fused_mlp.types import ABSENT, GPU, LinearCall, Matrix, MLPOperands, Plan, TileConfig

KERNELS: dict[str, ModuleType] = {
    kernel.__name__.rpartition(".")[2]: kernel
    for kernel in (
        *(gemv, skinny, gemm, wide, elementwise, epilogue, transposed_skinny),
        *(fp8_gemv, fp8_skinny, fp8_gemm, fp8_dequantized),
    )
}
# those whose last launch is PyTorch's, which nothing of ours overlaps with
LIBRARY = frozenset(("torch", "epilogue"))
# of which, if it runs both launches of an MLP, the first gives FP8 to the second
HANDS_OVER_FP8 = "fp8_gemm"

# what `prepare` makes: the function of x, gate, up and down that gives the MLP's output
MLP = Callable[[Tensor, Matrix, Matrix, Matrix], Tensor]


def _torch(call: LinearCall, config: TileConfig) -> Linear:
    """PyTorch's GEMMs and activation."""

    def run(x, weight, gate):
        (weight, scale, bias), (gate, gate_scale, gate_bias) = weight, gate
        if scale is not None:
            weight = dequantize(weight, scale, x.dtype)
            gate = None if gate is None else dequantize(gate, gate_scale, x.dtype)
        return linear_ref(x, weight, bias, gate, gate_bias, call.activation)

    return run


LAUNCHERS: dict[str, Callable[[LinearCall, TileConfig], Linear]] = {
    name: getattr(kernel, name) for name, kernel in KERNELS.items()
} | {"torch": _torch}


def has_rows(x: Tensor) -> bool:
    """True if `x` `[..., K]` is a matrix to the kernels: contiguous rows, evenly spaced, with offsets below 2^22."""
    try:
        tokens = x.view(-1, x.shape[-1])
    except RuntimeError:  # uneven spacing
        return False
    return tokens.stride(1) == 1 and tokens.stride(0) <= 1 << 22


def describe_launch(x: Tensor, weight: Tensor, gated: bool, activation: str) -> LinearCall:
    """Everything about a launch except tensor addresses. `x` must pass `has_rows` and hold at least one token."""
    tokens = x.reshape(-1, x.shape[-1])
    m, k = tokens.shape
    stride = tokens.stride(0) if m > 1 else k  # the stride of a single row may be anything
    return LinearCall(tuple(x.shape[:-1]), m, weight.shape[0], k, stride, gated, activation, x.dtype, x.device)


def prepare(plan: Plan, x: Tensor, operands: MLPOperands) -> MLP:
    """The function that runs `plan` on tensors like these, at any address.

    `x` is `[..., H]`, passes `has_rows` and has at least one token; the weights are stored in that way of
    `storage_of` for which the plan was made. Without down, the function returns the hidden activation `[..., I]`.
    """
    gate, up, down, activation, _ = operands
    call = describe_launch(x, up.data, gate.data is not None, activation)
    if hands_over := down.data is not None and plan.up.kernel == plan.down.kernel == HANDS_OVER_FP8:
        call = replace(call, gives_fp8=True)
    run_up = LAUNCHERS[plan.up.kernel](call, plan.up)
    if down.data is None:
        return lambda x, gate, up, down: run_up(x, up, gate)

    # down may load its weights before h is ready: whatever wrote them had finished when up began
    overlap = plan.up.kernel not in LIBRARY and GPU.of(x.device).can_overlap
    n = down.data.shape[0]
    sizes = call.lead, call.m, n, call.n, call.n
    call = LinearCall(*sizes, False, "identity", x.dtype, x.device, overlap, reads_fp8=hands_over)
    run_down = LAUNCHERS[plan.down.kernel](call, plan.down)
    return lambda x, gate, up, down: run_down(run_up(x, up, gate), down, ABSENT)


def linear(x: Tensor, weight: Matrix, gate: Matrix, activation: str, config: TileConfig) -> Tensor:
    """``act(x @ gate.T + gate_bias) * (x @ weight.T + bias)``, or without gate ``act(x @ weight.T + bias)``.

    Args:
        x: `[..., K]`, passes `has_rows`.
        weight, gate: `[N, K]`, stored as the kernel reads them; gate may be `ABSENT`.
        activation: a key of `ACTIVATIONS`.

    Returns:
        `[..., N]`, dtype of `x`.
    """
    call = describe_launch(x, weight.data, gate.data is not None, activation)
    return LAUNCHERS[config.kernel](call, config)(x, weight, gate)
