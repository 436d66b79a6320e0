"""The MLP equations in plain PyTorch: the oracle of every test, the CPU implementation, and the unfused plan.

It rounds where eager Transformers rounds (after each projection, after the activation, after the product).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.types import ABSENT, FP8, SCALE_BLOCK, ExpertsForm, Matrix


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
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """``down(act(gate(x)) * up(x))``; ``down(act(up(x)))`` if `gate` is None; without `down`, the input of down.

    Args:
        x: `[..., H]`, any float dtype.
        gate, up: `[I, H]`, adjacent in memory or not.
        down: `[O, I]`; `O` is `H` in every known model.
        gate_bias, up_bias: `[I]`; down_bias: `[O]`.
        activation: a key of `ACTIVATIONS`.
        gate_scale, up_scale, down_scale: of FP8 weights, which are dequantized; see `Matrix`.

    Returns:
        `[..., O]`, or `[..., I]` without `down`; dtype of `x`.

    Raises:
        KeyError: unknown activation.
    """
    scaled = (gate, gate_scale), (up, up_scale), (down, down_scale)
    gate, up, down = (t if s is None or t is None else dequantize(t, s, x.dtype) for t, s in scaled)  # type: ignore
    h = linear_ref(x, up, up_bias, gate, gate_bias, activation)
    return h if down is None else F.linear(h, down, down_bias)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies FP8 `weight` `[N, K]` by its `scale` (see `Matrix`), rounded to `dtype`."""
    rows, columns = weight.shape
    wide = torch.promote_types(dtype, torch.float32)
    factors = scale.to(wide).repeat_interleave(SCALE_BLOCK, 0)[:rows].repeat_interleave(SCALE_BLOCK, 1)[:, :columns]
    return (weight.to(wide) * factors).to(dtype)


def quantize_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` `[..., K]` in FP8, as Transformers quantizes the input of `FP8Linear`.

    Returns:
        e4m3 `[..., K]`, and fp32 `[..., ceil(K / 128)]`: a scale for each `SCALE_BLOCK` elements of a row, the last
        block of which may be shorter.
    """
    blocks = F.pad(x.float(), (0, -x.shape[-1] % SCALE_BLOCK)).unflatten(-1, (-1, SCALE_BLOCK))
    scale = blocks.abs().amax(-1) / torch.finfo(FP8).max
    scale = scale.where(scale != 0, 1)
    return (blocks / scale[..., None]).to(FP8).flatten(-2)[..., : x.shape[-1]], scale


def quantize_weight_ref(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` `[N, K]` in FP8, as Transformers quantizes it: e4m3 `[N, K]` and the scales of a `Matrix`, in fp32."""
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % SCALE_BLOCK, 0, -rows % SCALE_BLOCK))
    blocks = padded.unflatten(0, (-1, SCALE_BLOCK)).unflatten(2, (-1, SCALE_BLOCK))
    scale = blocks.abs().amax((1, 3)) / torch.finfo(FP8).max
    scale = scale.where(scale != 0, 1)
    data = (blocks / scale[:, None, :, None]).to(FP8)
    return data.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(), scale


def fp8_linear_ref(x: Tensor, weight: Matrix, gate: Matrix = ABSENT, activation: str = "identity") -> Tensor:
    """`linear_ref` of FP8 matrices, computed like Transformers' `FP8Linear`: both sides in FP8, and products in fp32.

    Args:
        x: `[..., K]`, any float dtype.
        weight, gate: `[N, K]`; the biases have the dtype of `x`.
        activation: a key of `ACTIVATIONS`.

    Returns:
        `[..., N]`, dtype of `x`.
    """
    data, scale = quantize_ref(x)
    rounded = data.float() * scale.repeat_interleave(SCALE_BLOCK, -1)[..., : x.shape[-1]]

    def product(matrix: Matrix) -> Tensor:
        data, scale, bias = matrix
        out = F.linear(rounded, dequantize(data, scale, torch.float32)).to(x.dtype)  # type: ignore[arg-type]
        return out if bias is None else out + bias

    activate = ACTIVATIONS[activation].function
    return activate(product(weight)) if gate.data is None else activate(product(gate)) * product(weight)


def experts_ref(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    form: ExpertsForm,
    up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """The sum over a token's experts of ``weight * down(act(gate(x)) * up(x))``, added in fp32 in their order.

    Args:
        x: `[M, H]`, any float dtype.
        ids: `[M, k]`, integers; those outside of `[0, E)` count as zero.
        weights: `[M, k]`, any float dtype.
        up, down: stacked as `form` says, biases as the columns of up and down: `[E, I]` or `[E, 2I]`, and `[E, H]`.
        up_scale, down_scale: of FP8 weights, which are dequantized; see `ExpertsOperands`.

    Returns:
        `[M, H]`, dtype of `x`.
    """

    def product(rows: Tensor, e: int, stack: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        weight = stack[e] if scale is None else dequantize(stack[e], scale[e], x.dtype)
        return F.linear(rows, weight if form.layout == "planes" else weight.T, None if bias is None else bias[e])

    return _sum_of_experts(
        x,
        ids,
        weights,
        up.shape[0],
        lambda rows, e: apply_gate(product(rows, e, up, up_scale, up_bias), form),
        lambda rows, e: product(rows, e, down, down_scale, down_bias),
    )


def fp8_experts_ref(x: Tensor, ids: Tensor, weights: Tensor, up: Matrix, down: Matrix, form: ExpertsForm) -> Tensor:
    """`experts_ref` of FP8 stacks, computed like Transformers' `FP8Experts`; see `fp8_linear_ref`."""

    def product(rows: Tensor, e: int, stack: Matrix) -> Tensor:
        return fp8_linear_ref(rows, Matrix(stack.data[e], stack.scale[e], None))  # type: ignore[index]

    first, second = (lambda rows, e: apply_gate(product(rows, e, up), form)), (lambda rows, e: product(rows, e, down))
    return _sum_of_experts(x, ids, weights, up.data.shape[0], first, second)


def _sum_of_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
    first: Callable[[Tensor, int], Tensor],
    second: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """The sum over a token's experts of ``weight * second(first(x, expert), expert)``."""
    sums = x.new_zeros((x.shape[0], x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))
    products = sums.new_zeros((*ids.shape, x.shape[1]))
    for e in ids.unique().tolist():
        if not 0 <= e < num_experts:
            continue
        token, place = torch.where(ids == e)
        out = second(first(x[token], e), e)
        products[token, place] = (out * weights[token, place, None]).to(products.dtype)
    for j in range(ids.shape[1]):
        sums += products[:, j]
    return sums.to(x.dtype)


def apply_gate(h: Tensor, form: ExpertsForm) -> Tensor:
    """``act(gate) * (up + up_offset)`` of `[M, 2I]`, or ``act(h)`` without a gate."""
    activate = ACTIVATIONS[form.activation].function
    if not form.gated:
        return activate(h)
    gate, up = (h[:, ::2], h[:, 1::2]) if form.layout == "interleaved" else h.chunk(2, dim=-1)
    if form.limit:
        gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    return activate(gate) * (up + form.up_offset if form.up_offset else up)
