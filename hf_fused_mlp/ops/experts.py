"""The operator of routed experts; kernels on CUDA, PyTorch's operations elsewhere. It has no gradients."""

import torch
from torch import Tensor

from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.modes import runs_now
from hf_fused_mlp.ops.library import define, on_gpu
from hf_fused_mlp.reference import experts_ref
from hf_fused_mlp.types import FP8, SCALE_BLOCK, ExpertsForm, ExpertsOperands, has_block_scales

LAYOUTS = "planes", "transposed", "interleaved"
DTYPES = torch.float16, torch.bfloat16, torch.float32


def experts(x: Tensor, ids: Tensor, weights: Tensor, operands: ExpertsOperands) -> Tensor:
    """The sum over a token's experts of ``weight * down(act(gate(x)) * up(x))``. The host does not wait for anything.

    Args:
        x: `[M, H]`, fp16, bf16 or fp32; any number of tokens, including none.
        ids: `[M, k]`, int32 or int64; an id outside of `[0, E)` counts as zero.
        weights: `[M, k]`, float.

    Returns:
        `[M, H]`, dtype of `x`, contiguous, new memory.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    if (out := experts_if_fits(x, ids, weights, operands)) is None:
        _check(x, ids, weights, *operands)
    return out


def experts_if_fits(x: Tensor, ids: Tensor, weights: Tensor, operands: ExpertsOperands) -> Tensor | None:
    """`experts`, or None if that would raise."""
    if not _fits(x, ids, weights, *operands):
        return None
    if runs_now(x):
        return on_gpu().experts_cuda(x, ids, weights, operands)
    up, down, up_bias, down_bias, form, *scales = operands
    # one by one: torch 2.11's compiler cannot unpack a form that was read outside of compiled code
    what = form.layout, form.gated, form.activation, form.limit, form.up_offset
    return torch.ops.hf_fused_mlp.experts(x, ids, weights, up, down, up_bias, down_bias, *what, *scales)


def _fits(x, ids, weights, up, down, up_bias, down_bias, form: ExpertsForm, up_scale=None, down_scale=None) -> bool:
    """True if the tensors fit together; otherwise a kernel would read beyond them."""
    return (
        x.dim() == ids.dim() == 2
        and ids.shape[1] > 0
        and stacks_fit(up, down, up_bias, down_bias, form, up_scale, down_scale)
        and x.shape[1] == up.shape[2 if form.layout == "planes" else 1]
        and (x.dtype == up.dtype if up_scale is None else x.dtype in DTYPES)
        and ids.shape == weights.shape
        and ids.shape[0] == x.shape[0]
        and ids.dtype in (torch.int32, torch.int64)
        and weights.is_floating_point()
        and ids.device == weights.device == x.device == up.device
    )


def stacks_fit(up, down, up_bias, down_bias, form: ExpertsForm, up_scale=None, down_scale=None) -> bool:
    """True if the weights fit together."""
    if up.dim() != 3 or down.dim() != 3:
        return False
    width, hidden = (up.shape[1], up.shape[2]) if form.layout == "planes" else (up.shape[2], up.shape[1])
    out, intermediate = (down.shape[1], down.shape[2]) if form.layout == "planes" else (down.shape[2], down.shape[1])
    given = [tensor for tensor in (down, up_bias, down_bias) if tensor is not None]
    return (
        form.layout in LAYOUTS
        and form.activation in ACTIVATIONS
        and (up.dtype in DTYPES if up_scale is None else up.dtype == FP8)
        and hidden == out
        and width == (2 if form.gated else 1) * intermediate
        and up.shape[0] == down.shape[0] > 0
        and all(tensor.dtype == up.dtype and tensor.device == up.device for tensor in given)
        and (up_bias is None or up_bias.shape == (up.shape[0], width))
        and (down_bias is None or down_bias.shape == (up.shape[0], out))
        and (down_scale is None if up_scale is None else _scales_fit(up, down, form, up_scale, down_scale))
        and (up_scale is None or up_bias is down_bias is None)
    )


def _scales_fit(up, down, form: ExpertsForm, up_scale, down_scale) -> bool:
    return (
        form.layout == "planes"
        and not (form.gated and share_scales(up))
        and has_block_scales(up, up_scale)
        and has_block_scales(down, down_scale)
    )


def share_scales(up: Tensor) -> bool:
    """True if, in `[E, 2I, H]`, the last rows of gate and the first rows of up are in one block of scales."""
    return up.shape[1] % (2 * SCALE_BLOCK) != 0


def _check(x, ids, weights, up, down, up_bias, down_bias, form, *scales):
    if _fits(x, ids, weights, up, down, up_bias, down_bias, form, *scales):
        return
    tensors = x, ids, weights, up, down, up_bias, down_bias, *scales
    found = ", ".join(f"{list(t.shape)} {t.dtype} {t.device}" for t in tensors if t is not None)
    raise ValueError(
        "hf_fused_mlp.experts: expected x [M, H], ids and weights [M, k], and stacks of up and down that fit, of one "
        f"dtype of fp16, bf16 and fp32, or FP8 with scales; got {found} as {form}"
    )


def _experts_cpu(*arguments):
    operands = _with_form(*arguments)
    _check(*operands)
    return experts_ref(*operands)


def _experts_cuda(*arguments):
    x, ids, weights, *operands = _with_form(*arguments)
    _check(x, ids, weights, *operands)
    return on_gpu().experts_cuda(x, ids, weights, ExpertsOperands(*operands))


def _experts_fake(*arguments):
    x, *rest = _with_form(*arguments)
    _check(x, *rest)
    return x.new_empty(x.shape)


def _with_form(*arguments):
    """The arguments of the operator, with the five non-tensors as one `ExpertsForm`; scales may be left out."""
    return *arguments[:7], ExpertsForm(*arguments[7:12]), *arguments[12:]


define(
    "experts(Tensor x, Tensor ids, Tensor weights, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, "
    "str layout, bool gated, str activation, float limit, float up_offset, Tensor? up_scale=None, "
    "Tensor? down_scale=None) -> Tensor",
    _experts_cpu,
    _experts_cuda,
    _experts_fake,
)
