"""What keeps threads apart that fuse, unfuse, report on and call one model."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward

# held by whoever looks at the classes of a model's modules or changes them; models share modules, so all share it
LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child process must not inherit it locked
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)

_CALL = nn.Module._wrapped_call_impl.__code__
_BACKWARD = _engine_run_backward.__code__

# memory that a thread may still read which did not finish in time
_kept: list[list[Tensor]] = []


def free_when_unread(replaced: list[Tensor], module: nn.Module, seconds: float = 10.0) -> None:
    """Drops tensors that were the weights of `module` once no other thread can be reading them.

    A thread that began a call before the weights were replaced may be in the middle of a GEMM: it is waited for, and
    so is the GPU. Memory of calls that take longer than `seconds` is never freed.
    """
    if not replaced:
        return
    calls = list(_calls_of(module))
    deadline = time.monotonic() + seconds
    while calls and time.monotonic() < deadline:
        time.sleep(0.001)
        running = list(_calls_of(module))
        calls = [call for call in calls if any(call is other for other in running)]
    if calls:
        _kept.append(list(replaced))
    elif replaced[0].is_cuda:
        torch.cuda.synchronize(replaced[0].device)
    replaced.clear()


def _calls_of(module: nn.Module) -> Iterator[FrameType]:
    """The calls in other threads in which `module` may run: of modules that contain it, and every backward."""
    for thread, top in sys._current_frames().items():
        frame: FrameType | None = None if thread == threading.get_ident() else top
        while frame is not None:
            if frame.f_code is _BACKWARD or (frame.f_code is _CALL and _contains(frame.f_locals.get("self"), module)):
                yield frame
            frame = frame.f_back


def _contains(outer: object, module: nn.Module) -> bool:
    return isinstance(outer, nn.Module) and any(inner is module for inner in outer.modules())
