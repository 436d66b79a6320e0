"""``out = act(x @ weight.T)`` for a few tokens and weights stored as `[K, N]`, as `Conv1D` has them.

Picked in fp16 and bf16 at up to 16 tokens, and for narrow down launches at up to 64. Like `skinny`, but the rows of a
tile of the weights are columns of what is stored, so neighbouring threads read along N. The tensor cores take the left
operand in either order.
Launches: 1, or 2 with `split_k`. Bytes: the weights once for every `block_m` tokens.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fused_mlp.kernels._common import activate, add_bias
from hf_fused_mlp.kernels._launch import NO_DOT, Linear, launcher
from hf_fused_mlp.kernels.skinny import candidates as candidates_of_skinny
from hf_fused_mlp.kernels.skinny import output_of
from hf_fused_mlp.types import GPU, LinearCall, LinearKey, TileConfig


def supports(key: LinearKey) -> str | None:
    """Why the kernel cannot or should not run `key`, or None."""
    if key.storage != "transposed":
        return f"made for storage 'transposed', not {key.storage!r}"
    if not key.gpu.has_dot:
        return NO_DOT
    if key.gated:
        return "made for MLPs without a gate"
    if key.dtype not in (torch.float16, torch.bfloat16):
        return f"made for fp16 and bf16, not {key.dtype}"
    return None if key.m <= 128 else "made for M of 1 to 128"


def candidates(key: LinearKey) -> list[TileConfig]:
    """Configurations for the tuner: the tiles of `skinny`."""
    return [replace(config, kernel="transposed_skinny") for config in candidates_of_skinny(key)]


@triton.jit(do_not_specialize=["M"])
def _transposed_skinny_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`weight_ptr` is `[K, N]`; `out_ptr` is `[M, N]`, or with `SPLIT_K` fp32 `[SPLIT_K, M, N]`: each part's sums."""
    pid_n, pid_m, pid_k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()

    part_k = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n, mask_m = offs_n < N, offs_m < M
    offs_w = tl.arange(0, BLOCK_N)[:, None] + offs_k[None, :] * N
    offs_x = tl.arange(0, BLOCK_M)[None, :] * stride_xm + offs_k[:, None]
    x_ptr += pid_m * BLOCK_M * stride_xm
    weight_ptr += pid_n * BLOCK_N + (pid_k * part_k).to(tl.int64) * N

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(pid_k * part_k, min((pid_k + 1) * part_k, K), BLOCK_K):
        mask_k = k + offs_k < K
        x = tl.load(x_ptr + offs_x + k, mask=mask_k[:, None] & mask_m[None, :], other=0.0)
        weight = tl.load(weight_ptr + offs_w, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        weight_ptr += BLOCK_K * N
        acc = tl.dot(weight, x, acc)

    out = activate(add_bias(acc, bias_ptr, offs_n, mask_n, 1), ACTIVATION, False)
    offs_out = (pid_k * M + offs_m)[None, :] * N + offs_n[:, None]
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_m[None, :])


def transposed_skinny(call: LinearCall, config: TileConfig) -> Linear:
    """The launch of the equation above, and if K is split, the launch of the sum."""
    M, N, split_k = call.m, call.n, config.split_k
    activation = call.activation if split_k == 1 else "identity"
    tile = config.block_m, config.block_n, config.block_k
    launch = launcher(
        _transposed_skinny_kernel,
        call.device,
        (-(-N // config.block_n), -(-M // config.block_m), split_k),
        (M, N, call.k, call.stride_xm, activation, *tile, split_k, GPU.of(call.device).can_overlap),
        overlap=call.overlap,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    empty, finish = output_of(call, split_k)

    def run(x, weight, gate):
        weight, _, bias = weight
        out = empty()
        launch((x, weight, bias if finish is None else None, out))
        return out if finish is None else finish(out, bias)

    return run
