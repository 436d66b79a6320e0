"""``out = act(x @ gate.T) * (x @ weight.T)``: one GEMM of PyTorch's over gate and weight, one kernel for the rest.

Without a gate, ``out = act(x @ weight.T)``. For tens to hundreds of tokens, and for rows that our GEMMs cannot read
fast: the library's GEMM fills the GPU better with twice the columns, and one kernel replaces two of eager's.
Launches: 1 after the GEMM, which has no bias: the kernel adds it in fp32. Bytes: the products read, out written.
"""

import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fused_mlp.kernels._common import activate, add_bias
from hf_fused_mlp.kernels._launch import Linear, allocator, kept_by_address, launcher
from hf_fused_mlp.types import GPU, LinearCall, LinearKey, TileConfig
from hf_fused_mlp.weights import as_one

BLOCK = 1024


def supports(key: LinearKey) -> str | None:
    """Why the kernel cannot or should not run `key`, or None."""
    if key.storage != "float":
        return f"made for storage 'float', not {key.storage!r}"
    if key.dtype.itemsize > 4:
        return "computes in fp32, which is not enough for fp64"
    if not key.one_block:
        return "gate and up are not one aligned block of memory"
    if key.activation == "identity" and not key.gated:
        return "nothing is left to do after the GEMM"
    return None


def candidates(key: LinearKey) -> list[TileConfig]:
    """There is nothing to choose; for one token and two the dot products are far faster."""
    return [TileConfig("wide")] if key.m > 2 or key.dtype.itemsize > 2 else []


@triton.jit
def _wide_kernel(
    products_ptr,
    bias_ptr,
    gate_bias_ptr,
    out_ptr,
    N,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    SHORT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A block of one row. `products_ptr` is `[M, 2, N]`, or `[M, N]` without a gate, which `out_ptr` may then be."""
    row, offs = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    products_ptr += row * N * (2 if GATED else 1)
    first = tl.load(products_ptr + offs, mask=mask, other=0.0).to(tl.float32)[None, :]
    if GATED:
        second = tl.load(products_ptr + N + offs, mask=mask, other=0.0).to(tl.float32)[None, :]
        gate = activate(add_bias(first, gate_bias_ptr, offs, mask, 0), ACTIVATION, SHORT)
        out = gate * add_bias(second, bias_ptr, offs, mask, 0)
    else:
        out = activate(add_bias(first, bias_ptr, offs, mask, 0), ACTIVATION, SHORT)
    tl.store(out_ptr + row * N + offs[None, :], out.to(out_ptr.dtype.element_ty), mask=mask[None, :])


def wide(call: LinearCall, config: TileConfig) -> Linear:
    """The GEMM and the launch of the equation above; nothing of `config` is read.

    A gate must end where `weight` begins.
    """
    gpu = GPU.of(call.device)
    empty = allocator((*call.lead, call.n), call.dtype, call.device)
    launch = launcher(
        _wide_kernel,
        call.device,
        (call.m, -(-call.n // BLOCK), 1),
        (call.n, call.activation, call.gated, BLOCK, gpu.is_nvidia and call.dtype.itemsize == 2, gpu.can_overlap),
        overlap=gpu.can_overlap,  # it waits for the GEMM before it reads anything
        num_warps=4,
    )
    as_block = kept_by_address(as_one)

    def run(x, weight, gate):
        (weight, _, bias), (gate, _, gate_bias) = weight, gate
        if gate is None:
            out = products = F.linear(x, weight)
        else:
            products, out = F.linear(x, as_block(gate, weight)), empty()
        launch((products, bias, gate_bias, out))
        return out

    return run
