"""The operator `torch.ops.hf_fused_mlp.mlp`: one MLP, on CUDA by the planned kernels, elsewhere by the reference.

Being an operator, it is one node to `torch.compile` and `torch.export`, with shapes known without running it.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.reference import mlp_ref

_LIBRARY = torch.library.Library("hf_fused_mlp", "DEF")
_LIBRARY.define(
    "mlp(Tensor x, Tensor? gate, Tensor up, Tensor down, Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, "
    "str activation) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)


def mlp(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where `gate` is None.

    Args:
        x: `[..., H]`, float; any strides, any number of tokens, none included.
        gate, up: `[I, H]`; adjacent in memory (`hf_fused_mlp.weights.pack`) for the fastest prefill.
        down: `[O, I]`.
        gate_bias, up_bias: `[I]`; down_bias: `[O]`.
        activation: a key of `hf_fused_mlp.activations.ACTIVATIONS`.

    Returns:
        `[..., O]`, dtype of `x`, contiguous. Differentiable in all tensors.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.
        KeyError: unknown activation.
    """
    call = _mlp_cuda if _runs_now(x) else torch.ops.hf_fused_mlp.mlp
    return call(x, gate, up, down, gate_bias, up_bias, down_bias, activation)


def _runs_now(x: Tensor) -> bool:
    """Whether nothing but the result is wanted of this call: no graph, no trace, no gradient, on a GPU.

    Then it need not go through PyTorch's dispatcher, which costs as much of the host's time as a launch.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.is_cuda
        and not torch.is_grad_enabled()
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and not is_transformed()
    )


def is_transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work; the operator has rules for neither."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _check(x, gate, up, down, gate_bias, up_bias, down_bias, activation):
    """The operator's own guard: a kernel given tensors that do not fit would read whatever lies behind them."""
    if activation not in ACTIVATIONS:
        raise KeyError(f"hf_fused_mlp.mlp: unknown activation {activation!r}; known are {', '.join(ACTIVATIONS)}")
    dtype, device, shape = x.dtype, x.device, up.shape
    fits = (
        x.dim() > 0
        and len(shape) == down.dim() == 2
        and x.shape[-1] == shape[1]
        and down.shape[1] == shape[0]
        and (gate is not None or gate_bias is None)
    )
    for tensor, expected in (
        (up, shape),
        (down, down.shape),
        (gate, shape),
        (gate_bias, shape[:1]),
        (up_bias, shape[:1]),
        (down_bias, down.shape[:1]),
    ):
        if tensor is not None:
            fits = fits and tensor.shape == expected and tensor.dtype == dtype and tensor.device == device
    if not fits:
        tensors = (x, gate, up, down, gate_bias, up_bias, down_bias)
        found = ", ".join(f"{list(t.shape)} {t.dtype} {t.device}" for t in tensors if t is not None)
        raise ValueError(
            "hf_fused_mlp.mlp: expected x [..., H], gate and up [I, H], down [O, I], biases [I] or [O], "
            f"all of one dtype and device; got {found}"
        )


def _mlp_cpu(*operands):
    _check(*operands)
    return mlp_ref(*operands)


def _mlp_cuda(*operands):
    from hf_fused_mlp.dispatch import mlp_cuda  # imports Triton, so not before it is needed

    _check(*operands)
    return mlp_cuda(*operands)


def _mlp_fake(x, gate, up, down, gate_bias, up_bias, down_bias, activation):
    _check(x, gate, up, down, gate_bias, up_bias, down_bias, activation)
    return x.new_empty((*x.shape[:-1], down.shape[0]))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    """Gradients of the reference, recomputed from the inputs: nothing of size `[M, I]` is kept between the passes."""
    tensors = dict(enumerate(ctx.saved_tensors))
    wanted = {i: tensors[i] for i in tensors if ctx.needs_input_grad[i]}

    def forward(leaves):
        return mlp_ref(*(tensors | leaves).values(), ctx.activation)

    # the forward was not under autocast, so its recomputation must not be
    with torch.autocast(grad.device.type, enabled=False):
        _, vjp = torch.func.vjp(forward, wanted)
        (grads,) = vjp(grad)
    return *(grads.get(i) for i in tensors), None


_LIBRARY.impl("mlp", _mlp_cpu, "CPU")
_LIBRARY.impl("mlp", _mlp_cuda, "CUDA")
torch.library.register_fake("hf_fused_mlp::mlp", _mlp_fake, lib=_LIBRARY)
torch.library.register_autograd("hf_fused_mlp::mlp", _backward, setup_context=_setup_context, lib=_LIBRARY)
