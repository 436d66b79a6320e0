"""Triton helpers that the kernel families share."""

import math
import threading
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

# what a family makes of a `LinearCall`: the function of x, weight, bias, gate and gate_bias that gives `[*lead, n]`
Linear = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]

_thread = threading.local()


def bind_context(device: torch.device) -> None:
    """Gives the thread the GPU's context, as any work of PyTorch's on it does; the driver's tensor maps need one."""
    if not hasattr(_thread, "bound"):
        torch.zeros(1, device=device)
        _thread.bound = True


def descriptor(base: Tensor, shape: list[int], strides: list[int], block_shape: list[int]) -> TensorDescriptor:
    """A `TensorDescriptor` without the checks of its constructor, which take the host longer than to launch a kernel.

    What they check, a family's `supports` has checked.
    """
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape, made.padding = base, shape, strides, block_shape, "zero"
    return made


def launcher(
    kernel, device: torch.device, grid: tuple[int, int, int], values: tuple, overlap: bool = False, **options
) -> Callable[..., None]:
    """Gives ``launch(tensors, descriptors=())``: ``kernel[grid](*descriptors, *tensors, *values, **options)``.

    Triton looks at every argument of every launch to find the binary, which takes the host longer than to launch it.
    Here the first launch finds it for all. Triton's launch hooks, which some profilers set, see that one only.

    Args:
        device: where the tensors are, which must be the current one.
        values: the arguments after the tensors, constants included.
        overlap: begin while the launch before is finishing; the kernel must wait before it reads what that one wrote.

    The tensors of all launches must be of one dtype and None in the same places, and if there is more than one launch,
    their addresses multiples of 16, which lets the binary read 16 bytes at a time; on AMD also on one side of 2 GB.
    """
    if overlap:
        options["launch_pdl"] = True
    kept: tuple[Callable, tuple] | None = None

    def launch(tensors: tuple[Tensor | None, ...], descriptors: tuple = ()) -> None:
        nonlocal kept
        if kept is not None:
            run, fixed = kept
            addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
            run(*grid, torch._C._cuda_getCurrentRawStream(device.index), *fixed, *descriptors, *addresses, *values)
        elif binary := kernel[grid](*descriptors, *tensors, *values, **options):  # the interpreter has none
            kept = _driver_call(binary)

    return launch


def _driver_call(binary) -> tuple[Callable, tuple]:
    """What launches a compiled kernel, and what it takes between the stream and the kernel's own arguments."""
    run, function, rest = binary.run, binary.function, (binary.packed_metadata, None, None, None)
    # the Python around the driver's launch has nothing to do but find that no scratch memory is wanted
    known = type(run).__name__ == "CudaLauncher" and triton.__version__.startswith(("3.5.", "3.6."))
    if known and run.global_scratch_size == run.profile_scratch_size == 0:
        return run.launch, (function, run.launch_cooperative_grid, run.launch_pdl, None, None, *rest)
    return run, (function, *rest)


def allocator(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Gives ``torch.empty(shape, dtype=dtype, device=device)``; a GPU must be the current one."""
    # Inductor's own, which neither reads arguments of every kind nor goes through PyTorch's dispatcher
    empty_strided = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if empty_strided is None:
        return partial(torch.empty, shape, dtype=dtype, device=device)
    return partial(empty_strided, shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))), dtype)


@triton.jit
def divide(a, b, NATIVE: tl.constexpr):
    """``a / b``, in two instructions instead of six where NVIDIA's own will do."""
    if NATIVE:
        return libdevice.fast_dividef(a, b)
    else:
        return a / b


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, SHORT: tl.constexpr):
    """`ACTIVATIONS[ACTIVATION]` of fp32 `x`: the twin of the table in `hf_fused_mlp.activations`.

    SHORT is for results that will be rounded to 16 bits on an NVIDIA GPU: relative errors reach 5e-6.
    """
    # exp2 is the hardware's function, so each constant carries a factor log2(e)
    if ACTIVATION == "silu":
        return divide(x, 1.0 + tl.exp2(-1.4426950408889634 * x), SHORT)
    elif ACTIVATION == "gelu":
        if SHORT:
            # erfc(|x| / sqrt(2)) / 2 is exp(-x^2 / 2) times a polynomial in t, fitted for the relative error
            t = divide(1.0, 1.0 + 0.31 * tl.abs(x), True)
            tail = ((-0.07392665 * t + 0.18044337) * t + 0.01575214) * t + 0.13342605
            tail = ((tail * t + 0.12044216) * t + 0.12386062) * t * tl.exp2(-0.7213475204444817 * x * x)
            return x * tl.where(x < 0, tail, 1.0 - tail)
        else:
            return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(y)) is the logistic function of 2 * y
        return divide(x, 1.0 + tl.exp2(-2.302208198144325 * (x + 0.044715 * x * x * x)), SHORT)
    elif ACTIVATION == "quick_gelu":
        return divide(x, 1.0 + tl.exp2(-2.455466959593048 * x), SHORT)
    elif ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)  # unlike a maximum, it keeps NaN
    elif ACTIVATION == "relu2":
        return tl.where(x < 0, 0.0, x * x)
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
        return x


@triton.jit
def add_bias(acc, bias_ptr, offs, mask, AXIS: tl.constexpr):
    """`acc` (fp32) plus `bias[offs]` broadcast along the new axis `AXIS`; `acc` itself where `bias_ptr` is None."""
    if bias_ptr is None:
        return acc
    else:
        bias = tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        return acc + tl.expand_dims(bias, AXIS)


@triton.jit
def grouped_tile(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Row and column of a tile, in groups of `GROUP_M` rows so that neighbours in time share operands in L2."""
    width = GROUP_M * num_n
    first_m = (tile // width) * GROUP_M
    size_m = min(num_m - first_m, GROUP_M)
    return first_m + (tile % width) % size_m, (tile % width) // size_m
