"""One kernel between two products: biases, activation, the product with the gate, and if FP8 comes next its scales.

With neither bias, gate nor activation it quantizes rows of floats.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fused_mlp.kernels._common import activate
from hf_fused_mlp.kernels._fp8 import LARGEST, scaled_to
from hf_fused_mlp.kernels._launch import allocator, launcher
from hf_fused_mlp.types import FP8, GPU, SCALE_BLOCK, LinearCall, scale_blocks

ROW_MULTIPLE = 16  # quantized rows are padded to it, since PyTorch's block-scaled GEMM wants that
BLOCKS = 8  # of scales in a program


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
    LARGEST: tl.constexpr,
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
        gdc_wait()
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
        out, scale = scaled_to(out, LARGEST)
        tl.store(scale_ptr + offs_s.to(tl.int64) * ROWS + row, scale, mask=mask_s)
    tl.store(out_ptr + row * N + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask_n)


def padded(m: int) -> int:
    """The rows of m tokens, quantized."""
    return -(-m // ROW_MULTIPLE) * ROW_MULTIPLE


def quantize_rows(call: LinearCall) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The launch that quantizes x of `call`, each row by blocks of 128: see `activation`."""
    run = activation(call, call.k, call.stride_xm, "identity", True)
    return lambda x: run(x, None, None, None)


def activation(call: LinearCall, n: int, stride: int, name: str, quantized: bool) -> Callable:
    """The launch of `_activate_kernel`: a function of up, its bias, gate and its bias.

    It gives `[*lead, n]`, or if `quantized` e4m3 `[rows, n]` and fp32 scales `[ceil(n / 128), rows]`, where `rows` is
    `padded(M)`; what the padding holds is undefined.
    """
    rows = padded(call.m)
    gpu = GPU.of(call.device)
    launch = launcher(
        _activate_kernel,
        call.device,
        (call.m, -(-scale_blocks(n) // BLOCKS), 1),
        (n, rows, stride, name, LARGEST, SCALE_BLOCK, BLOCKS, gpu.is_nvidia, gpu.can_overlap),
        overlap=call.overlap,
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
    empty_scale = allocator((scale_blocks(n), rows), torch.float32, call.device)

    def run_quantized(up, bias, gate, gate_bias):
        data, scale = empty_data(), empty_scale()
        launch((up, bias, gate, gate_bias, data, scale))
        return data, scale

    return run_quantized
