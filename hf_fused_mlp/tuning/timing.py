"""Times GPU work so that two implementations can be compared.

A card slows down as it warms up, so implementations take turns, in random order, within one run; and weights that a
model would read from memory are not left in the L2 cache between calls.
"""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

K = TypeVar("K")

QUEUE_CYCLES = 8_000_000  # about 4 ms, in which the host enqueues a turn
GRAPHS_UP_TO = 256  # tokens; beyond, a call runs long enough that its launches do not show
GRAPH_CALLS = 20  # at least; launching a graph takes microseconds, which one call alone would be charged with


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: the median, and the 20th and 80th percentiles."""

    median_us: float
    p20_us: float
    p80_us: float


def round_robin(calls: Mapping[K, Callable[[], object]], rounds: int = 10, repeats: int = 4) -> dict[K, Timing]:
    """Times each call with events, `repeats` times in a row in each of `rounds` turns, the L2 flushed before each.

    Before a turn the GPU is put to sleep, so that its whole queue is written when it starts. The times then exclude
    the host's time, which differs between implementations.
    """
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def measure(call: Callable[[], object]) -> list[float]:
        torch.cuda._sleep(QUEUE_CYCLES)
        spans = [_record(call, before=flush.zero_) for _ in range(repeats)]
        return [_elapsed_us(*span) for span in spans]

    return _in_turn({name: partial(measure, call) for name, call in calls.items()}, rounds)


def round_robin_graphs(calls: Mapping[K, Sequence[Callable[[], object]]], rounds: int = 20) -> dict[K, Timing]:
    """Times calls inside CUDA graphs: the cost of launches on the GPU, without Python's time.

    Each entry lists one call for every copy of the weights; together the copies should exceed the L2. A graph runs all
    of them in turn, again and again up to `GRAPH_CALLS` calls, as a model's graph runs its layers. The time given is
    that of one call.
    """

    def capture(copies: Sequence[Callable[[], object]]) -> Callable[[], list[float]]:
        for call in copies:
            call()
        in_graph = list(copies) * -(-GRAPH_CALLS // len(copies))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may allocate
            for call in in_graph:
                call()
        return lambda: [_elapsed_us(*_record(graph.replay, before=graph.replay)) / len(in_graph)]

    return _in_turn({name: capture(copies) for name, copies in calls.items()}, rounds)


def weight_copies(weight_bytes: int) -> int:
    """How many copies of the weights to rotate so that a call never finds its weights in the L2."""
    return 1 + 3 * torch.cuda.get_device_properties("cuda").L2_cache_size // weight_bytes


def _record(call: Callable[[], object], before: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before()
    start.record()
    call()
    end.record()
    return start, end


def _elapsed_us(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _in_turn(measures: dict[K, Callable[[], list[float]]], rounds: int) -> dict[K, Timing]:
    names = list(measures)
    times: dict[K, list[float]] = {name: [] for name in names}
    for name in names:
        measures[name]()
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            times[name] += measures[name]()
    return {name: _summary(values) for name, values in times.items()}


def _summary(values: list[float]) -> Timing:
    cuts = statistics.quantiles(values, n=10)
    return Timing(statistics.median(values), cuts[1], cuts[7])
