"""``out = act(x @ gate.T) * (x @ weight.T)`` for many tokens and FP8 weights, by the library's block-scaled GEMM.

Without a gate, ``out = act(x @ weight.T)``. Picked on Hopper from more than 64 tokens on, for the up and the down
launch. x is quantized with a scale for each 128 elements of a row; one GEMM multiplies with gate and up, if they are
one block of memory; one kernel adds biases, activates, multiplies and, if down comes next, quantizes.
Launches: 2 or 3 besides the GEMMs for a whole MLP. Bytes: what the GEMMs read and write, and their operands once more.
Source: PyTorch's `torch._scaled_mm`, which is cuBLAS's GEMM with 1 x 128 and 128 x 128 blocks.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from hf_fused_mlp.kernels._common import activate
from hf_fused_mlp.kernels._fp8 import why_not_fp8
from hf_fused_mlp.kernels._launch import Linear, allocator, launcher
from hf_fused_mlp.types import FP8, GPU, SCALE_BLOCK, LinearCall, LinearKey, TileConfig
from hf_fused_mlp.weights.packing import as_one, is_packed

ROW_MULTIPLE = 16  # of the rows in a GEMM's operands and scales
SCALES_MULTIPLE = 4  # cuBLAS reads a weight's scales by rows of so many, which checkpoints do not pad
BLOCKS = 8  # of scales in a program of the kernel


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


@triton.jit(do_not_specialize=["ROWS"])
def _activate_kernel(
    up_ptr,
    bias_ptr,
    gate_ptr,
    gate_bias_ptr,
    out_ptr,
    scale_ptr,
    N,
    ROWS,
    stride_up,
    ACTIVATION: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SHORT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``act(gate + gate_bias) * (up + bias)``, some blocks of one row, into `[M, N]`.

    Quantized if there is a `scale_ptr`, fp32 `[N / SCALE_BLOCK, ROWS]`, `ROWS` being at least M.
    """
    row = tl.program_id(0).to(tl.int64)
    offs_s = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    offs_n = offs_s[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :]
    mask_s, mask_n = offs_s * SCALE_BLOCK < N, offs_n < N
    if OVERLAP:
        gdc_launch_dependents()
    out = tl.load(up_ptr + row * stride_up + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + row * stride_up + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if gate_bias_ptr is not None:
            gate += tl.load(gate_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        out = activate(gate, ACTIVATION, SHORT) * out
    else:
        out = activate(out, ACTIVATION, SHORT)
    if scale_ptr is not None:
        scale = tl.max(tl.abs(out), 1) / 448.0
        scale = tl.where(scale == 0, 1.0, scale)
        out = out / scale[:, None]
        tl.store(scale_ptr + offs_s.to(tl.int64) * ROWS + row, scale, mask=mask_s)
    tl.store(out_ptr + row * N + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask_n)


def scaled_mm(data: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """``x @ weight.T`` in bf16, `[rows, N]`, of x as `data` `[rows, K]` and `scale` `[K / 128, rows]`."""
    return torch._scaled_mm(
        data, weight.t(), scale_a=scale.t(), scale_b=weight_scale.float().t(), out_dtype=torch.bfloat16
    )


def fp8_gemm(call: LinearCall, config: TileConfig) -> Linear:
    """The launches of the equation above; nothing of `config` is read."""
    M, N = call.m, call.n
    quantize = _activation(call, call.k, call.stride_xm, "identity", True)
    # of gate and up in one product `[rows, 2N]`, or in one each
    finish_wide, finish = (_activation(call, N, width, call.activation, call.gives_fp8) for width in (2 * N, N))
    is_bare = not call.gated and call.activation == "identity" and not call.gives_fp8
    blocks: dict[tuple[int, ...], tuple[Tensor, Tensor] | None] = {}

    def block_of(weight, scale, gate, gate_scale):
        """Gate and up as one matrix, or None if they are not; a view, kept by all addresses that it rests on."""
        addresses = gate.data_ptr(), weight.data_ptr(), gate_scale.data_ptr(), scale.data_ptr()
        if addresses not in blocks:
            if len(blocks) >= 4096:
                blocks.clear()
            one = is_packed(gate, weight) and is_packed(gate_scale, scale)
            blocks[addresses] = (as_one(gate, weight), as_one(gate_scale, scale)) if one else None
        return blocks[addresses]

    def run(x: Any, weight, gate):
        (weight, scale, bias), (gate, gate_scale, gate_bias) = weight, gate
        data, factors = x if call.reads_fp8 else quantize(x, None, None, None)
        if is_bare:
            out = scaled_mm(data, factors, weight, scale)[:M]
            if bias is not None:
                out += bias
            return out.view(*call.lead, N)
        if gate is None:
            return finish(scaled_mm(data, factors, weight, scale), bias, None, None)
        if (block := block_of(weight, scale, gate, gate_scale)) is not None:
            both = scaled_mm(data, factors, *block)
            return finish_wide(both[:, N:], bias, both[:, :N], gate_bias)
        gate = scaled_mm(data, factors, gate, gate_scale)
        return finish(scaled_mm(data, factors, weight, scale), bias, gate, gate_bias)

    return run


def _activation(call: LinearCall, n: int, stride: int, activation: str, quantized: bool):
    """The launch of `_activate_kernel`: a function of up, its bias, gate and its bias.

    It gives `[*lead, n]`, or if `quantized` the operands of `scaled_mm`, the rows of which are padded.
    """
    rows = -(-call.m // ROW_MULTIPLE) * ROW_MULTIPLE
    gpu = GPU.of(call.device)
    launch = launcher(
        _activate_kernel,
        call.device,
        (call.m, -(-n // (BLOCKS * SCALE_BLOCK)), 1),
        (n, rows, stride, activation, SCALE_BLOCK, BLOCKS, gpu.is_nvidia, gpu.can_overlap),
        num_warps=4,
    )
    if not quantized:
        empty = allocator((*call.lead, n), call.dtype, call.device)

        def run(up, bias, gate, gate_bias):
            out = empty()
            launch((up, bias, gate, gate_bias, out, None))
            return out

        return run
    empty_data = allocator((rows, n), FP8, call.device)
    empty_scale = allocator((n // SCALE_BLOCK, rows), torch.float32, call.device)

    def run_quantized(up, bias, gate, gate_bias):
        data, scale = empty_data(), empty_scale()
        launch((up, bias, gate, gate_bias, data, scale))
        return data, scale

    return run_quantized
