"""``out = act(x @ gate.T) * (x @ weight.T)`` for many tokens: a persistent GEMM with the activation in its epilogue.

Without a gate, ``out = act(x @ weight.T)``. Picked on Hopper from more than 128 tokens on, for the up launch, and by
measured plans for down too. A tile is the product of `block_m` tokens with an even number of weight rows, in one
accumulator that is then split in registers: with a gate its halves are `block_n` rows of each of the two planes of one
`[2, N, K]` block, and make one result; without, `block_n` rows of the weight, stored half by half. If, after whole
rounds, the tiles that are left would leave half of the multiprocessors idle, they are halved.
Launches: 1. Bytes: x, the weights and out once, if tiles that share them meet in L2 (`group_m`).
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fused_mlp.kernels._common import activate, add_bias, grouped_tile
from hf_fused_mlp.kernels._launch import NO_DOT, Linear, Tiling, allocator, launcher
from hf_fused_mlp.types import GPU, LinearCall, LinearKey, TileConfig


def supports(key: LinearKey) -> str | None:
    """Why the kernel cannot or should not run `key`, or None."""
    if key.storage != "float":
        return f"made for storage 'float', not {key.storage!r}"
    if not key.gpu.has_dot:
        return NO_DOT
    if key.dtype not in (torch.float16, torch.bfloat16):
        return f"made for fp16 and bf16, not {key.dtype}"
    if not key.one_block:
        return "gate and up are not one aligned block of memory"
    if key.n % 8 or key.k % 8:
        return f"tensor descriptors need rows of a multiple of 16 bytes, not {key.n} and {key.k} elements"
    return None


def candidates(key: LinearKey) -> list[TileConfig]:
    """Configurations for the tuner: 256 rows of weights per tile, or 128 with few tokens."""
    if key.m < 64:
        return []
    rows = [(128, 256, 4, 4), (128, 256, 4, 8), (128, 256, 4, 16), (128, 256, 3, 8)]
    if key.m <= 1024:
        rows += [(128, 128, 4, 8), (64, 256, 4, 8), (64, 128, 4, 8)]
    return [
        TileConfig("gemm", m, n // 2 if key.gated else n, 64, num_warps=8, num_stages=stages, group_m=group_m)
        for m, n, stages, group_m in rows
        if m <= key.m
    ]


@triton.jit
def _store_tile(
    x_desc,
    w_desc,
    out_desc,
    bias_ptr,
    gate_bias_ptr,
    m,
    n,
    N,
    K,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SHORT: tl.constexpr,
):
    """The tile of the output whose first row is `m` and first column `n`."""
    ROWS: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    HALF: tl.constexpr = ROWS // 2
    acc = tl.zeros((BLOCK_M, ROWS), tl.float32)
    for k in range(tl.cdiv(K, BLOCK_K)):
        x = x_desc.load([m, k * BLOCK_K])
        w = tl.reshape(w_desc.load([0, n, k * BLOCK_K]), (ROWS, BLOCK_K))
        acc = tl.dot(x, w.T, acc)

    first, second = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    offs_n = n + tl.arange(0, HALF)
    if GATED:
        gate = add_bias(first, gate_bias_ptr, offs_n, offs_n < N, 0)
        out = activate(gate, ACTIVATION, SHORT) * add_bias(second, bias_ptr, offs_n, offs_n < N, 0)
        out_desc.store([m, n], out.to(out_desc.dtype))
    else:
        first = activate(add_bias(first, bias_ptr, offs_n, offs_n < N, 0), ACTIVATION, SHORT)
        out_desc.store([m, n], first.to(out_desc.dtype))
        offs_n += HALF
        second = activate(add_bias(second, bias_ptr, offs_n, offs_n < N, 0), ACTIVATION, SHORT)
        out_desc.store([m, n + HALF], second.to(out_desc.dtype))


@triton.jit(do_not_specialize=["M", "whole"])
def _gemm_kernel(
    x_desc,
    w_desc,
    out_desc,
    half_w_desc,
    half_out_desc,
    bias_ptr,
    gate_bias_ptr,
    M,
    N,
    K,
    whole,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    NUM_SMS: tl.constexpr,
    SHORT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The first `whole` tiles unchanged, and the rest as two halves each, if there are descriptors for these."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), whole, NUM_SMS, flatten=True):
        pid_m, pid_n = grouped_tile(tile, num_m, num_n, GROUP_M)
        m, n = pid_m * BLOCK_M, pid_n * BLOCK_N
        _store_tile(
            x_desc, w_desc, out_desc, bias_ptr, gate_bias_ptr, m, n, N, K,
            ACTIVATION, GATED, BLOCK_M, BLOCK_N, BLOCK_K, SHORT,
        )  # fmt: skip
    if half_w_desc is not None:
        half = 2 * whole + tl.program_id(0)
        if half < 2 * num_m * num_n:
            pid_m, pid_n = grouped_tile(half // 2, num_m, num_n, GROUP_M)
            m, n = pid_m * BLOCK_M, pid_n * BLOCK_N + half % 2 * (BLOCK_N // 2)
            _store_tile(
                x_desc, half_w_desc, half_out_desc, bias_ptr, gate_bias_ptr, m, n, N, K,
                ACTIVATION, GATED, BLOCK_M, BLOCK_N // 2, BLOCK_K, SHORT,
            )  # fmt: skip


def gemm(call: LinearCall, config: TileConfig) -> Linear:
    """The launch of the equation above.

    A gate must end where `weight` begins; `supports` says what else the descriptors need.
    """
    M, N, K, planes = call.m, call.n, call.k, 2 if call.gated else 1
    block_m, block_n, block_k = tile = config.block_m, config.block_n, config.block_k
    empty = allocator((*call.lead, N), call.dtype, call.device)
    gpu = GPU.of(call.device)
    tiles = -(-M // block_m) * -(-N // block_n)
    rest = tiles % gpu.num_sms
    halved = tiles > gpu.num_sms and 0 < 2 * rest <= gpu.num_sms
    whole = tiles - rest if halved else tiles
    constants = call.activation, call.gated, *tile, config.group_m, gpu.num_sms, gpu.is_nvidia, gpu.can_overlap

    # by what no tensor descriptor has, or so that rows share memory
    are_apart = call.stride_xm * call.dtype.itemsize % 16 != 0 or call.stride_xm < K
    stride = K if are_apart else call.stride_xm

    def tilings(columns: int) -> tuple[Tiling, Tiling]:
        """Of the weights and of the output, for tiles of so many columns."""
        stored = columns if call.gated else columns // 2
        return ([planes, N, K], [N * K, K, 1], [planes, columns, block_k]), ([M, N], [N, 1], [block_m, stored])

    launch = launcher(
        _gemm_kernel,
        call.device,
        (min(gpu.num_sms, tiles), 1, 1),
        (M, N, K, whole, *constants),
        (
            ([M, K], [stride, 1], [block_m, block_k]),
            *tilings(block_n),
            *(tilings(block_n // 2) if halved else (None, None)),
        ),
        overlap=call.overlap,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )

    def run(x, weight, gate):
        (weight, _, bias), (gate, _, gate_bias) = weight, gate
        out = empty()
        if are_apart or x.data_ptr() % 16:
            x = torch.empty_strided((M, K), (stride, 1), dtype=x.dtype, device=x.device).copy_(x.reshape(M, K))
        block = weight if gate is None else gate
        launch((bias, gate_bias), (x, block, out, block, out) if halved else (x, block, out, None, None))
        return out

    return run
