"""The operator of a whole MLP; kernels on CUDA, PyTorch's operations elsewhere."""

import torch
from torch import Tensor

from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.modes import runs_now
from hf_fused_mlp.ops.library import define, gradients, on_gpu
from hf_fused_mlp.reference import mlp_ref
from hf_fused_mlp.types import MLPOperands


def mlp(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` if `gate` is None.

    Args:
        x: `[..., H]`, float; any strides, any number of tokens, none included.
        gate, up: `[I, H]`; adjacent in memory (`hf_fused_mlp.weights.pack`) for the fastest prefill.
        down: `[O, I]`; None for the hidden activation, the input of down.
        gate_bias, up_bias: `[I]`; down_bias: `[O]`.
        activation: a key of `hf_fused_mlp.activations.ACTIVATIONS`.

    Returns:
        `[..., O]`, or `[..., I]` without `down`; dtype of `x`, contiguous. Differentiable in all tensors.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        KeyError: unknown activation.
    """
    operands = gate, up, down, gate_bias, up_bias, down_bias, activation
    if (out := mlp_if_fits(x, MLPOperands.of(*operands))) is None:
        _check(x, *operands)
    return out


def mlp_if_fits(x: Tensor, operands: MLPOperands) -> Tensor | None:
    """`mlp`, or None if that would raise."""
    flat = operands.flat()
    if not _fits(x, *flat):
        return None
    return on_gpu().mlp_cuda(x, operands) if runs_now(x) else torch.ops.hf_fused_mlp.mlp(x, *flat)


def _fits(x, gate, up, down, gate_bias, up_bias, down_bias, activation) -> bool:
    """True if the tensors fit together; otherwise a kernel would read beyond them."""
    dtype, device, shape, dim = x.dtype, x.device, up.shape, x.dim()
    if len(shape) != 2 or dim == 0 or x.shape[-1] != shape[1] or up.dtype != dtype or up.device != device:
        return False
    if gate is not None:
        if gate.shape != shape or gate.dtype != dtype or gate.device != device:
            return False
    elif gate_bias is not None:
        return False
    if down is not None:
        if down.dim() != 2 or down.shape[1] != shape[0] or down.dtype != dtype or down.device != device:
            return False
    elif down_bias is not None:
        return False
    if gate_bias is None and up_bias is None and down_bias is None:
        return activation in ACTIVATIONS
    for bias, weight in ((gate_bias, up), (up_bias, up), (down_bias, down)):
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != dtype or bias.device != device):
            return False
    return activation in ACTIVATIONS


def _check(*operands):
    """The operator's own checks, for callers who do not go through `mlp`."""
    if _fits(*operands):
        return
    *tensors, activation = operands
    if activation not in ACTIVATIONS:
        raise KeyError(f"hf_fused_mlp.mlp: unknown activation {activation!r}; known are {', '.join(ACTIVATIONS)}")
    found = ", ".join(f"{list(t.shape)} {t.dtype} {t.device}" for t in tensors if t is not None)
    raise ValueError(
        "hf_fused_mlp.mlp: expected x [..., H], gate and up [I, H], down [O, I], biases [I] or [O], "
        f"all of one dtype and device; got {found}"
    )


def _mlp_cpu(*operands):
    _check(*operands)
    return mlp_ref(*operands)


def _mlp_cuda(x, *operands):
    _check(x, *operands)
    return on_gpu().mlp_cuda(x, MLPOperands.of(*operands))


def _mlp_fake(x, gate, up, down, gate_bias, up_bias, down_bias, activation):
    _check(x, gate, up, down, gate_bias, up_bias, down_bias, activation)
    return x.new_empty((*x.shape[:-1], (up if down is None else down).shape[0]))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    """Gradients of the reference, recomputed from the inputs, so that nothing of size `[M, I]` is kept for them."""
    tensors = ctx.saved_tensors
    wanted = [i for i in range(len(tensors)) if ctx.needs_input_grad[i]]
    grads = gradients(lambda *tensors: mlp_ref(*tensors, ctx.activation), tensors, wanted, grad)
    found = dict(zip(wanted, grads, strict=True))
    return *(found.get(i) for i in range(len(tensors))), None


define(
    "mlp(Tensor x, Tensor? gate, Tensor up, Tensor? down, Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, "
    "str activation) -> Tensor",
    _mlp_cpu,
    _mlp_cuda,
    _mlp_fake,
    _backward,
    _setup_context,
)
