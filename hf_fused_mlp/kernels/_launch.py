"""The host's side of a launch, most of it computed once: in eager mode the GPU waits for Python."""

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

MOST_KEPT = 4096  # addresses
# why a kernel that multiplies tiles does not run
NO_DOT = "Triton does not use this GPU's tensor cores"

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

    Triton inspects every argument of every launch to find the binary, which takes the host longer than the launch.
    Here the first launch finds the binary for all later ones. Triton's launch hooks, which some profilers set, see
    the first launch only.

    Args:
        device: of the tensors; it must be the current device.
        values: the arguments after the tensors, constants included.
        tilings: one for each tensor that the kernel reads through a tensor descriptor; None, at the end, for those
            that it does without.
        overlap: begin while the previous launch is finishing; the kernel must wait before it reads its output.

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
    """Makes a launch's arguments for tensor descriptors, and caches the driver's tensor maps by address.

    A tensor map holds an address and a tiling, so all launches on one address share it: weights stay where they are,
    and PyTorch's allocator reuses addresses.
    """

    def __init__(self, device: torch.device, tilings: tuple[Tiling | None, ...]):
        self.device, self.tilings = device, tilings
        # what the driver's launch takes for each descriptor; None if it takes whole descriptors
        self.forms: list[Callable[[TensorDescriptor], list]] | None = None
        self.kept: dict[tuple[int, int], list] = {}
        # those of whole launches, by all of their addresses
        self.together: dict[tuple[int | None, ...], list] = {}

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> list:
        if self.forms is None:
            return self._arguments(tensors)
        addresses = tuple([None if tensor is None else tensor.data_ptr() for tensor in tensors])
        arguments = self.together.get(addresses)
        if arguments is None:
            arguments = self._arguments(tensors)
            if len(self.together) >= MOST_KEPT:
                self.together.clear()
            self.together[addresses] = arguments
        return arguments

    def _arguments(self, tensors: tuple[Tensor | None, ...]) -> list:
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
                    if len(self.kept) >= MOST_KEPT:
                        self.kept.clear()
                    self.kept[key] = form
                arguments += form
        return arguments

    def _descriptor(self, place: int, tensor: Tensor) -> TensorDescriptor:
        """A descriptor made without the constructor's checks; a kernel's `supports` has checked the same."""
        _bind_context(self.device)
        made = object.__new__(TensorDescriptor)
        made.base, made.padding = tensor, "zero"
        made.shape, made.strides, made.block_shape = self.tilings[place]  # type: ignore[misc]
        return made


def _bind_context(device: torch.device) -> None:
    """Binds the GPU's context to the thread, which tensor maps need; any work of PyTorch's on the GPU does that."""
    if not hasattr(_thread, "bound"):
        torch.zeros(1, device=device)
        _thread.bound = True


def _driver_call(binary) -> tuple[Callable, tuple, list | None]:
    """The function that launches a compiled kernel, and its arguments between the stream and the kernel's own.

    The third value converts each tensor descriptor to arguments; None if the function takes descriptors.
    """
    run, function, rest = binary.run, binary.function, (binary.packed_metadata, None, None, None)
    # if no scratch memory is wanted, the Python code around the driver's launch can be skipped
    known = type(run).__name__ == "CudaLauncher" and triton.__version__.startswith(("3.5.", "3.6."))
    if not known or run.global_scratch_size != 0 or run.profile_scratch_size != 0:
        return run, (function, *rest), None
    fixed = function, run.launch_cooperative_grid, run.launch_pdl, None, None, *rest
    if isinstance(run.launch, FunctionType) and triton.__version__.startswith("3.6."):
        # a wrapper around it makes new tensor maps for each launch
        from triton.backends.nvidia.driver import make_tensordesc_arg

        around = inspect.getclosurevars(run.launch).nonlocals
        if all(around["tensordesc_meta"]):
            forms = [partial(make_tensordesc_arg, metadata=meta) for meta in around["tensordesc_meta"]]
            return around["launcher"], fixed, forms
    return run.launch, fixed, None


def kept_by_address(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, a function of tensors of always the same shapes and dtypes, called once for each of their addresses.

    For views over borrowed memory (`weights.packing.borrowed`): they keep no tensor alive, and are right for whatever
    tensors of these shapes lie there later.
    """
    kept: dict[tuple[int, ...], list] = {}

    def get(*tensors: Tensor) -> Any:
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        made = kept.get(addresses)  # in a list, because None may be what is made
        if made is None:
            if len(kept) >= MOST_KEPT:
                kept.clear()
            made = kept[addresses] = [make(*tensors)]
        return made[0]

    return get


def allocator(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Gives ``torch.empty(shape, dtype=dtype, device=device)``; a GPU must be the current one."""
    # Inductor's, which skips argument parsing and the dispatcher
    empty_strided = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if empty_strided is None:
        return partial(torch.empty, shape, dtype=dtype, device=device)
    return partial(empty_strided, shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))), dtype)
