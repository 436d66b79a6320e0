"""Synchronizes threads that fuse, unfuse, report on and call one model."""

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward

# held while the classes of modules are read or changed; one lock for all models, since models may share modules
LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child process must not inherit it locked
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)

_CALL = nn.Module._wrapped_call_impl.__code__
_BACKWARD = _engine_run_backward.__code__

# calls that did not end in time, with the memory that each may still read
_waiting: list[tuple[list[FrameType], list[Tensor]]] = []


def free_when_unread(replaced: list[Tensor], module: nn.Module, seconds: float = 2.0) -> None:
    """Drops the former weights of `module` once no other thread can be reading them.

    A thread that called the module before the weights were replaced may be in the middle of a GEMM. This waits for it
    once, and for the GPU. If the call takes more than `seconds`, the memory is dropped later.
    """
    if not replaced:
        return
    calls = list(_calls_of(module))
    slow = [call for known, _ in _waiting for call in known]
    deadline = time.monotonic() + seconds
    while _still(calls, module, but=slow) and time.monotonic() < deadline:
        time.sleep(0.001)
    if calls := _still(calls, module):
        _waiting.append((calls, list(replaced)))
    elif replaced[0].is_cuda:
        torch.cuda.synchronize(replaced[0].device)
    replaced.clear()
    _waiting[:] = [(known, kept) for known, kept in _waiting if _still(known)]


def _still(calls: list[FrameType], module: nn.Module | None = None, but: Sequence[FrameType] = ()) -> list[FrameType]:
    """The `calls` that are still running, without those in `but`."""
    if not calls:
        return []
    running = list(_calls_of(module))
    return [call for call in calls if any(call is one for one in running) and not any(call is one for one in but)]


def _calls_of(module: nn.Module | None) -> Iterator[FrameType]:
    """The calls in other threads that may run `module` (None: any): of modules around it, and every backward."""
    for thread, top in sys._current_frames().items():
        frame: FrameType | None = None if thread == threading.get_ident() else top
        while frame is not None:
            called = frame.f_locals.get("self") if frame.f_code is _CALL else None
            if frame.f_code is _BACKWARD or (called is not None and (module is None or _contains(called, module))):
                yield frame
            frame = frame.f_back


def _contains(outer: object, module: nn.Module) -> bool:
    return isinstance(outer, nn.Module) and any(inner is module for inner in outer.modules())
