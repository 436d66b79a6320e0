"""What a timed graph holds, on a GPU of paper."""

from contextlib import nullcontext

import pytest
import torch

from hf_fused_mlp.tuning.timing import Timing, round_robin_graphs


@pytest.mark.parametrize("copies, calls_in_a_graph", [(1, 20), (3, 21), (20, 20), (50, 50)])
def test_a_graph_holds_many_calls_of_each_copy(copies, calls_in_a_graph, monkeypatch):
    called, captured = [], []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 0.5  # milliseconds

    class Graph:
        def replay(self):
            pass

    class capture(nullcontext):
        def __init__(self, graph, capture_error_mode):
            super().__init__()
            assert capture_error_mode == "thread_local"

        def __enter__(self):
            called.clear()

        def __exit__(self, *exception):
            captured.append(list(called))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    calls = [lambda copy=copy: called.append(copy) for copy in range(copies)]
    time = pytest.approx(500 / calls_in_a_graph)
    assert round_robin_graphs({"it": calls}, rounds=2) == {"it": Timing(time, time, time)}
    assert captured == [list(range(copies)) * (calls_in_a_graph // copies)]
