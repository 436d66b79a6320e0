"""The operator of a whole MLP; kernels on CUDA, PyTorch's operations elsewhere."""

import torch
from torch import Tensor

from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.modes import runs_now
from hf_fused_mlp.ops.library import define, gradients, on_gpu
from hf_fused_mlp.reference import mlp_ref
from hf_fused_mlp.types import FLOATS, FP8, Matrix, MLPOperands, has_block_scales


def mlp(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` if `gate` is None.

    Args:
        x: `[..., H]`, float; any strides, any number of tokens, none included.
        gate, up: `[I, H]`; adjacent in memory (`hf_fused_mlp.weights.pack`) for the fastest prefill.
        down: `[O, I]`; None for the hidden activation, the input of down. Kernels read weights that are contiguous, or
            views of contiguous transposes, as `Conv1D` stores them; others are left to PyTorch's operations.
        gate_bias, up_bias: `[I]`; down_bias: `[O]`.
        activation: a key of `hf_fused_mlp.activations.ACTIVATIONS`.
        gate_scale, up_scale, down_scale: if the weights are FP8 (e4m3), a scale for each 128 x 128 block of them:
            `[ceil(I / 128), ceil(H / 128)]` and `[ceil(O / 128), ceil(I / 128)]`, fp32 or e8m0.
        batch_invariant: a token's output has the same bits for any number of tokens. Holds for fp16 and bf16 on a GPU;
            otherwise a warning is logged.

    Returns:
        `[..., O]`, or `[..., I]` without `down`; dtype of `x`, contiguous. Differentiable in all tensors but FP8
        weights and their scales.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        KeyError: unknown activation.
    """
    operands = gate, up, down, gate_bias, up_bias, down_bias, activation, gate_scale, up_scale, down_scale
    if (out := mlp_if_fits(x, MLPOperands.of(*operands, batch_invariant))) is None:
        _check(x, *operands)
    return out


def mlp_if_fits(x: Tensor, operands: MLPOperands) -> Tensor | None:
    """`mlp`, or None if that would raise."""
    if operands.up[1] is not None and torch.is_grad_enabled():
        operands = MLPOperands(*map(_constant, operands[:3]), *operands[3:])
    flat = operands.flat()
    if not _fits(x, *flat):
        return None
    if runs_now(x):
        return on_gpu().mlp_cuda(x, operands)
    return torch.ops.hf_fused_mlp.mlp(x, *flat, operands.batch_invariant)


def gains_nothing(x: Tensor, operands: MLPOperands, up_layers: int) -> bool:
    """True if the original forward is as fast in eager mode: see `heuristics.gains_nothing_in_eager`.

    `up_layers` is the number of layers before the activation: 2 if gate and up are two.
    """
    return runs_now(x) and _fits(x, *operands.flat()) and on_gpu().gains_nothing(x, operands, up_layers)


def _constant(matrix: tuple) -> Matrix:
    """An FP8 matrix whose numbers get no gradients, so that an output needs none for them; one that is not stays."""
    data, scale, bias = matrix
    return Matrix(data, scale, bias) if scale is None else Matrix(data.detach(), scale.detach(), bias)


def _fits(
    x, gate, up, down, gate_bias, up_bias, down_bias, activation, gate_scale=None, up_scale=None, down_scale=None
) -> bool:
    """True if the tensors fit together; otherwise a kernel would read beyond them."""
    dtype, device, shape, dim = x.dtype, x.device, up.shape, x.dim()
    if up_scale is not None and dtype not in FLOATS:
        return False
    stored = dtype if up_scale is None else FP8
    if len(shape) != 2 or dim == 0 or x.shape[-1] != shape[1] or up.dtype != stored or up.device != device:
        return False
    if gate is not None:
        if gate.shape != shape or gate.dtype != stored or gate.device != device:
            return False
    elif gate_bias is not None:
        return False
    if down is not None:
        if down.dim() != 2 or down.shape[1] != shape[0] or down.dtype != stored or down.device != device:
            return False
    elif down_bias is not None:
        return False
    if up_scale is not None or gate_scale is not None or down_scale is not None:
        for scale, weight in ((gate_scale, gate), (up_scale, up), (down_scale, down)):
            if not (scale is None if weight is None else has_block_scales(weight, scale)):
                return False
    if gate_bias is None and up_bias is None and down_bias is None:
        return activation in ACTIVATIONS
    for bias, weight in ((gate_bias, up), (up_bias, up), (down_bias, down)):
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != dtype or bias.device != device):
            return False
    return activation in ACTIVATIONS


def _check(x, gate, up, down, gate_bias, up_bias, down_bias, activation, *scales):
    """The operator's own checks, for callers who do not go through `mlp`."""
    tensors = gate, up, down, gate_bias, up_bias, down_bias
    if _fits(x, *tensors, activation, *scales):
        return
    if activation not in ACTIVATIONS:
        raise KeyError(f"hf_fused_mlp.mlp: unknown activation {activation!r}; known are {', '.join(ACTIVATIONS)}")
    found = ", ".join(f"{list(t.shape)} {t.dtype} {t.device}" for t in (x, *tensors, *scales) if t is not None)
    raise ValueError(
        "hf_fused_mlp.mlp: expected x [..., H], gate and up [I, H], down [O, I], biases [I] or [O], "
        "all of one dtype and device, or weights in float8_e4m3fn with a scale for each block of 128 x 128; "
        f"got {found}"
    )


_ACTIVATION, _INVARIANT = 7, 11  # their places among the arguments


def _mlp_cpu(*arguments):
    operands = arguments[:_INVARIANT]
    _check(*operands)
    return mlp_ref(*operands)


def _mlp_cuda(x, *arguments):
    _check(x, *arguments[: _INVARIANT - 1])
    return on_gpu().mlp_cuda(x, MLPOperands.of(*arguments))


def _mlp_fake(x, gate, up, down, *rest):
    _check(x, gate, up, down, *rest[: _INVARIANT - 4])
    return x.new_empty((*x.shape[:-1], (up if down is None else down).shape[0]))


def _setup_context(ctx, inputs, output):
    ctx.activation = inputs[_ACTIVATION]
    ctx.save_for_backward(*inputs[:_ACTIVATION], *inputs[_ACTIVATION + 1 : _INVARIANT])


def _backward(ctx, grad):
    """Gradients of the reference, recomputed from the inputs, so that nothing of size `[M, I]` is kept for them.

    FP8 weights and scales get none, as in Transformers.
    """
    tensors = ctx.saved_tensors
    before, after = tensors[:_ACTIVATION], tensors[_ACTIVATION:]
    needed = [*ctx.needs_input_grad[:_ACTIVATION]]
    wanted = [i for i, tensor in enumerate(before) if needed[i] and tensor.dtype != FP8]
    if not wanted:
        return (None,) * (len(tensors) + 2)
    grads = gradients(lambda *before: mlp_ref(*before, ctx.activation, *after), before, wanted, grad)
    found = dict(zip(wanted, grads, strict=True))
    return *(found.get(i) for i in range(len(before))), None, *(None for _ in after), None


define(
    "mlp(Tensor x, Tensor? gate, Tensor up, Tensor? down, Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, "
    "str activation, Tensor? gate_scale=None, Tensor? up_scale=None, Tensor? down_scale=None, "
    "bool batch_invariant=False) -> Tensor",
    _mlp_cpu,
    _mlp_cuda,
    _mlp_fake,
    _backward,
    _setup_context,
)
