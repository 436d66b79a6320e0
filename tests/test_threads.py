"""Several threads on one model, and on several: never an exception, a wrong answer, or a module of mixed classes."""

import contextlib
import copy
import pickle
import random
import sys
import threading
import time
import traceback

import pytest
import torch
from models import as_on_gpu, tiny_config, tiny_model, token_ids
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from hf_fused_mlp import fuse_model, fusion_report, threads, unfuse_model
from hf_fused_mlp.families.mlp.fused import FusedMLP
from hf_fused_mlp.families.norm import FusedRMSNorm
from hf_fused_mlp.swap import Fused
from hf_fused_mlp.weights import is_packed

THREADS = 8
LAYERS = 6
SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2, "mlp_bias": True}

SECONDS = pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.long)])
NORMS = pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])


KINDS = {LlamaMLP: FusedMLP, LlamaRMSNorm: FusedRMSNorm}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = LlamaRMSNorm(12), LlamaMLP(tiny_config(**SIZES))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(LAYERS))).eval()


X = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Threads take turns as often as Python lets them, and fused modules call the operators."""
    as_on_gpu(monkeypatch)
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def assert_whole(module):
    """A module is what it was, or fused as one of its kind is, and nothing in between."""
    cls = type(module)  # read once, since another thread may change it
    original, mixin = next(kind for kind in KINDS.items() if issubclass(cls, kind[0]))
    if cls is original:
        return
    assert [base for base in KINDS.values() if issubclass(cls, base)] == [mixin], cls.__mro__
    assert sum("original_class" in vars(base) for base in cls.__mro__ if base is not Fused) == 1, cls.__mro__
    assert cls.original_class is original
    assert cls.fused_spec is not None


def assert_fused(model, norms):
    for module in parts(model):
        assert_whole(module)
    assert sum(isinstance(module, FusedMLP) for module in model.modules()) == LAYERS
    assert sum(isinstance(module, FusedRMSNorm) for module in model.modules()) == (LAYERS if norms else 0)


def parts(model):
    return [module for module in model.modules() if isinstance(module, tuple(KINDS))]


class Crowd:
    """Threads that do the same things again and again, each in an order of its own, until the time is over.

    On a slow machine they go on until each has done ten.
    """

    def __init__(self, seconds):
        self.end, self.failures, self.calls, self.least = time.monotonic() + seconds, [], 0, 0

    def run(self, *works):
        """`works` are functions of a random generator, one for each thread."""
        barrier, self.least = threading.Barrier(len(works)), 10 * len(works)
        threads = [
            threading.Thread(target=self._repeat, args=(work, random.Random(number), barrier), daemon=True)
            for number, work in enumerate(works)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0, self.end - time.monotonic()) + 60)
        assert not any(thread.is_alive() for thread in threads), "a deadlock"
        assert not self.failures, f"{len(self.failures)} failures after {self.calls} calls:\n{self.failures[0]}"
        assert self.calls > self.least

    def _repeat(self, work, choice, barrier):
        barrier.wait()
        while (time.monotonic() < self.end or self.calls <= self.least) and len(self.failures) < 10:
            try:
                work(choice)
            except BaseException:
                self.failures.append(traceback.format_exc())
            self.calls += 1


@torch.no_grad()
def assert_answers(model, expected):
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)


def assert_gradients(model, expected):
    """With a graph, which keeps weights alive for its backward."""
    x = X.clone().requires_grad_()
    model(x).sum().backward(inputs=[x])
    torch.testing.assert_close(x.grad, expected, atol=1e-5, rtol=1e-5)


def gradients_of(model):
    x = X.clone().requires_grad_()
    model(x).sum().backward(inputs=[x])
    return x.grad


def assert_report(model, norms):
    report = fusion_report(model)
    for statuses, total in ((report.mlps, LAYERS), (report.norms, LAYERS)):
        assert len(statuses) == total, report
        assert {status.state for status in statuses} <= {"fused", "fusable"}, statuses
    if not norms:
        assert all(status.state == "fusable" for status in report.norms), report


@SECONDS
@NORMS
def test_one_model(seconds, norms):
    model, expected, gradients = new_model(), new_model()(X).detach(), gradients_of(new_model())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    identities = [id(parameter) for parameter in model.parameters()]

    def work(choice):
        choice.choice(
            [
                lambda: fuse_model(model, norms=norms, strict=True),
                lambda: fuse_model(model, norms=norms),
                lambda: unfuse_model(model),
                lambda: assert_report(model, norms),
                lambda: assert_answers(model, expected),
                lambda: assert_answers(model, expected),
                lambda: assert_gradients(model, gradients),
            ]
        )()
        for module in parts(model):
            assert_whole(module)

    Crowd(seconds).run(*[work] * THREADS)
    fuse_model(model, norms=norms, strict=True)
    assert_fused(model, norms)
    assert all(is_packed(layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight) for layer in model)
    assert_answers(model, expected)
    unfuse_model(model)
    assert not any(isinstance(module, Fused) for module in model.modules())
    assert_answers(model, expected)
    assert [id(parameter) for parameter in model.parameters()] == identities
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@NORMS
def test_threads_that_fuse_at_once(norms):
    """As a server does that starts several workers: all begin with a model that nobody has looked at yet."""
    expected = new_model()(X).detach()
    for _ in range(10):
        model = new_model()
        states = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        barrier, failures = threading.Barrier(THREADS), []

        def work(model=model, barrier=barrier, failures=failures):
            barrier.wait()
            try:
                fuse_model(model, norms=norms, strict=True)
                assert_answers(model, expected)
            except BaseException:
                failures.append(traceback.format_exc())

        threads = [threading.Thread(target=work) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures, failures[0]
        assert_fused(model, norms)
        assert all(torch.equal(parameter, states[name]) for name, parameter in model.named_parameters())


@SECONDS
def test_several_models(seconds):
    """Classes, specs and what is remembered of calls are shared between models."""
    models = [new_model() for _ in range(THREADS)]
    expected = models[0](X).detach()

    def work_on(model):
        def work(choice):
            for function in choice.choice(
                [(fuse_model, unfuse_model), (lambda model: fuse_model(model, norms=True), unfuse_model)]
            ):
                function(model)
                for module in parts(model):
                    assert_whole(module)
                assert_answers(model, expected)

        return work

    Crowd(seconds).run(*map(work_on, models))


@SECONDS
def test_one_thread_fuses_while_others_copy(seconds):
    """Copies are whole, and hold the right weights."""
    model, expected = new_model(), new_model()(X).detach()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def fuse_and_unfuse(choice):
        fuse_model(model, norms=choice.random() < 0.5)
        unfuse_model(model)

    def pickled(model):
        """pickle itself looks twice at the class of an unfused module, and says so when it has changed."""
        with contextlib.suppress(pickle.PicklingError):
            return pickle.loads(pickle.dumps(model))
        return copy.deepcopy(model)

    def assert_copied(twin):
        for module in parts(twin):
            assert_whole(module)
        assert_values(twin.state_dict())
        assert_answers(twin, expected)

    def assert_values(state):
        for name, value in state.items():
            assert torch.equal(value, before[name]), name

    def work(choice):
        choice.choice(
            [
                lambda: assert_copied(copy.deepcopy(model)),
                lambda: assert_copied(pickled(model)),
                lambda: assert_values(model.state_dict()),
                lambda: assert_answers(model, expected),
            ]
        )()

    Crowd(seconds).run(fuse_and_unfuse, *[work] * (THREADS - 1))
    unfuse_model(model)
    assert_values(model.state_dict())


@SECONDS
def test_one_thread_moves_the_model_while_others_report(seconds):
    """`_apply` packs again; reports and further fusing wait for it, or see the model before or after."""
    model, expected = fuse_model(new_model()), new_model()(X).detach()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def move(choice):
        model.to("cpu")
        model._apply(torch.clone)

    def work(choice):
        choice.choice([lambda: fuse_model(model), lambda: fusion_report(model)])()
        for module in parts(model):
            assert_whole(module)

    Crowd(seconds).run(move, *[work] * (THREADS - 1))
    assert_answers(model, expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@SECONDS
def test_calls_beside_a_model_that_is_fused_and_unfused(seconds):
    """Forwards of a whole Transformers model, of several lengths, while one thread changes it."""
    model = tiny_model()
    inputs = [torch.arange(2, 2 + length)[None] for length in (1, 5, 9)]
    with torch.no_grad():
        expected = [model(ids).logits for ids in inputs]

    def fuse_and_unfuse(choice):
        fuse_model(model, norms=choice.random() < 0.5)
        unfuse_model(model)

    @torch.no_grad()
    def call(choice):
        number = choice.randrange(len(inputs))
        torch.testing.assert_close(model(inputs[number]).logits, expected[number], atol=1e-5, rtol=1e-5)

    Crowd(seconds).run(fuse_and_unfuse, fuse_and_unfuse, *[call] * (THREADS - 2))


def test_a_model_inside_a_model():
    """Threads that fuse the whole, and parts of it, which a lock of the whole does not guard by itself."""
    model, expected = new_model(), new_model()(X).detach()

    def work(choice):
        part = choice.choice([model, *model, *[layer.mlp for layer in model]])
        choice.choice([fuse_model, unfuse_model, fusion_report])(part)
        assert_answers(model, expected)
        for module in parts(model):
            assert_whole(module)

    Crowd(3).run(*[work] * THREADS)


def test_a_call_that_waits_is_waited_for_once(monkeypatch):
    """Memory that it may still read is kept until it has ended."""
    as_on_gpu(monkeypatch)
    model, inside, go = tiny_model(num_hidden_layers=4), threading.Event(), threading.Event()
    handle = model.register_forward_pre_hook(lambda *args: inside.set() or (go.wait(60) and None))
    thread = threading.Thread(target=lambda: model(token_ids(1, 3)))
    thread.start()
    inside.wait()
    start = time.monotonic()
    fuse_model(model)
    assert time.monotonic() - start < 5
    assert threads._waiting
    go.set()
    thread.join()
    handle.remove()
    fuse_model(tiny_model())
    assert not threads._waiting
