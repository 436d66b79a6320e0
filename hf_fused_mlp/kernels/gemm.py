"""``out = act(x @ gate.T) * (x @ weight.T)`` for many tokens: a persistent GEMM with the activation in its epilogue.

Without a gate, ``out = act(x @ weight.T)``. Picked for the gated up launch of more than 128 tokens, on Hopper. Gate
and weight are the two planes of one `[2, N, K]` block; a descriptor loads `block_n` rows of each into one tile, so a
single wide product makes both, and splitting the accumulator gives the pair in registers.
Launches: 1. Bytes: x, the weights and out once, if tiles that share them meet in L2 (`group_m`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_fused_mlp.kernels._common import activate, add_bias, grouped_tile, launch
from hf_fused_mlp.types import GPU, LinearKey, TileConfig

CANDIDATES = tuple(
    TileConfig("gemm", block_m, block_n, 64, num_warps=8, num_stages=num_stages, group_m=group_m)
    for block_m, block_n in ((128, 128), (128, 256), (64, 128), (128, 64))
    for num_stages, group_m in ((4, 8), (3, 8), (3, 16))
)


def supports(key: LinearKey) -> str | None:
    """Why the kernel cannot or should not run `key`, or None."""
    if key.dtype not in (torch.float16, torch.bfloat16):
        return f"made for fp16 and bf16, not {key.dtype}"
    if not key.one_block:
        return "gate and up are not one aligned block of memory"
    if key.n % 8 or key.k % 8:
        return f"tensor descriptors need rows of a multiple of 16 bytes, not {key.n} and {key.k} elements"
    return None


@triton.jit(do_not_specialize=["M"])
def _gemm_kernel(
    x_desc,
    w_desc,
    out_desc,
    bias_ptr,
    gate_bias_ptr,
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    NUM_SMS: tl.constexpr,
):
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, NUM_SMS, flatten=True):
        pid_m, pid_n = grouped_tile(tile, num_m, num_n, GROUP_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N

        acc = tl.zeros((BLOCK_M, PLANES * BLOCK_N), tl.float32)
        for k in range(tl.cdiv(K, BLOCK_K)):
            x = x_desc.load([pid_m * BLOCK_M, k * BLOCK_K])
            w = tl.reshape(w_desc.load([0, pid_n * BLOCK_N, k * BLOCK_K]), (PLANES * BLOCK_N, BLOCK_K))
            acc = tl.dot(x, w.T, acc)

        if PLANES == 2:
            gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
            gate = add_bias(gate, gate_bias_ptr, offs_n, mask_n, 0)
            out = activate(gate, ACTIVATION) * add_bias(up, bias_ptr, offs_n, mask_n, 0)
        else:
            out = activate(add_bias(acc, bias_ptr, offs_n, mask_n, 0), ACTIVATION)
        out_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N], out.to(out_desc.dtype))


def gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    config: TileConfig,
) -> Tensor:
    """The equation above for `x` `[M, K]`, contiguous `weight` and `gate` `[N, K]`, biases `[N]`; gives `[M, N]`.

    `weight` must begin where `gate` ends; `supports` says what else the descriptors need.
    """
    M, N, K = x.shape[0], weight.shape[0], x.shape[1]
    planes = 1 if gate is None else 2
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if x.stride(0) * x.itemsize % 16 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    num_sms = GPU.of(x.device).num_sms
    num_tiles = -(-M // config.block_m) * -(-N // config.block_n)
    block_m, block_n, block_k = tile = config.block_m, config.block_n, config.block_k
    first = weight if gate is None else gate
    x_desc = TensorDescriptor(x, [M, K], [x.stride(0), 1], [block_m, block_k])
    w_desc = TensorDescriptor(first, [planes, N, K], [N * K, K, 1], [planes, block_n, block_k])
    out_desc = TensorDescriptor(out, [M, N], [N, 1], [block_m, block_n])
    launch(
        _gemm_kernel,
        (x.dtype, x.device, N, K, bias is None, gate_bias is None, planes, activation, config),
        (min(num_sms, num_tiles), 1, 1),
        (x_desc, w_desc, out_desc, bias, gate_bias, M, N, K, activation, planes, *tile, config.group_m, num_sms),
        tensors=(x, weight, bias, gate, gate_bias),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
