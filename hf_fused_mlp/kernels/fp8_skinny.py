"""``out = act(x @ gate.T) * (x @ weight.T)`` for a few tokens and FP8 weights, on the tensor cores.

Without a gate, ``out = act(x @ weight.T)``. Picked at M = 2 to 64, for the up and the down launch, in fp16 and bf16.
Like `skinny`: the weights are the left operand. A step along K covers one block of scales, by which its product is
multiplied. Where tensor cores multiply FP8, x is quantized first, with a scale for each 128 elements of a row.
Elsewhere the weights are converted to x's dtype in registers, which is more accurate and slower.
Launches: 1, one more to quantize, and one more with `split_k`. Bytes: the weights once for every `block_m` tokens,
half of what they are in 16 bits.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fused_mlp.kernels._common import activate, add_bias
from hf_fused_mlp.kernels._fp8 import from_fp8, load_scale, scale_for_kernels, weight_reader, why_not_fp8
from hf_fused_mlp.kernels._launch import Linear, launcher
from hf_fused_mlp.kernels._quantize import padded, quantize_rows
from hf_fused_mlp.kernels.skinny import output_of
from hf_fused_mlp.types import GPU, SCALE_BLOCK, LinearCall, LinearKey, TileConfig


def supports(key: LinearKey) -> str | None:
    """Why the kernel cannot or should not run `key`, or None."""
    if key.dtype not in (torch.float16, torch.bfloat16):
        return f"made for fp16 and bf16, not {key.dtype}"
    return why_not_fp8(key.storage) or (None if key.m <= 128 else "made for M of 1 to 128")


def candidates(key: LinearKey) -> list[TileConfig]:
    """Configurations for the tuner: all tokens in one or two tiles, and tiles for few rows or many."""
    block_m = max(16, key.m)
    most = 8192 if multiplies_fp8(key.gpu) else 4096  # elements of a tile's sums; more would not fit into registers
    return [
        TileConfig("fp8_skinny", rows, block_n, SCALE_BLOCK, num_warps=warps, num_stages=stages, split_k=split_k)
        for rows in ((128, 64) if block_m == 128 else (block_m,))
        for block_n, warps, stages in ((128, 8, 4), (64, 4, 3), (64, 4, 4), (64, 4, 6), (32, 4, 4))
        if block_n * rows <= most and (warps == 8 or block_n * rows < 8192)
        for split_k in ((1,) if key.gated else (1, 2, 4, 8) if block_n == 128 else (1, 2, 4))
    ]


def multiplies_fp8(gpu: GPU) -> bool:
    """Whether the tensor cores of `gpu` multiply e4m3."""
    return gpu.capability >= (8, 9)


@triton.jit(do_not_specialize=["M", "stride_scale"])
def _fp8_skinny_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    gate_ptr,
    gate_scale_ptr,
    gate_bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_scale,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`out_ptr` is `[M, N]`, or with `SPLIT_K` fp32 `[SPLIT_K, M, N]`: the sums over each part of K.

    `x_ptr` is e4m3 if there is an `x_scale_ptr`, fp32 `[K / BLOCK_K, stride_scale]`. `BLOCK_K` is a block of scales,
    of whose rows `BLOCK_N` is a divisor.
    """
    pid_n, pid_m, pid_k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()

    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n, mask_m = offs_n < N, offs_m < M
    offs_w = tl.arange(0, BLOCK_N)[:, None] * K + offs_k[None, :]
    offs_x = tl.arange(0, BLOCK_M)[None, :] * stride_xm + offs_k[:, None]
    num_k = tl.cdiv(K, BLOCK_K)
    x_ptr += pid_m * BLOCK_M * stride_xm
    weight_ptr += pid_n * BLOCK_N * K
    scale_ptr += pid_n * BLOCK_N // BLOCK_K * num_k
    if gate_ptr is not None:
        gate_ptr += pid_n * BLOCK_N * K
        gate_scale_ptr += pid_n * BLOCK_N // BLOCK_K * num_k

    part = tl.cdiv(num_k, SPLIT_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc_gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(pid_k * part, min((pid_k + 1) * part, num_k)):
        k = step * BLOCK_K
        mask_k = k + offs_k < K
        mask_w = mask_n[:, None] & mask_k[None, :]
        x = tl.load(x_ptr + offs_x + k, mask=mask_k[:, None] & mask_m[None, :], other=0.0)
        x_scale = 1.0
        if x_scale_ptr is not None:
            x_scale = tl.load(x_scale_ptr + step * stride_scale + offs_m, mask=mask_m, other=0.0)[None, :]
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + offs_w + k, mask=mask_w, other=0.0)
            acc_gate += tl.dot(from_fp8(gate, x.dtype), x) * (x_scale * load_scale(gate_scale_ptr + step, True))
        weight = tl.load(weight_ptr + offs_w + k, mask=mask_w, other=0.0)
        acc += tl.dot(from_fp8(weight, x.dtype), x) * (x_scale * load_scale(scale_ptr + step, True))

    out = add_bias(acc, bias_ptr, offs_n, mask_n, 1)
    if gate_ptr is not None:
        out = activate(add_bias(acc_gate, gate_bias_ptr, offs_n, mask_n, 1), ACTIVATION, False) * out
    else:
        out = activate(out, ACTIVATION, False)
    offs_out = (pid_k * M + offs_m)[None, :] * N + offs_n[:, None]
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_m[None, :])


def fp8_skinny(call: LinearCall, config: TileConfig) -> Linear:
    """The launches of the equation above; with a gate, `split_k` is not read."""
    M, N = call.m, call.n
    if SCALE_BLOCK % config.block_n:
        raise ValueError(f"{config}: the rows of a tile must share their scales")
    split_k = 1 if call.gated else config.split_k
    activation = call.activation if split_k == 1 else "identity"
    gpu, readable = GPU.of(call.device), weight_reader(call.device)
    quantize, stride_xm, overlap = None, call.stride_xm, call.overlap
    if multiplies_fp8(gpu):
        quantize, stride_xm, overlap = quantize_rows(call), call.k, gpu.can_overlap
    launch = launcher(
        _fp8_skinny_kernel,
        call.device,
        (-(-N // config.block_n), -(-M // config.block_m), split_k),
        (
            *(M, N, call.k, stride_xm, padded(M), activation),
            *(config.block_m, config.block_n, SCALE_BLOCK, split_k, gpu.can_overlap),
        ),
        overlap=overlap,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    empty, finish = output_of(call, split_k)

    def run(x, weight, gate):
        (weight, scale, bias), (gate, gate_scale, gate_bias) = weight, gate
        scales = scale_for_kernels(scale), scale_for_kernels(gate_scale)
        x, x_scale = (x, None) if quantize is None else quantize(x)
        out = empty()
        bias_here = bias if finish is None else None
        launch((x, x_scale, readable(weight), scales[0], bias_here, readable(gate), scales[1], gate_bias, out))
        return out if finish is None else finish(out, bias)

    return run
