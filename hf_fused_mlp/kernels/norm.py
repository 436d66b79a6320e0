"""``rms_norm(x) * weight``: one kernel for the eight that PyTorch launches for an RMSNorm of Transformers.

No plan names it: `hf_fused_mlp.families.norm` runs it in eager mode. Launches: 1. Bytes:
`x` read, the result written, and the weight once, which stays in the L2.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fused_mlp.kernels._launch import allocator, launcher
from hf_fused_mlp.modes import no_kernels
from hf_fused_mlp.types import LinearCall, next_power_of_two

LONGEST = 1 << 15  # elements of a row, which one program holds completely


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes tensors like these."""
    alike = weight.dtype == x.dtype and weight.device == x.device and weight.shape == x.shape[-1:]
    if not alike or not weight.is_contiguous() or not 0 < weight.numel() <= LONGEST or x.numel() == 0:
        return False
    runs = not x.is_cuda or no_kernels(x.device, x.dtype) is None  # on a CPU it is interpreted
    return runs and x.dtype in (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    M,
    H,
    stride_xm,
    EPS: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`ROWS` whole rows, in fp32; `FORM` says where it rounds, as `hf_fused_mlp.reading.norm.FORMS` has it."""
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (rows < M) & (cols < H)
    x = tl.load(x_ptr + rows.to(tl.int64) * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=cols < H, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / H + EPS)
    if FORM == "rounded":
        out = normed.to(out_ptr.dtype.element_ty).to(tl.float32) * weight
    elif FORM == "offset":
        out = normed * (1.0 + weight)
    else:
        tl.static_assert(FORM == "weighed", "unknown form")
        out = normed * weight
    tl.store(out_ptr + rows.to(tl.int64) * H + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(call: LinearCall, eps: float, form: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The launch for the `x` of `call`: a function of `x` and the norm's weight."""
    block = next_power_of_two(call.k)
    rows = max(1, 1024 // block)
    grid, values = (-(-call.m // rows), 1, 1), (call.m, call.k, call.stride_xm, eps, form, rows, block)
    launch = launcher(_rms_norm_kernel, call.device, grid, values, num_warps=min(16, max(1, rows * block // 512)))
    empty = allocator((*call.lead, call.k), call.dtype, call.device)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        out = empty()
        launch((x, weight, out))
        return out

    return run
