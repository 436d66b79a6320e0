"""Both readers of forwards are bounded in time, keep no class alive, and read plain methods only."""

import functools
import gc
import importlib.util
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_fused_mlp import fuse_model, fusion_report
from hf_fused_mlp.reading.mlp import recognise
from hf_fused_mlp.reading.norm import FORMS, find_norm

NORM = "self.weight * ({x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)"


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x):
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
        self.act, self.drop = nn.SiLU(), nn.Dropout()

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.fixture
def module_of(tmp_path):
    """Makes an instance of a class with these methods, which lie in a file."""

    def make(base, *methods):
        file = tmp_path / "written.py"
        lines = [line for method in methods for line in method.splitlines()]
        file.write_text("import torch\nclass Written(Base):\n" + "".join(f"    {line}\n" for line in lines))
        spec = importlib.util.spec_from_file_location("written", file)
        module = importlib.util.module_from_spec(spec)
        module.Base = base
        spec.loader.exec_module(module)
        return module.Written()

    return make


def forward(*lines):
    return "def forward(self, x):\n" + "".join(f"    {line}\n" for line in lines)


LONG = {
    "a tower of gates": [forward(*["x = self.up(x) * self.gate(x)"] * 60, "return x")],
    "halves of halves": [forward(*["x = x.chunk(2, dim=-1)", "x = x[0] * x[1]"] * 60, "return x")],
    "Newton's iteration": [forward(*["x = x * (self.eps + -1 * x)"] * 60, "return x")],
    "sums": [forward(*["x = x + x"] * 60, "return x")],
    "many lines": [forward(*["x = self.drop(x)"] * 20000, "return x")],
    "many casts": [forward(*["x = x.to(torch.float32)"] * 20000, "return x")],
    "a long product": [forward(f"return {' * '.join(['x'] * 900)}")],
    "calls of calls": [forward(f"return {'self.drop(' * 90}x{')' * 90}")],
    "a long chain": [forward(f"return x{'.to(torch.float32)' * 700}")],
    "a comment": [forward("# " + "long " * 100000, "return self.down(self.act(self.up(x)))")],
    "a method that calls itself": ["def again(self, x):\n    return self.again(x)", forward("return self.again(x)")],
    "methods that call each other": [
        "def one(self, x):\n    return self.two(x)",
        "def two(self, x):\n    return self.one(x * x)",
        forward("return self.one(x)"),
    ],
    "methods that call the next one twice": [
        *(f"def m{i}(self, x):\n    return self.m{i + 1}(self.m{i + 1}(x))" for i in range(40)),
        "def m40(self, x):\n    return x",
        forward("return self.m0(x)"),
    ],
}


@pytest.mark.parametrize("base", [MLP, Norm], ids=["MLP", "norm"])
@pytest.mark.parametrize("methods", LONG.values(), ids=LONG)
def test_reading_ends(methods, base, module_of):
    model = nn.ModuleList([module_of(base, *methods)])
    start = time.process_time()
    assert recognise(model[0]) is None and find_norm(model[0]) is None
    fuse_model(model, norms=True)
    assert time.process_time() - start < 2


def test_a_long_sequential_is_no_mlp():
    ends = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)
    model = nn.Sequential(*ends, *(nn.Identity() for _ in range(5000)))
    start = time.process_time()
    assert not fusion_report(nn.ModuleList([model])).select("fusable")
    assert time.process_time() - start < 2
    assert recognise(nn.Sequential(*ends, *(nn.Identity() for _ in range(20)))) is not None


class Loud:
    """Says `torch`, and means something else."""

    float32 = torch.float32
    rsqrt = staticmethod(lambda x: 2 * torch.rsqrt(x))


def same_code(function):
    return function


class KeywordOnly(Norm):
    def forward(self, x, *, torch=Loud):
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Default(Norm):
    def forward(self, x, torch=Loud):
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Starred(Norm):
    def forward(self, x, *torch):
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class DoubleStarred(Norm):
    def forward(self, x, **torch):
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class PositionalOnly(Norm):
    def forward(torch, /, self, x=None):
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Decorated(Norm):
    @same_code
    def forward(self, x):
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Rebound(Norm):
    def forward(self, x):
        torch = Loud
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Nested(Norm):
    def forward(self, x):
        def rsqrt(x):
            return 2 * torch.rsqrt(x)

        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class HelperWithKeyword(Norm):
    def helper(self, x, *, torch=Loud):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self.weight * self.helper(x.to(torch.float32)).to(x.dtype)


