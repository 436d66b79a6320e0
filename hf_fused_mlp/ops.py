"""The operators `torch.ops.hf_fused_mlp.*`: a whole MLP, or its activation and product; kernels on CUDA only.

Being operators, they are one node to `torch.compile` and `torch.export`, with shapes known without running them.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.reference import act_mul_ref, mlp_ref
from hf_fused_mlp.types import GPU

HAS_TRITON = find_spec("triton") is not None

_LIBRARY = torch.library.Library("hf_fused_mlp", "DEF")
for _schema in (
    "mlp(Tensor x, Tensor? gate, Tensor up, Tensor? down, Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, "
    "str activation) -> Tensor",
    "act_mul(Tensor gate, Tensor up, str activation) -> Tensor",
    "act_mul_backward(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))


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
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where `gate` is None; without `down`, what it is given.

    Args:
        x: `[..., H]`, float; any strides, any number of tokens, none included.
        gate, up: `[I, H]`; adjacent in memory (`hf_fused_mlp.weights.pack`) for the fastest prefill.
        down: `[O, I]`.
        gate_bias, up_bias: `[I]`; down_bias: `[O]`.
        activation: a key of `hf_fused_mlp.activations.ACTIVATIONS`.

    Returns:
        `[..., O]`, or `[..., I]` without `down`; dtype of `x`, contiguous. Differentiable in all tensors.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.
        KeyError: unknown activation.
    """
    operands = gate, up, down, gate_bias, up_bias, down_bias, activation
    if (out := mlp_if_fits(x, *operands)) is None:
        _check(x, *operands)
    return out


def mlp_if_fits(x: Tensor, *operands: Tensor | str | None) -> Tensor | None:
    """`mlp`, or None where that would raise."""
    if not _fits(x, *operands):
        return None
    call = on_gpu().mlp_cuda if runs_now(x) else torch.ops.hf_fused_mlp.mlp
    return call(x, *operands)


def only_results(x: Tensor) -> bool:
    """Whether nothing but the result is wanted of a call with `x`, as far as `memory.answer` does not see it.

    It sees what changes the dispatch keys of tensors, such as traces and autocast.
    """
    return (
        type(x) is Tensor
        and not x.is_nested
        and not torch.is_grad_enabled()
        and _len_torch_dispatch_stack() == 0
        and (_len_torch_function_stack() == 0 or not is_watched())
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def runs_now(x: Tensor) -> bool:
    """Whether nothing but the result is wanted of this call: no graph, no trace, no gradient, no cast, on a GPU.

    Then it need not go through PyTorch's dispatcher, which costs as much of the host's time as a launch.
    """
    return (
        not torch.compiler.is_compiling()
        and only_results(x)
        and x.is_cuda
        and x.layout is torch.strided
        and not x.is_neg()
        and torch._C._get_tracing_state() is None
        and not torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
        and not torch._C._is_any_autocast_enabled()
    )


def is_watched() -> bool:
    """Whether a `TorchFunctionMode` is given each function that is called, other than `with torch.device(...)`."""
    modes = torch._C._len_torch_function_stack()
    # that one is always the lowest, and there for good after `torch.set_default_device`
    return modes > 1 or (modes == 1 and type(torch._C._get_function_stack_at(0)) is not DeviceContext)


def is_transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work; the operator has rules for neither."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _fits(x, gate, up, down, gate_bias, up_bias, down_bias, activation) -> bool:
    """Whether tensors go together: a kernel given others would read whatever lies behind them."""
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
    """The operator's own guard, for whoever calls it without `mlp`."""
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


@cache
def on_gpu():
    """The module `dispatch`."""
    from hf_fused_mlp import dispatch  # imports Triton, so not before it is needed

    return dispatch


def _mlp_cpu(*operands):
    _check(*operands)
    return mlp_ref(*operands)


def _mlp_cuda(*operands):
    _check(*operands)
    return on_gpu().mlp_cuda(*operands)


def _mlp_fake(x, gate, up, down, gate_bias, up_bias, down_bias, activation):
    _check(x, gate, up, down, gate_bias, up_bias, down_bias, activation)
    return x.new_empty((*x.shape[:-1], (up if down is None else down).shape[0]))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    """Gradients of the reference, recomputed from the inputs: nothing of size `[M, I]` is kept between the passes."""
    tensors = ctx.saved_tensors
    wanted = [i for i in range(len(tensors)) if ctx.needs_input_grad[i]]
    grads = _gradients(lambda *tensors: mlp_ref(*tensors, ctx.activation), tensors, wanted, grad)
    found = dict(zip(wanted, grads, strict=True))
    return *(found.get(i) for i in range(len(tensors))), None


def _gradients(function, tensors, wanted, grad):
    """Those of the `wanted` tensors, of which gradients can be taken again in a backward that creates a graph.

    By autograd rather than `torch.func`, which does not allow hooks on saved tensors.
    """
    again, inputs = torch.is_grad_enabled(), list(tensors)
    # the forward was not under autocast, so its recomputation must not be
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        for i in wanted:
            inputs[i] = inputs[i].view_as(inputs[i]) if again else inputs[i].detach().requires_grad_()
        return torch.autograd.grad(function(*inputs), [inputs[i] for i in wanted], grad, create_graph=again)


def act_mul(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``act(gate) * up``; what has to be kept for the gradients is `gate` and `up`.

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
    """Whether `act_mul` has one for such a tensor, on a GPU; PyTorch's own operations serve for the others."""
    fp32_is_enough = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return fp32_is_enough and tensor.numel() > 0 and tensor.dim() > 0 and GPU.of(tensor.device).capability >= (8, 0)


def _act_mul_fake(gate, up, activation):
    _check_alike(activation, gate, up)
    return gate.new_empty(gate.shape)


def _act_mul_setup(ctx, inputs, output):
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _act_mul_backward(ctx, grad):
    gate, up = ctx.saved_tensors
    if torch.is_grad_enabled():  # of the gradients, gradients are wanted too
        return *_act_mul_vjp(grad, gate, up, ctx.activation), None
    return *torch.ops.hf_fused_mlp.act_mul_backward(grad, gate, up, ctx.activation), None


def _act_mul_vjp(grad, gate, up, activation):
    return _gradients(lambda gate, up: act_mul_ref(gate, up, activation), (gate, up), (0, 1), grad)


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


for _name, _cpu, _cuda, _fake in (
    ("mlp", _mlp_cpu, _mlp_cuda, _mlp_fake),
    ("act_mul", _act_mul_cpu, _act_mul_cuda, _act_mul_fake),
    ("act_mul_backward", _act_mul_backward_cpu, _act_mul_backward_cuda, _act_mul_backward_fake),
):
    _LIBRARY.impl(_name, _cpu, "CPU")
    _LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"hf_fused_mlp::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("hf_fused_mlp::mlp", _backward, setup_context=_setup_context, lib=_LIBRARY)
torch.library.register_autograd("hf_fused_mlp::act_mul", _act_mul_backward, setup_context=_act_mul_setup, lib=_LIBRARY)
