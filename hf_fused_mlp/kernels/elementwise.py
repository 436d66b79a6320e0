"""``out = act(x @ gate.T) * (x @ weight.T)`` for many tokens: PyTorch's GEMMs, then one kernel for the rest.

Picked for the gated up launch where no other family can run: of more than 128 tokens on other GPUs than Hopper or
where gate and up are not one block, and in fp32 from 2 tokens on. It is what eager does with one kernel for two, and
two trips to memory less.
Launches: 3. Bytes of the last: both products read, out written.
"""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from hf_fused_mlp.kernels._common import activate, launch
from hf_fused_mlp.types import GPU, LinearKey, TileConfig

BLOCK = 1024


def supports(key: LinearKey) -> str | None:
    """Why the kernel cannot or should not run `key`, or None."""
    if key.dtype.itemsize > 4:
        return "computes in fp32, which is not enough for fp64"
    return None if key.gated else "without a gate PyTorch's own activation does as much"


def candidates(key: LinearKey) -> list[TileConfig]:
    """There is nothing to choose; for few tokens in 16 bits the other families are far faster."""
    return [TileConfig("elementwise")] if key.m > 64 or key.dtype.itemsize > 2 else []


@triton.jit(do_not_specialize=["size"])
def _activate_and_multiply_kernel(
    gate_ptr, up_ptr, out_ptr, size: tl.int64, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """``out = act(gate) * up``"""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    if OVERLAP:
        gdc_launch_dependents()
    gate = tl.load(gate_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    out = activate(gate, ACTIVATION, False) * up
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def elementwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    gate_bias: Tensor | None,
    activation: str,
    config: TileConfig,
    overlap: bool = False,
) -> Tensor:
    """The equation above for `x` `[M, K]`, `weight` and `gate` `[N, K]`, biases `[N]`; gives `[M, N]`.

    `overlap` is not read: the GEMMs before are PyTorch's.
    """
    gate_out, up_out = F.linear(x, gate, gate_bias), F.linear(x, weight, bias)
    size = up_out.numel()
    launch(
        _activate_and_multiply_kernel,
        (x.dtype, x.device, activation),
        (-(-size // BLOCK), 1, 1),
        (gate_out, up_out, gate_out, size, activation, BLOCK, GPU.of(x.device).can_overlap),
        tensors=(gate_out, up_out),
        num_warps=4,
    )
    return gate_out