class UnusedArgument(Norm):
    def helper(self, x, other):
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def forward(self, x):
        return self.helper(x, x.add_(1))


class StaticHelper(Norm):
    @staticmethod
    def helper(x, eps):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    def forward(self, x):
        return self.weight * self.helper(x.to(torch.float32), self.eps).to(x.dtype)


def closed_over(torch):
    class Closed(Norm):
        def forward(self, x):
            wide = x.to(torch.float32)
            return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    return Closed


@pytest.mark.parametrize(
    "cls",
    [
        *(KeywordOnly, Default, Starred, DoubleStarred, PositionalOnly, Decorated, Rebound, Nested),
        *(HelperWithKeyword, UnusedArgument, StaticHelper, closed_over(Loud)),
    ],
    ids=lambda cls: cls.__name__,
)
def test_norms_that_are_no_plain_methods_are_unknown(cls):
    assert find_norm(Norm()).form == "rounded"
    assert find_norm(cls()) is None


class SelfRebound(MLP):
    def forward(self, x):
        self = self.drop(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class PositionalOnlySelf(MLP):
    def forward(self, /, x, y=None):
        return x.down(F.silu(x.gate(y)) * x.up(y))


class LocalFunction(MLP):
    def forward(self, x):
        F = Loud
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LambdaOfTheSameLine(MLP):
    def forward(self, x, other=lambda self, x: self.down(x)): return self.down(F.silu(self.gate(x)) * self.up(x))  # fmt: skip  # noqa: E501


LambdaOfTheSameLine.forward = LambdaOfTheSameLine.forward.__defaults__[0]


@pytest.mark.parametrize("cls", [SelfRebound, PositionalOnlySelf, LocalFunction, LambdaOfTheSameLine])
def test_mlps_that_are_no_plain_methods_are_unknown(cls):
    assert recognise(MLP()) is not None
    assert recognise(cls()) is None


def test_functions_that_are_replaced_later(monkeypatch):
    """A reading holds for as long as what it rests on does, and again afterwards."""
    module = MLP()
    assert recognise(module) is not None
    with monkeypatch.context() as patched:
        patched.setattr(F, "silu", lambda x: 2 * x)
        assert recognise(module) is None
    assert recognise(module) is not None
    norm = Norm()
    assert find_norm(norm) is not None
    with monkeypatch.context() as patched:
        patched.setitem(globals(), "torch", Loud)
        assert find_norm(norm) is None
    assert find_norm(norm) is not None


def test_code_that_is_replaced_later(monkeypatch):
    class Changing(Norm):
        forward = type(Norm.forward)(Norm.forward.__code__, globals())

    assert find_norm(Changing()).form == "rounded"
    monkeypatch.setattr(Changing.forward, "__code__", FORMS["offset"].__code__)
    assert find_norm(Changing()).form == "offset"

    class ChangingMLP(MLP):
        forward = type(MLP.forward)(MLP.forward.__code__, globals())

    assert recognise(ChangingMLP()) is not None
    monkeypatch.setattr(ChangingMLP.forward, "__code__", SelfRebound.forward.__code__)
    assert recognise(ChangingMLP()) is None


READ = {
    "MLP": (MLP, forward("return self.down(self.act(self.gate(x)) * self.up(x))")),
    "norm": (Norm, f"def helper(self, x):\n    return {NORM.format(x='x')}\n", forward("return self.helper(x)")),
    "other": (MLP, forward("return x + 1")),
}


@pytest.mark.parametrize("methods", READ.values(), ids=READ)
def test_classes_that_were_read_are_collected(methods, module_of):
    """With them their module's globals, and whatever large is in those."""

    def read():
        module = module_of(*methods)
        namespace = type(module).forward.__globals__
        namespace["table"] = torch.zeros(9)
        recognise(module), find_norm(module)
        return [weakref.ref(held) for held in (module, type(module), type(module).forward, namespace["table"])]

    references = read()
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


def test_a_partial_method_is_unknown():
    class Partial(Norm):
        forward = functools.partialmethod(Norm.forward)

    class Static(Norm):
        forward = staticmethod(Norm.forward)

    assert find_norm(Partial()) is None and recognise(Partial()) is None
    assert find_norm(Static()) is None and recognise(Static()) is None
