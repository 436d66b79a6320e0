"""Steps under `torch.profiler`, and its Chrome trace read: which kernels ran, and for which MLP.

We read the trace rather than the profiler's event objects, because its fields are the same in all versions of PyTorch,
and users keep it. A kernel belongs to the MLP in whose call it was launched; the launch and the kernel share a
correlation number.
"""

import json
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from hf_fused_mlp.profiling.report import Kernel

STEP = "hf_fused_mlp step"
MLP = "hf_fused_mlp mlp "
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")

Event = dict[str, Any]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Work:
    """Work of the device, in microseconds. Work of one launch shares `launch`; the host launched it at `at`."""

    name: str
    start: float
    end: float
    launch: int
    at: float


@dataclass(frozen=True)
class Breakdown:
    """The time of one step, in microseconds.

    Args:
        host_us: the whole step, slowed down by the profiler.
        mlp_host_us: the calls of MLPs in the step.
        busy_us, mlp_us: the time in which the device did any work, and work of MLPs.
        us_by_mlp: `mlp_us` of each MLP, by name.
        launches_per_mlp, mlp_kernels, top_kernels: as in `Form`.
    """

    host_us: float
    mlp_host_us: float
    busy_us: float
    mlp_us: float
    us_by_mlp: dict[str, float]
    launches_per_mlp: float | None
    mlp_kernels: tuple[Kernel, ...]
    top_kernels: tuple[Kernel, ...]


def record(
    step: Callable[[], object], steps: int, mlps: dict[str, nn.Module], on_gpu: bool, file: Path | None = None
) -> Breakdown:
    """Profiles `steps` calls of `step`, after one that only warms up; `file` keeps the Chrome trace.

    Raises:
        RuntimeError: the profiler saw no kernel on the GPU.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with _ranges(mlps), profile(activities=activities) as profiler:
        step()
        for _ in range(steps):
            with record_function(STEP):
                step()
    with tempfile.TemporaryDirectory() as directory:
        path = file or Path(directory, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(), strict=False)["traceEvents"]
    result = breakdown([event for event in events if event.get("ph") == "X"], on_gpu)
    if not result.busy_us:
        raise RuntimeError(
            "the profiler saw no kernels; end other profilers of this GPU, and let this user read its counters (CUPTI)"
        )
    return result


@contextmanager
def _ranges(mlps: dict[str, nn.Module]) -> Iterator[None]:
    """Puts each call of these modules into a range that the profiler shows."""
    entered: list[record_function] = []

    def enter(name, module, args):
        entered.append(record_function(MLP + name))
        entered[-1].__enter__()

    def leave(module, args, output):
        entered.pop().__exit__(None, None, None)

    handles = []
    try:
        for name, module in mlps.items():
            handles.append(module.register_forward_pre_hook(partial(enter, name)))
            handles.append(module.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def breakdown(events: Iterable[Event], on_gpu: bool) -> Breakdown:
    """Turns the trace's complete events ("ph": "X") into figures of one step."""
    events = sorted(events, key=lambda event: (event["ts"], -event["dur"]))
    annotations = [event for event in events if event["cat"] == "user_annotation"]
    steps = _Spans([event for event in annotations if event["name"] == STEP])
    calls = _Spans([event for event in annotations if event["name"].startswith(MLP) and steps.innermost(event["ts"])])
    works = [work for work in _works(events, on_gpu) if steps.innermost(work.at)]

    by_mlp: dict[str, list[Work]] = {}
    for work in works:
        if call := calls.innermost(work.at):
            by_mlp.setdefault(call["name"].removeprefix(MLP), []).append(work)
    of_mlps = [work for owned in by_mlp.values() for work in owned]
    count, called = len(steps.events), len(calls.events)
    return Breakdown(
        host_us=covered(steps.intervals) / count,
        mlp_host_us=covered(calls.intervals) / count,
        busy_us=_busy(works) / count,
        mlp_us=_busy(of_mlps) / count,
        us_by_mlp={name: _busy(owned) / count for name, owned in by_mlp.items()},
        launches_per_mlp=len({work.launch for work in of_mlps}) / called if called else None,
        mlp_kernels=_kernels(of_mlps, called),
        top_kernels=_kernels(works, count)[:10],
    )


class _Spans:
    """Events of one thread, sorted by start; they may be nested."""

    def __init__(self, events: list[Event]):
        self.events, self.intervals = events, [_interval(event) for event in events]
        self.starts = [start for start, _ in self.intervals]
        # for each event the index of the one that contains it, -1 for none
        self.outer: list[int] = []
        for index, start in enumerate(self.starts):
            self.outer.append(self._open(index - 1, start))

    def innermost(self, moment: float) -> Event | None:
        """The innermost event that is open at `moment`."""
        index = self._open(bisect_right(self.starts, moment) - 1, moment)
        return self.events[index] if index >= 0 else None

    def _open(self, index: int, moment: float) -> int:
        """The event at `index`, or the innermost event around it, that is still open at `moment`."""
        while index >= 0 and moment > self.intervals[index][1]:
            index = self.outer[index]
        return index


def covered(intervals: Collection[Interval]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _busy(works: Iterable[Work]) -> float:
    return covered([(work.start, work.end) for work in works])


def _interval(event: Event) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _works(events: list[Event], on_gpu: bool) -> list[Work]:
    if not on_gpu:
        return [Work(op["name"], *_interval(op), launch=i, at=op["ts"]) for i, op in enumerate(_outermost_ops(events))]
    launched = {event["args"].get("correlation"): event["ts"] for event in events if event["cat"] in LAUNCHES}
    works = []
    for event in events:
        if event["cat"] in ON_GPU and (launch := event["args"].get("correlation")) in launched:
            works.append(Work(event["name"], *_interval(event), launch, launched[launch]))
    return works


def _outermost_ops(events: list[Event]) -> Iterator[Event]:
    """The operators of the thread that runs the steps, without those that they call."""
    thread = next(event["tid"] for event in events if event["name"] == STEP)
    reached = float("-inf")
    for event in events:
        if event["cat"] == "cpu_op" and event["tid"] == thread and event["ts"] >= reached:
            reached = event["ts"] + event["dur"]
            yield event


def _kernels(works: Iterable[Work], among: int) -> tuple[Kernel, ...]:
    """Count and total time by kernel name, both divided by `among`; longest first."""
    times: dict[str, list[float]] = {}
    for work in works:
        times.setdefault(work.name, []).append(work.end - work.start)
    kernels = (Kernel(name, len(us) / among, sum(us) / among) for name, us in times.items())
    return tuple(sorted(kernels, key=lambda kernel: -kernel.us))
