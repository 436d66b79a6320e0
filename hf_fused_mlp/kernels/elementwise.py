"""``out = act(gate) * up`` and its gradients: one kernel each, between GEMMs that are not ours.

Picked for the gated up launch where no other kernel can run: for more than 128 tokens on other GPUs than Hopper or
where gate and up are not one block, and in fp32 from 2 tokens on. Compared with eager, it runs one kernel instead of
two and saves two trips to memory. If projections have to be called, as in training, this is all that can be fused.
Launches: 1 after the GEMMs. Bytes: both products read, out written; backward three read, two written.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from hf_fused_mlp.kernels._common import activate
from hf_fused_mlp.kernels._launch import Linear, launcher
from hf_fused_mlp.types import GPU, LinearCall, LinearKey, TileConfig

BLOCK = 1024


@dataclass(frozen=True)
class Rows:
    """Tensors `[count, length]` of one kind with their row strides in elements, one for each tensor."""

    count: int
    length: int
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def blocks(self) -> tuple[int, int, int]:
        """A grid with a program for each block of each row."""
        return self.count, -(-self.length // BLOCK), 1

    def empty(self) -> Tensor:
        """A new tensor of that size, contiguous."""
        return torch.empty((self.count, self.length), dtype=self.dtype, device=self.device)


def supports(key: LinearKey) -> str | None:
    """Why the kernel cannot or should not run `key`, or None."""
    if key.storage == "fp8":
        return "made for weights that PyTorch's GEMMs take, not for those with scales"
    if key.dtype.itemsize > 4:
        return "computes in fp32, which is not enough for fp64"
    return None if key.gated else "without a gate PyTorch's own activation does as much"


def candidates(key: LinearKey) -> list[TileConfig]:
    """There is nothing to choose; for few tokens in 16 bits the other kernels are far faster."""
    return [TileConfig("elementwise")] if key.m > 64 or key.dtype.itemsize > 2 else []


@triton.jit
def derivative(x, grad, ACTIVATION: tl.constexpr):
    """The derivative of `activate` at fp32 `x`, times `grad`.

    Infinite and NaN where PyTorch's is: a comparison decides as its does, and what may overflow is multiplied in its
    order, so that infinity meets a zero here where it does there.
    """
    if ACTIVATION == "gelu":
        slope = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
        return grad * slope
    elif ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, grad)
    elif ACTIVATION == "relu2":
        return tl.where(x <= 0, 0.0, grad * (2.0 * x))
    elif ACTIVATION == "identity":
        return grad
    else:
        # x times the logistic function of some y
        if ACTIVATION == "silu":
            y = x
        elif ACTIVATION == "quick_gelu":
            y = 1.702 * x
        else:
            tl.static_assert(ACTIVATION == "gelu_tanh", "unknown activation")
            y = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        e = tl.exp(-tl.abs(y))  # of both signs of y the same, so that 1 - s is not a difference of neighbours
        s = tl.where(y < 0, e, 1.0) / (1.0 + e)
        bend = e / ((1.0 + e) * (1.0 + e))
        if ACTIVATION == "silu":
            return grad * (s + x * bend)
        elif ACTIVATION == "quick_gelu":
            return grad * s + grad * x * bend * 1.702
        else:
            return grad * (s + x * bend * (1.5957691216057308 * (1.0 + 0.134145 * (x * x))))


@triton.jit
def _forward_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    I,
    stride_gate,
    stride_up,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``out = act(gate) * up``, a block of one row."""
    row, offs = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < I
    if OVERLAP:
        gdc_launch_dependents()
    gate = tl.load(gate_ptr + row * stride_gate + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + offs, mask=mask, other=0.0).to(tl.float32)
    out = activate(gate, ACTIVATION, False) * up
    tl.store(out_ptr + row * I + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    gate_grad_ptr,
    up_grad_ptr,
    I,
    stride_grad,
    stride_gate,
    stride_up,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``gate_grad = grad * up * act'(gate)`` and ``up_grad = grad * act(gate)``, a block of one row."""
    row, offs = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < I
    grad = tl.load(grad_ptr + row * stride_grad + offs, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + offs, mask=mask, other=0.0).to(tl.float32)
    gate_grad, up_grad = derivative(gate, grad * up, ACTIVATION), grad * activate(gate, ACTIVATION, False)
    tl.store(gate_grad_ptr + row * I + offs, gate_grad.to(gate_grad_ptr.dtype.element_ty), mask=mask)
    tl.store(up_grad_ptr + row * I + offs, up_grad.to(up_grad_ptr.dtype.element_ty), mask=mask)


def act_mul(rows: Rows, activation: str) -> Callable[..., Tensor]:
    """The launch of ``act(gate) * up``, in fp32, rounded once: a function of `gate` and `up`.

    The optional third argument is the tensor for the result, which may be `gate` or `up`.
    """
    overlap = GPU.of(rows.device).can_overlap
    grid, sizes = rows.blocks, (rows.length, *rows.strides)
    launch = launcher(_forward_kernel, rows.device, grid, (*sizes, activation, BLOCK, overlap), num_warps=4)

    def run(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
        out = rows.empty() if out is None else out
        launch((gate, up, out))
        return out

    return run


def act_mul_backward(rows: Rows, activation: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The launch of the gradients of gate and up: a function of the result's gradient, `gate` and `up`."""
    grid, sizes = rows.blocks, (rows.length, *rows.strides)
    launch = launcher(_backward_kernel, rows.device, grid, (*sizes, activation, BLOCK), num_warps=4)

    def run(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        gate_grad, up_grad = rows.empty(), rows.empty()
        launch((grad, gate, up, gate_grad, up_grad))
        return gate_grad, up_grad

    return run


def elementwise(call: LinearCall, config: TileConfig) -> Linear:
    """``act(x @ gate.T) * (x @ weight.T)`` by PyTorch's GEMMs and one launch; nothing of `config` is read."""
    rows = Rows(call.m, call.n, (call.n, call.n), call.dtype, call.device)
    multiply = act_mul(rows, call.activation)

    def run(x, weight, gate):
        (weight, _, bias), (gate, _, gate_bias) = weight, gate
        gate = F.linear(x, gate, gate_bias)
        return multiply(gate, F.linear(x, weight, bias), gate)

    return run
