"""The host's side of a launch: what can be found before is, once, since in eager mode the GPU waits for Python."""

import inspect
import math
import threading
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_fused_mlp.types import Matrix

# What a kernel makes of a `LinearCall`: the function of x, weight and gate (or `ABSENT`) that gives `[*lead, n]`. The
# matrices may be bare tuples.
Linear = Callable[[Tensor, Matrix, Matrix], Tensor]
# the shape and strides of a matrix or stack of them, in elements, and the shape of the tiles that are read or written
Tiling = tuple[list[int], list[int], list[int]]

_thread = threading.local()


def launcher(
    kernel,
    device: torch.device,
    grid: tuple[int, int, int],
    values: tuple,
    tilings: tuple[Tiling | None, ...] = (),
    overlap: bool = False,
    **options,
) -> Callable[..., None]:
    """Gives ``launch(tensors, tiled=())``: ``kernel[grid](*descriptors of tiled, *tensors, *values, **options)``.

    Triton looks at every argument of every launch to find the binary, which takes the host longer than to launch it.
    Here the first launch finds it for all. Triton's launch hooks, which some profilers set, see that one only.

    Args:
        device: where the tensors are, which must be the current one.
        values: the arguments after the tensors, constants included.
        tilings: of each tensor that the kernel reaches through a tensor descriptor; None for those that it can do
            without and that are not given, which come last.
        overlap: begin while the launch before is finishing; the kernel must wait before it reads what that one wrote.

    The tensors of all launches must be of one dtype and None in the same places, and if there is more than one launch,
    their addresses multiples of 16, which lets the binary read 16 bytes at a time; on AMD also on one side of 2 GB.
    """
    if overlap:
        options["launch_pdl"] = True
    kept: tuple[Callable, tuple, _Descriptors] | None = None

    def launch(tensors: tuple[Tensor | None, ...], tiled: tuple[Tensor | None, ...] = ()) -> None:
        nonlocal kept
        if kept is not None:
            run, fixed, descriptors = kept
            addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
            described = descriptors(tiled) if tiled else ()
            run(*grid, torch._C._cuda_getCurrentRawStream(device.index), *fixed, *described, *addresses, *values)
            return
        descriptors = _Descriptors(device, tilings)
        # the interpreter has no binary
        if binary := kernel[grid](*descriptors(tiled), *tensors, *values, **options):
            run, fixed, descriptors.forms = _driver_call(binary)
            kept = run, fixed, descriptors

    return launch


class _Descriptors:
    """Makes the arguments that stand for a launch's tensor descriptors, and keeps what the driver made of an address.

    A tensor map says where a tensor is and how its tiles lie, so at one address it serves for all launches: weights
    stay where they are, and PyTorch's allocator gives out the same memory over and over.
    """

    def __init__(self, device: torch.device, tilings: tuple[Tiling | None, ...]):
        self.device, self.tilings = device, tilings
        # what the driver's launch takes of each descriptor; without, descriptors go to Triton whole
        self.forms: list[Callable[[TensorDescriptor], list]] | None = None
        self.kept: dict[tuple[int, int], list] = {}

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> list:
        arguments: list[Any] = []
        for place, tensor in enumerate(tensors):
            if tensor is None:
                arguments.append(None)
            elif self.forms is None:
                arguments.append(self._descriptor(place, tensor))
            else:
                key = place, tensor.data_ptr()
                form = self.kept.get(key)
                if form is None:
                    form = self.forms[place](self._descriptor(place, tensor))
                    if len(self.kept) >= 4096:
                        self.kept.clear()
                    self.kept[key] = form
                arguments += form
        return arguments

    def _descriptor(self, place: int, tensor: Tensor) -> TensorDescriptor:
        """Without the checks of the constructor; what they check, a family's `supports` has checked."""
        _bind_context(self.device)
        made = object.__new__(TensorDescriptor)
        made.base, made.padding = tensor, "zero"
        made.shape, made.strides, made.block_shape = self.tilings[place]  # type: ignore[misc]
        return made


def _bind_context(device: torch.device) -> None:
    """Gives the thread the GPU's context, as any work of PyTorch's on it does; the driver's tensor maps need one."""
    if not hasattr(_thread, "bound"):
        torch.zeros(1, device=device)
        _thread.bound = True


def _driver_call(binary) -> tuple[Callable, tuple, list | None]:
    """What launches a compiled kernel, and what it takes between the stream and the kernel's own arguments.

    The third is what it takes for each tensor descriptor, as functions of that, or None where it takes descriptors.
    """
    run, function, rest = binary.run, binary.function, (binary.packed_metadata, None, None, None)
    # the Python around the driver's launch has nothing to do but find that no scratch memory is wanted
    known = type(run).__name__ == "CudaLauncher" and triton.__version__.startswith(("3.5.", "3.6."))
    if not known or run.global_scratch_size != 0 or run.profile_scratch_size != 0:
        return run, (function, *rest), None
    fixed = function, run.launch_cooperative_grid, run.launch_pdl, None, None, *rest
    if isinstance(run.launch, FunctionType) and triton.__version__.startswith("3.6."):
        # around it is one that makes tensor maps, anew for each launch
        from triton.backends.nvidia.driver import make_tensordesc_arg

        around = inspect.getclosurevars(run.launch).nonlocals
        if all(around["tensordesc_meta"]):
            forms = [partial(make_tensordesc_arg, metadata=meta) for meta in around["tensordesc_meta"]]
            return around["launcher"], fixed, forms
    return run.launch, fixed, None


def allocator(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Gives ``torch.empty(shape, dtype=dtype, device=device)``; a GPU must be the current one."""
    # Inductor's own, which neither reads arguments of every kind nor goes through PyTorch's dispatcher
    empty_strided = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if empty_strided is None:
        return partial(torch.empty, shape, dtype=dtype, device=device)
    return partial(empty_strided, shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))), dtype)
