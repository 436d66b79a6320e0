"""``out = act(x @ weight.T)`` for one token and weights stored as `[K, N]`, as `Conv1D` has them.

Picked at M = 1, for the up and the down launch, in fp16, bf16 and fp32. A program multiplies a few columns of what is
stored with the token, on the CUDA cores. Rows of its tiles are at least 32 bytes, the least that memory gives. The
loop over K is unrolled: many loads are under way at once. Unless K is long, tiles have fewer rows than the program has
threads: with more, the token would go through shared memory, and each step would wait for it.
Launches: 1. Bytes: the weights once; x from L2. Exact products, fp32 sums.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fused_mlp.kernels._common import activate, add_bias
from hf_fused_mlp.kernels._launch import Linear, allocator, launcher
from hf_fused_mlp.types import GPU, LinearCall, LinearKey, TileConfig

ROW_BYTES = 32, 64, 128
MOST_STEPS, LARGEST_K = 64, 1 << 15  # of the unrolled loop


def supports(key: LinearKey) -> str | None:
    """Why the kernel cannot or should not run `key`, or None."""
    if key.storage != "transposed":
        return f"made for storage 'transposed', not {key.storage!r}"
    if key.gated:
        return "made for MLPs without a gate"
    if key.dtype.itemsize > 4:
        return "sums in fp32, which is not enough for fp64"
    if key.k > LARGEST_K:
        return f"unrolls the loop over K, which may be {LARGEST_K} at most"
    return None if key.m == 1 else "made for M = 1"


def candidates(key: LinearKey) -> list[TileConfig]:
    """Configurations for the tuner: narrow tiles for many programs, wide ones for long reads."""
    return [
        TileConfig("transposed_gemv", block_n=row_bytes // key.dtype.itemsize, block_k=block_k, num_warps=num_warps)
        for row_bytes in ROW_BYTES
        for block_k, num_warps in ((64, 4), (64, 8), (128, 8), (256, 16), (512, 16))
        if MOST_STEPS * block_k >= key.k
    ]


@triton.jit
def _transposed_gemv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    N,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`weight_ptr` is `[K, N]`."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N
    if OVERLAP:
        gdc_launch_dependents()

    offs_k, offs_n = tl.arange(0, BLOCK_K), n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_w = offs_k[:, None] * N + tl.arange(0, BLOCK_N)[None, :]
    weight_ptr += n

    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for k in tl.static_range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        weight = tl.load(weight_ptr + offs_w, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        weight_ptr += BLOCK_K * N
        if OVERLAP and k == 0:
            gdc_wait()
        x = tl.load(x_ptr + offs_k + k, mask=mask_k, other=0.0)
        acc += x.to(tl.float32)[:, None] * weight.to(tl.float32)

    out = activate(add_bias(tl.sum(acc, 0, keep_dims=True), bias_ptr, offs_n, mask_n, 0), ACTIVATION, False)
    tl.store(out_ptr + offs_n[None, :], out.to(out_ptr.dtype.element_ty), mask=mask_n[None, :])


def transposed_gemv(call: LinearCall, config: TileConfig) -> Linear:
    """The launch of the equation above."""
    empty = allocator((*call.lead, call.n), call.dtype, call.device)
    launch = launcher(
        _transposed_gemv_kernel,
        call.device,
        (-(-call.n // config.block_n), 1, 1),
        (call.n, call.k, call.activation, config.block_n, config.block_k, GPU.of(call.device).can_overlap),
        overlap=call.overlap,
        num_warps=config.num_warps,
    )

    def run(x, weight, gate):
        weight, _, bias = weight
        out = empty()
        launch((x, weight, bias, out))
        return out

    return run
