"""The operator of an MLP's product, ``act(gate) * up``, for MLPs whose projections must be called."""

import torch
from torch import Tensor

from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.modes import no_kernels
from hf_fused_mlp.ops.library import define, gradients, on_gpu
from hf_fused_mlp.reference import act_mul_ref


def act_mul(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``act(gate) * up``; only `gate` and `up` are kept for the gradients.

    Args:
        gate, up: `[..., I]`, one shape, dtype and device; any strides.
        activation: a key of `hf_fused_mlp.activations.ACTIVATIONS`.

    Returns:
        `[..., I]`, dtype of `gate`, contiguous. Differentiable in both, and again.

    Raises:
        ValueError: shapes, dtypes or devices that differ.
        KeyError: unknown activation.
    """
    return torch.ops.hf_fused_mlp.act_mul(gate, up, activation)


def _check_alike(activation, first, *others):
    if activation not in ACTIVATIONS:
        raise KeyError(f"hf_fused_mlp.act_mul: unknown activation {activation!r}; known are {', '.join(ACTIVATIONS)}")
    if any(t.shape != first.shape or t.dtype != first.dtype or t.device != first.device for t in others):
        found = ", ".join(f"{list(t.shape)} {t.dtype} {t.device}" for t in (first, *others))
        raise ValueError(f"hf_fused_mlp.act_mul: expected tensors of one shape, dtype and device; got {found}")


def _act_mul_cpu(gate, up, activation):
    _check_alike(activation, gate, up)
    return act_mul_ref(gate, up, activation).contiguous()


def _act_mul_cuda(gate, up, activation):
    if not has_kernel(gate):
        return _act_mul_cpu(gate, up, activation)
    _check_alike(activation, gate, up)
    return on_gpu().act_mul_cuda(gate, up, activation)


def has_kernel(tensor: Tensor) -> bool:
    """True if `act_mul` has a kernel for such a tensor on a GPU; PyTorch's operations compute the others."""
    fp32_is_enough = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32)
    has_rows = tensor.numel() > 0 and tensor.dim() > 0
    return fp32_is_enough and has_rows and no_kernels(tensor.device, tensor.dtype) is None


def _act_mul_fake(gate, up, activation):
    _check_alike(activation, gate, up)
    return gate.new_empty(gate.shape)


def _act_mul_setup(ctx, inputs, output):
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _act_mul_backward(ctx, grad):
    gate, up = ctx.saved_tensors
    if torch.is_grad_enabled():  # the gradients must be differentiable
        return *_act_mul_vjp(grad, gate, up, ctx.activation), None
    return *torch.ops.hf_fused_mlp.act_mul_backward(grad, gate, up, ctx.activation), None


def _act_mul_vjp(grad, gate, up, activation):
    return gradients(lambda gate, up: act_mul_ref(gate, up, activation), (gate, up), (0, 1), grad)


def _act_mul_backward_cpu(grad, gate, up, activation):
    _check_alike(activation, grad, gate, up)
    return tuple(gradient.contiguous() for gradient in _act_mul_vjp(grad, gate, up, activation))


def _act_mul_backward_cuda(grad, gate, up, activation):
    if not has_kernel(gate):
        return _act_mul_backward_cpu(grad, gate, up, activation)
    _check_alike(activation, grad, gate, up)
    return on_gpu().act_mul_backward_cuda(grad, gate, up, activation)


def _act_mul_backward_fake(grad, gate, up, activation):
    _check_alike(activation, grad, gate, up)
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


define(
    "act_mul(Tensor gate, Tensor up, str activation) -> Tensor",
    _act_mul_cpu,
    _act_mul_cuda,
    _act_mul_fake,
    _act_mul_backward,
    _act_mul_setup,
)
define(
    "act_mul_backward(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    _act_mul_backward_cpu,
    _act_mul_backward_cuda,
    _act_mul_backward_fake,
)
