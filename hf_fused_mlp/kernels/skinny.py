"""``out = act(x @ gate.T) * (x @ weight.T)`` for a few tokens, on the tensor cores, with the weights as left operand.

Without a gate, ``out = act(x @ weight.T)``. Picked at M = 2 to 128, for the up and the down launch, in fp16 and bf16.
The long side of the product is the weights', so they fill the instruction's 64 rows, and the tokens, padded to 16, its
columns. Where rows are too few to fill the GPU, `split_k` programs share each tile's K, and a second launch adds what
they found, in a fixed order: two calls give the same bits.
Launches: 1, or 2 with `split_k`. Bytes: the weights once for every `block_m` tokens.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fused_mlp.kernels._common import activate, add_bias
from hf_fused_mlp.kernels._launch import NO_DOT, Linear, allocator, launcher
from hf_fused_mlp.types import GPU, LinearCall, LinearKey, TileConfig

SUM_BLOCK = 512


def supports(key: LinearKey) -> str | None:
    """Why the kernel cannot or should not run `key`, or None."""
    if key.storage != "float":
        return f"made for storage 'float', not {key.storage!r}"
    if not key.gpu.has_dot:
        return NO_DOT
    if key.dtype not in (torch.float16, torch.bfloat16):
        return f"made for fp16 and bf16, not {key.dtype}"
    if key.k % 16:
        return f"reads 16 bytes at a time if rows are a multiple of 16 elements, and slowly if not, as with {key.k}"
    return None if 2 <= key.m <= 128 else "made for M of 2 to 128"


def candidates(key: LinearKey) -> list[TileConfig]:
    """Configurations for the tuner: all tokens in one or two tiles, and tiles for few rows or many."""
    block_m = max(16, key.m)
    tiles = [(64, 128, 4), (64, 128, 3), (64, 64, 6), (32, 128, 4)]
    if block_m <= 32:
        tiles += [(64, 256, 3)]
    if key.n <= 4096:
        tiles += [(16, 128, 4)]
    return [
        TileConfig("skinny", rows, *tile[:2], num_warps=4, num_stages=tile[2], split_k=split_k)
        for rows in ((128, 64) if block_m == 128 else (block_m,))
        for tile in tiles
        for split_k in ((1,) if key.gated else (1, 2, 4))
    ]


@triton.jit(do_not_specialize=["M"])
def _skinny_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    gate_ptr,
    gate_bias_ptr,
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
    """`out_ptr` is `[M, N]`, or with `SPLIT_K` fp32 `[SPLIT_K, M, N]`: the sums over each part of K."""
    pid_n, pid_m, pid_k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()

    # 64-bit sums stay scalar; what varies inside a block is 32-bit
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n, mask_m = offs_n < N, offs_m < M
    offs_w = tl.arange(0, BLOCK_N)[:, None] * K + offs_k[None, :]
    offs_x = tl.arange(0, BLOCK_M)[None, :] * stride_xm + offs_k[:, None]
    x_ptr += pid_m * BLOCK_M * stride_xm
    weight_ptr += pid_n * BLOCK_N * K
    if gate_ptr is not None:
        gate_ptr += pid_n * BLOCK_N * K

    part_k = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc_gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(pid_k * part_k, min((pid_k + 1) * part_k, K), BLOCK_K):
        mask_k = k + offs_k < K
        mask_w = mask_n[:, None] & mask_k[None, :]
        x = tl.load(x_ptr + offs_x + k, mask=mask_k[:, None] & mask_m[None, :], other=0.0)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + offs_w + k, mask=mask_w, other=0.0)
            acc_gate = tl.dot(gate, x, acc_gate)
        weight = tl.load(weight_ptr + offs_w + k, mask=mask_w, other=0.0)
        acc = tl.dot(weight, x, acc)

    out = add_bias(acc, bias_ptr, offs_n, mask_n, 1)
    if gate_ptr is not None:
        out = activate(add_bias(acc_gate, gate_bias_ptr, offs_n, mask_n, 1), ACTIVATION, False) * out
    else:
        out = activate(out, ACTIVATION, False)
    offs_out = (pid_k * M + offs_m)[None, :] * N + offs_n[:, None]
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_m[None, :])


@triton.jit(do_not_specialize=["M"])
def _sum_kernel(
    parts_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``out[m, n] = act(sum over k of parts[k, m, n] + bias[n])``"""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < M * N
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()

    acc = tl.zeros((1, BLOCK), tl.float32)
    for k in tl.static_range(SPLIT_K):
        acc += tl.load(parts_ptr + k * M * N + offs, mask=mask, other=0.0)[None, :]
    out = activate(add_bias(acc, bias_ptr, offs % N, mask, 0), ACTIVATION, False)
    tl.store(out_ptr + offs[None, :], out.to(out_ptr.dtype.element_ty), mask=mask[None, :])


def skinny(call: LinearCall, config: TileConfig) -> Linear:
    """The launch of the equation above, and where K is split that of the sum; with a gate, `split_k` is not read."""
    M, N = call.m, call.n
    split_k = 1 if call.gated else config.split_k
    activation = call.activation if split_k == 1 else "identity"
    tile = config.block_m, config.block_n, config.block_k
    launch = launcher(
        _skinny_kernel,
        call.device,
        (-(-N // config.block_n), -(-M // config.block_m), split_k),
        (M, N, call.k, call.stride_xm, activation, *tile, split_k, GPU.of(call.device).can_overlap),
        overlap=call.overlap,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    empty, finish = output_of(call, split_k)

    def run(x, weight, gate):
        (weight, _, bias), (gate, _, gate_bias) = weight, gate
        out = empty()
        launch((x, weight, bias if finish is None else None, gate, gate_bias, out))
        return out if finish is None else finish(out, bias)

    return run


def output_of(call: LinearCall, split_k: int) -> tuple[Callable[[], Tensor], Callable[..., Tensor] | None]:
    """The tensor that a kernel with optional split-K writes to, and the launch that makes the output from it.

    Returns:
        A function that allocates `[*lead, n]`, and None; or one that allocates fp32 `[split_k, m, n]`, and the launch
        of ``act(parts.sum(0) + bias)``, a function of `parts` and `bias`.
    """
    empty = allocator((*call.lead, call.n), call.dtype, call.device)
    if split_k == 1:
        return empty, None
    can_overlap = GPU.of(call.device).can_overlap
    add = launcher(
        _sum_kernel,
        call.device,
        (-(-call.m * call.n // SUM_BLOCK), 1, 1),
        (call.m, call.n, call.activation, split_k, SUM_BLOCK, can_overlap),
        overlap=can_overlap,
        num_warps=4,
    )

    def finish(parts, bias):
        out = empty()
        add((parts, bias, out))
        return out

    return allocator((split_k, call.m, call.n), torch.float32, call.device), finish
