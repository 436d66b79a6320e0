"""``out = act(x @ gate.T) * (x @ weight.T)`` for one or two tokens: dot products on the CUDA cores, at memory speed.

Without a gate, ``out = act(x @ weight.T)``. Picked at M = 1 and 2, for the up and the down launch, in fp16, bf16 and,
for one token, fp32. A program multiplies one row of each weight with the tokens. The loop over K is unrolled: many
loads are under way at once, and few registers held. An overlapped launch has its first weights loaded when x is ready.
Launches: 1. Bytes: the weights once; x from L2. Exact products, fp32 sums.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fused_mlp.kernels._common import activate, add_bias
from hf_fused_mlp.kernels._launch import Linear, allocator, launcher
from hf_fused_mlp.types import GPU, LinearCall, LinearKey, TileConfig, next_power_of_two

MOST_STEPS = 64  # of the unrolled loop


def supports(key: LinearKey) -> str | None:
    """Why the kernel cannot or should not run `key`, or None."""
    if key.storage != "float":
        return f"made for storage 'float', not {key.storage!r}"
    if key.dtype.itemsize > 4:
        return "sums in fp32, which is not enough for fp64"
    return None if key.m <= 2 else "multiplies on the CUDA cores, which are fast enough for M = 1 and 2"


def candidates(key: LinearKey) -> list[TileConfig]:
    """Configurations for the tuner: a whole row at once, or pieces that are unrolled at most 32 times."""
    row = min(next_power_of_two(key.k), 16384)
    pieces = {(1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (row, 8)}
    return [
        TileConfig("gemv", block_k=block_k, num_warps=num_warps)
        for block_k, num_warps in sorted(pieces)
        if block_k <= row and 32 * block_k >= key.k
    ]


@triton.jit(do_not_specialize=["M"])
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    gate_ptr,
    gate_bias_ptr,
    out_ptr,
    M,
    N,
    stride_xm,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    pid_n = tl.program_id(0).to(tl.int64)
    if OVERLAP:
        gdc_launch_dependents()

    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    offs_n = pid_n + tl.arange(0, 1)
    mask_m = (offs_m < M)[:, None]
    weight_ptr += pid_n * K
    if gate_ptr is not None:
        gate_ptr += pid_n * K

    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    acc_gate = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k in tl.static_range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        weight = tl.load(weight_ptr + offs_k + k, mask=mask_k, other=0.0)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + offs_k + k, mask=mask_k, other=0.0)
        if OVERLAP and k == 0:
            gdc_wait()
        offs_x = offs_m[:, None] * stride_xm + offs_k[None, :]
        x = tl.load(x_ptr + offs_x + k, mask=mask_m & mask_k[None, :], other=0.0).to(tl.float32)
        if gate_ptr is not None:
            acc_gate += gate.to(tl.float32)[None, :] * x
        acc += weight.to(tl.float32)[None, :] * x

    out = add_bias(tl.sum(acc, 1, keep_dims=True), bias_ptr, offs_n, offs_n < N, 0)
    if gate_ptr is not None:
        gate = add_bias(tl.sum(acc_gate, 1, keep_dims=True), gate_bias_ptr, offs_n, offs_n < N, 0)
        out = activate(gate, ACTIVATION, False) * out
    else:
        out = activate(out, ACTIVATION, False)
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], out.to(out_ptr.dtype.element_ty), mask=mask_m)


def gemv(call: LinearCall, config: TileConfig) -> Linear:
    """The launch of the equation above."""
    empty = allocator((*call.lead, call.n), call.dtype, call.device)
    constants = call.k, call.activation, next_power_of_two(call.m), config.block_k, GPU.of(call.device).can_overlap
    launch = launcher(
        _gemv_kernel,
        call.device,
        (call.n, 1, 1),
        (call.m, call.n, call.stride_xm, *constants),
        overlap=call.overlap,
        num_warps=config.num_warps,
    )

    def run(x, weight, gate):
        (weight, _, bias), (gate, _, gate_bias) = weight, gate
        out = empty()
        launch((x, weight, bias, gate, gate_bias, out))
        return out

    return run
