"""What was replaced, before or after the import, is called and never bypassed."""

import copy
import functools
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models import as_on_gpu, tiny_model, token_ids
from torch import nn
from torch.nn.functional import silu
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import GELUActivation, QuickGELUActivation, SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import hf_fused_mlp.reference
from hf_fused_mlp import fuse_model, fusion_report
from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.originals import are_own_at_a_glance, functions_are_own, is_own, runs_own_forward
from hf_fused_mlp.reading.activations import find_activation


class MLP(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act = act

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class InlineMLP(MLP):
    def __init__(self):
        super().__init__(None)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def doubled(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return 2 * function(*args, **kwargs)

    return wrapper


# what is replaced, and a module that it matters to
FUNCTIONS = {
    "linear": ((F, "linear"), lambda: MLP(nn.SiLU())),
    "silu": ((F, "silu"), lambda: MLP(nn.SiLU())),
    "silu, inline": ((F, "silu"), InlineMLP),
    "silu of Transformers": ((F, "silu"), lambda: MLP(SiLUActivation())),
    "gelu": ((F, "gelu"), lambda: MLP(nn.GELU())),
    "relu": ((F, "relu"), lambda: MLP(nn.ReLU())),
    "sigmoid": ((torch, "sigmoid"), lambda: MLP(QuickGELUActivation())),
}
FORWARDS = {
    "nn.Linear": ((nn.Linear, "forward"), lambda: MLP(nn.SiLU())),
    "nn.SiLU": ((nn.SiLU, "forward"), lambda: MLP(nn.SiLU())),
    "SiLUActivation": ((SiLUActivation, "forward"), lambda: MLP(SiLUActivation())),
    "GELUActivation": ((GELUActivation, "forward"), lambda: MLP(GELUActivation())),
    "LlamaMLP": ((LlamaMLP, "forward"), lambda: tiny_model().model.layers[0].mlp),
}
TARGETS = FUNCTIONS | FORWARDS


class OperatorsOwnFunctions:
    """What the operator's form for the CPU calls: a kernel sees no patch."""

    linear, gelu, silu, relu = staticmethod(F.linear), staticmethod(F.gelu), staticmethod(F.silu), staticmethod(F.relu)


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    as_on_gpu(monkeypatch)
    monkeypatch.setattr(hf_fused_mlp.reference, "F", OperatorsOwnFunctions)


@pytest.mark.parametrize("target, make", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_replaced_around_fusing(target, make, when, monkeypatch):
    module = make().eval()
    x = torch.randn(2, module.down.in_features - 4 if hasattr(module, "down") else 64)
    model = nn.ModuleList([module])
    if when == "after":
        fuse_model(model, strict=True)
        module(x)
    plain = module(x)
    monkeypatch.setattr(*target, doubled(getattr(*target)))
    if when == "before":
        fuse_model(model)
    assert functions_are_own() == (target[0] not in (F, torch))
    expected = getattr(type(module), "original_class", type(module)).forward(module, x)
    assert not torch.allclose(expected, plain)
    torch.testing.assert_close(module(x), expected)
    (mlp,) = fusion_report(model).mlps
    assert mlp.reason is not None


class Called(TorchFunctionMode):
    """Notes which functions of PyTorch are called."""

    def __enter__(self):
        self.functions = []
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name, path", [(row.name, path) for row in ACTIVATIONS.values() for path in row.classes], ids=lambda value: value
)
def test_whatever_an_activation_calls_is_watched(name, path, monkeypatch):
    """By name, in `torch` and `torch.nn.functional`: a new row is, or this fails."""
    module_name, _, class_name = path.partition("(")[0].rpartition(".")
    approximate = path.partition("(")[2].rstrip(")")
    module = getattr(sys.modules[module_name], class_name)(*filter(None, [approximate]))
    assert find_activation(module) == name
    x = torch.randn(3)
    with Called() as called:
        module(x)
    items = [(owner, key, value) for owner in (F, torch) for key, value in vars(owner).items() if callable(value)]
    named = [(owner, key) for owner, key, value in items if any(value is function for function in called.functions)]
    assert are_own_at_a_glance(name)
    for target in named:
        with monkeypatch.context() as patch:
            patch.setattr(*target, doubled(getattr(*target)))
            assert not functions_are_own(), target
            assert not are_own_at_a_glance(name), target


def test_an_activation_without_a_row_of_its_own_is_watched(monkeypatch):
    assert are_own_at_a_glance("a new one")
    monkeypatch.setattr(torch, "erf", doubled(torch.erf))
    assert not are_own_at_a_glance("a new one")


@pytest.mark.parametrize("name", ["linear", "silu", "nn.Linear", "nn.SiLU", "LlamaMLP"])
@torch.no_grad()
def test_replaced_before_compiling(name, monkeypatch):
    """What is traced is what would run."""
    target, make = TARGETS[name]
    original = make().eval()
    module = copy.deepcopy(original)
    x = torch.randn(2, 64 if name == "LlamaMLP" else 8)
    fuse_model(nn.ModuleList([module]), strict=True)
    real = getattr(*target)
    monkeypatch.setattr(*target, lambda *args, **kwargs: 2 * real(*args))
    torch.compiler.reset()
    expected = torch.compile(original, backend="eager")(x)
    torch.testing.assert_close(torch.compile(module, backend="eager")(x), expected)


@pytest.mark.parametrize("name", ["linear", "silu"])
@torch.no_grad()
def test_replaced_after_compiling(name, monkeypatch):
    target, make = FUNCTIONS[name]
    original, x = make().eval(), torch.randn(2, 8)
    module = copy.deepcopy(original)
    fuse_model(nn.ModuleList([module]), strict=True)
    torch.compiler.reset()
    forms = [torch.compile(form, backend="eager") for form in (original, module)]
    plain, real = [form(x) for form in forms], getattr(*target)
    monkeypatch.setattr(*target, lambda *args, **kwargs: 2 * real(*args))
    expected, found = (form(x) for form in forms)
    assert not torch.allclose(found, plain[1])
    torch.testing.assert_close(found, expected)


def test_replaced_before_the_import():
    """What was there first is not trusted either; once a function is PyTorch's again, the kernels may run."""
    code = """
        import functools, torch, torch.nn.functional as F
        from torch import nn
        def doubled(function):
            return functools.wraps(function)(lambda *args, **kwargs: 2 * function(*args, **kwargs))
        targets = [(F, "linear"), (F, "silu"), (F, "gelu"), (nn.Linear, "forward"), (nn.SiLU, "forward")]
        real = {target: getattr(*target) for target in targets}
        for target in targets:
            setattr(*target, doubled(real[target]))
        from hf_fused_mlp.originals import functions_are_own, runs_own_forward, why_functions_are_not_own
        assert not functions_are_own() and not runs_own_forward(nn.Linear) and not runs_own_forward(nn.SiLU)
        assert "torch.nn.functional.linear was replaced by __main__.double" in why_functions_are_not_own()
        for target in targets:
            setattr(*target, real[target])
        assert why_functions_are_not_own() is None and functions_are_own()
        assert runs_own_forward(nn.Linear) and runs_own_forward(nn.SiLU)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@torch.no_grad()
def test_counting_operations():
    """A profiler's patch of `F.linear` sees what it sees of the original."""
    counts = []
    for fuse in (lambda model: model, fuse_model):
        model, real, seen = fuse(tiny_model()), F.linear, []

        def counted(x, weight, bias=None, real=real, seen=seen):
            seen.append(x.numel() * weight.shape[0])
            return real(x, weight, bias)

        F.linear = counted
        try:
            model(token_ids(1, 5))
        finally:
            F.linear = real
        counts.append(sum(seen))
    assert counts[0] == counts[1] > 0


def test_names_prove_nothing():
    wrapped = doubled(F.silu)
    assert (wrapped.__module__, wrapped.__qualname__) == (F.silu.__module__, F.silu.__qualname__)
    assert is_own(F.silu, "torch.nn.functional", "silu")
    assert not is_own(wrapped, "torch.nn.functional", "silu")
    assert not is_own(F.relu, "torch.nn.functional", "silu")
    lookalike = type("SiLU", (nn.Module,), {"forward": lambda self, x: x, "__module__": nn.SiLU.__module__})
    assert not runs_own_forward(lookalike)
    assert runs_own_forward(nn.SiLU)


class ByName(MLP):
    def __init__(self):
        super().__init__(None)

    def forward(self, x):
        return self.down(silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("name, cls", [("silu", ByName), ("F", InlineMLP)], ids=["silu", "F"])
@torch.no_grad()
def test_a_name_of_the_module_is_given_another_meaning(name, cls, monkeypatch):
    module, x = cls().eval(), torch.randn(2, 8)
    fuse_model(nn.ModuleList([module]), strict=True)
    plain = module(x)
    other = doubled(F.silu) if name == "silu" else SimpleNamespace(silu=doubled(F.silu))
    monkeypatch.setitem(globals(), name, other)
    expected = cls.forward(module, x)
    assert not torch.allclose(expected, plain)
    torch.testing.assert_close(module(x), expected)
    assert "was replaced" in fusion_report(nn.ModuleList([module])).mlps[0].reason
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(module, backend="eager")(x), expected)


@pytest.mark.parametrize("of", ["MLP", "nn.Linear", "norm", "helper of a norm"])
@torch.no_grad()
def test_the_code_of_a_function_is_replaced(of, monkeypatch):
    """As autoreload does it: the function stays the same object."""
    model, x = nn.ModuleList([SquareMLP(), LlamaRMSNorm(8), Helped()]).eval(), torch.randn(2, 8)
    fuse_model(model, strict=True, norms=True)
    index = {"MLP": 0, "nn.Linear": 0, "norm": 1, "helper of a norm": 2}[of]
    module = model[index]
    function = {"MLP": SquareMLP.forward, "nn.Linear": nn.Linear.forward, "norm": LlamaRMSNorm.forward}.get(
        of, Helped._norm
    )
    other = {"helper of a norm": lambda self, x: 7 * x, "nn.Linear": lambda self, input: 2 * input}.get(
        of, lambda self, hidden_states: 7 * hidden_states
    )
    monkeypatch.setattr(function, "__code__", other.__code__)
    assert torch.equal(module(x), module.original_class.forward(module, x))
    report = fusion_report(model)
    assert (report.mlps + report.norms)[index].reason is not None


class SquareMLP(MLP):
    def __init__(self):
        super().__init__(nn.SiLU())
        self.gate, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Helped(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self._norm(x.float()).type_as(x) * self.weight


@pytest.mark.parametrize("name", ["__call__", "_call_impl"])
@torch.no_grad()
def test_calls_of_modules_are_replaced(name, monkeypatch):
    """Tracers see the calls of every child."""
    module, x = MLP(nn.SiLU()).eval(), torch.randn(2, 8)
    fuse_model(nn.ModuleList([module]), strict=True)
    module(x)
    seen, real = [], getattr(nn.Module, name)
    monkeypatch.setattr(
        nn.Module, name, lambda self, *args, **kwargs: seen.append(self) or real(self, *args, **kwargs)
    )
    module(x)
    assert {id(child) for child in module.children()} <= {id(called) for called in seen}


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_another_class_in_the_place_of_linear(when, monkeypatch):
    """Emulators of number formats put their own class there."""
    if when == "before":
        monkeypatch.setattr(nn, "Linear", Halved)
    module, x = MLP(nn.SiLU()).eval(), torch.randn(2, 8)
    for name in ("gate", "up", "down"):
        setattr(module, name, Halved(*module.get_submodule(name).weight.shape[::-1]).eval())
    expected = module(x)
    monkeypatch.setattr(nn, "Linear", Halved)
    fuse_model(nn.ModuleList([module]))
    torch.testing.assert_close(module(x), expected)
    assert "expected nn.Linear" in fusion_report(nn.ModuleList([module])).mlps[0].reason


class Doubled(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.ops.aten.addmm.default else out


@torch.no_grad()
def test_a_mode_that_changes_operations():
    module, x = MLP(nn.SiLU()).eval(), torch.randn(2, 8)
    with Doubled():
        expected = module(x)
    fuse_model(nn.ModuleList([module]), strict=True)
    with Doubled():
        torch.testing.assert_close(module(x), expected)
