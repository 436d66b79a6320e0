"""``out = act(x @ gate.T) * (x @ weight.T)`` for many tokens and FP8 weights, by the library's block-scaled GEMM.

Without a gate, ``out = act(x @ weight.T)``. Picked on Hopper from more than 64 tokens on, for the up and the down
launch. x is quantized with a scale for each 128 elements of a row; one GEMM multiplies with gate and up, if they are
one block of memory; one kernel adds biases, activates, multiplies and, if down comes next, quantizes.
Launches: 2 or 3 besides the GEMMs for a whole MLP. Bytes: what the GEMMs read and write, and their operands once more.
Source: PyTorch's `torch._scaled_mm`, which is cuBLAS's GEMM with 1 x 128 and 128 x 128 blocks.
"""

from typing import Any

import torch
from torch import Tensor

from hf_fused_mlp.kernels._fp8 import why_not_fp8
from hf_fused_mlp.kernels._launch import Linear, kept_by_address
from hf_fused_mlp.kernels._quantize import activation, quantize_rows
from hf_fused_mlp.types import SCALE_BLOCK, LinearCall, LinearKey, TileConfig
from hf_fused_mlp.weights.packing import as_one, borrowed, is_packed

SCALES_MULTIPLE = 4  # cuBLAS reads a weight's scales by rows of so many, which checkpoints do not pad


def supports(key: LinearKey) -> str | None:
    """Why the kernel cannot or should not run `key`, or None."""
    if key.dtype != torch.bfloat16:
        return f"made for bf16, not {key.dtype}"
    if key.gpu.capability != (9, 0) or not library_has_it():
        return "the library's block-scaled GEMM needs Hopper, and a PyTorch of CUDA 12.9 or later"
    if key.k % (SCALES_MULTIPLE * SCALE_BLOCK) or key.n % SCALE_BLOCK:
        return f"the block-scaled GEMM needs whole blocks of scales, four at a time, not {key.n} x {key.k}"
    return why_not_fp8(key.storage)


def library_has_it() -> bool:
    """Whether PyTorch's cuBLAS multiplies by scales of blocks."""
    return tuple(map(int, (torch.version.cuda or "0").split(".")))[:2] >= (12, 9)


def candidates(key: LinearKey) -> list[TileConfig]:
    """There is nothing to choose; for few tokens the other kernels are faster."""
    return [TileConfig("fp8_gemm")] if key.m >= 32 else []


def scaled_mm(data: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """``x @ weight`` in bf16, `[rows, N]`, of x as `data` `[rows, K]` and `scale` `[K / 128, rows]`.

    Of the weight, `transposed` gives what the library reads.
    """
    return torch._scaled_mm(data, weight, scale_a=scale.t(), scale_b=weight_scale, out_dtype=torch.bfloat16)


def transposed(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as `[K, N]` and its scales, as views that borrow memory."""
    return borrowed(weight).t(), borrowed(scale).t()


def fp8_gemm(call: LinearCall, config: TileConfig) -> Linear:
    """The launches of the equation above; nothing of `config` is read."""
    M, N = call.m, call.n
    quantize = quantize_rows(call)
    # of gate and up in one product `[rows, 2N]`, or in one each
    finish_wide, finish = (activation(call, N, width, call.activation, call.gives_fp8) for width in (2 * N, N))
    kept, block_of = kept_by_address(transposed), kept_by_address(_as_block)

    def read(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        if scale.dtype is torch.float32:
            return kept(weight, scale)
        return weight.t(), scale.float().t()  # not kept, because a copy does not follow its scales

    is_bare = not call.gated and call.activation == "identity" and not call.gives_fp8

    def run(x: Any, weight, gate):
        (weight, scale, bias), (gate, gate_scale, gate_bias) = weight, gate
        data, factors = x if call.reads_fp8 else quantize(x)
        if is_bare:
            out = scaled_mm(data, factors, *read(weight, scale))
            if len(out) != M:
                out = out[:M]
            if bias is not None:
                out += bias
            return out if call.lead == (M,) else out.view(*call.lead, N)
        if gate is None:
            return finish(scaled_mm(data, factors, *read(weight, scale)), bias, None, None)
        if (block := block_of(weight, scale, gate, gate_scale)) is not None:
            both = scaled_mm(data, factors, *read(*block))
            return finish_wide(both[:, N:], bias, both[:, :N], gate_bias)
        gate = scaled_mm(data, factors, *read(gate, gate_scale))
        return finish(scaled_mm(data, factors, *read(weight, scale)), bias, gate, gate_bias)

    return run


def _as_block(weight: Tensor, scale: Tensor, gate: Tensor, gate_scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """Gate and weight as one matrix, with its scales; None if they are not in one block of memory."""
    one = is_packed(gate, weight) and is_packed(gate_scale, scale)
    return (as_one(gate, weight), as_one(gate_scale, scale)) if one else None
