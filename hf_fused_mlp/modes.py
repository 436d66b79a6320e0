"""Detects what watches or changes a call: autograd, torch.compile, autocast, function modes, transforms, exports.

Also says where kernels run at all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext

from hf_fused_mlp.types import GPU

HAS_TRITON = find_spec("triton") is not None


FIRST = 7, 5  # the first compute capability that has kernels
COMPLETE = 8, 0  # and the first that has all of them, and bfloat16


def no_kernels(device: torch.device, dtype: torch.dtype | None = None, least: tuple[int, int] = FIRST) -> str | None:
    """The reason why no kernel of ours runs on `device`, or None.

    Args:
        dtype: of the tokens; None asks about any.
        least: the compute capability that the kernels in question need.
    """
    if device.type != "cuda":
        return f"on {device}, where the original forward runs; move the model to a GPU"
    if not HAS_TRITON:
        return "Triton is not installed; install triton for your platform"
    # not checked while compiling, because it would break the graph; the operators then run PyTorch's GEMMs
    if torch.compiler.is_compiling():
        return None
    # fake tensors may claim a device that does not exist
    if not torch.cuda.is_initialized() and not torch.cuda.is_available():
        return f"on {device}, which PyTorch does not find here"
    return no_kernels_on(GPU.of(device), dtype, least)


def no_kernels_on(gpu: GPU, dtype: torch.dtype | None = None, least: tuple[int, int] = FIRST) -> str | None:
    """The reason why no kernel of ours runs on `gpu`, or None; see `no_kernels`."""
    if gpu.capability < least:
        return f"no kernels for {gpu.name}; they need CUDA compute capability {'.'.join(map(str, least))} or later"
    if gpu.capability < COMPLETE and dtype not in (None, torch.float16):
        return f"no kernels for {dtype} on {gpu.name}; load as float16"
    return None


def why_variant(storage: str | None, dtype: torch.dtype, gpu: GPU) -> str | None:
    """Why no kernels for weights stored so (`types.storage_of`) have sums that ignore the token count, or None."""
    if not gpu.has_dot:
        return f"no kernels for {gpu.name} have sums that ignore the token count"
    if storage != "float":
        how = {"fp8": "as FP8", "transposed": "as [in, out], as in Conv1D,"}.get(storage or "", "in several ways")
        return f"no kernels for weights stored {how} have sums that ignore the token count"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"no kernels for {dtype} have sums that ignore the token count; load as bfloat16 or float16"
    return None


def needs_only_output(x: Tensor) -> bool:
    """True if the caller needs only the output: no autograd, mode or transform.

    Traces and autocast are not checked here: they change the dispatch keys of tensors, which `launch_cache` compares.
    """
    return (
        type(x) is Tensor
        and not x.is_nested
        and not torch.is_grad_enabled()
        and _len_torch_dispatch_stack() == 0
        and (_len_torch_function_stack() == 0 or not is_watched())
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def runs_now(x: Tensor) -> bool:
    """True if a call may skip PyTorch's dispatcher: on a GPU, with no graph, trace, gradient or cast.

    The dispatcher takes as much host time as a launch.
    """
    return (
        not torch.compiler.is_compiling()
        and needs_only_output(x)
        and x.is_cuda
        and x.layout is torch.strided
        and not x.is_neg()
        and torch._C._get_tracing_state() is None
        and not torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
        and not torch._C._is_any_autocast_enabled()
    )


def is_ordinary(x: Tensor) -> bool:
    """True if `x` is a strided tensor and no hook, mode or transform intercepts operations on it."""
    return (
        x.layout is torch.strided
        and not x.is_nested
        and not _has_any_global_hook()
        and not is_watched()
        and not _is_exporting()
        and (torch.compiler.is_compiling() or _is_real(x))
    )


def is_watched() -> bool:
    """True if a `TorchFunctionMode` other than `with torch.device(...)` intercepts function calls."""
    modes = _len_torch_function_stack()
    # the device mode is always the lowest, and stays forever after `torch.set_default_device`
    return modes > 1 or (modes == 1 and type(torch._C._get_function_stack_at(0)) is not DeviceContext)


def is_transformed() -> bool:
    """True inside `torch.func` transforms and forward-mode differentiation, for which our operators have no rules."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def autocasts() -> bool:
    """True if autocast is enabled on GPUs: projections then cast, and the operator does not."""
    return torch.is_autocast_enabled("cuda")


def _is_real(x: Tensor) -> bool:
    """True if operations on `x` run immediately, under no mode or transform."""
    return type(x) in (Tensor, nn.Parameter) and _len_torch_dispatch_stack() == 0 and not is_transformed()


def _is_exporting() -> bool:
    """True if a program is being exported to a place that may not know our operators."""
    # we read the flag, because dynamo of torch 2.11 treats `torch.compiler.is_exporting()` as always true
    return torch.compiler._is_exporting_flag or (
        not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None
    )


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """A context in which `models` are in evaluation mode; afterwards every module has its former mode."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
