"""Reading forwards: what is an MLP is known whatever its names, and what only looks like one is not."""

import functools
import sys

import pytest
import torch
import torch.nn.functional as F
from models import as_on_gpu, assert_fused_computes_the_same
from torch import nn

from hf_fused_mlp import fuse_model, fusion_report
from hf_fused_mlp.reading.mlp import MLPSpec, recognise

H, I = 12, 20


class Gated(nn.Module):
    """A gated MLP under names of its own; the classes below compute other things with the same children."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.back = nn.Linear(H, I), nn.Linear(H, I), nn.Linear(I, H)
        self.bend, self.drop, self.norm = nn.SiLU(), nn.Dropout(0.5), nn.LayerNorm(I)
        self.scale = 2.0

    def forward(self, tokens):
        """Gate first."""
        bent = self.bend(self.narrow(tokens))
        return self.back(bent * self.wide(tokens))


class UpFirst(Gated):
    def forward(self, tokens, unused=None):
        out = self.wide(tokens) * self.bend(self.narrow(tokens))
        return self.back(self.drop(out))


class WithFunctions(Gated):
    def forward(self, x):
        x = F.silu(self.narrow(x)) * self.wide(x)
        x = F.dropout(x, p=0.3, training=self.training)
        return self.back(x)


class WithCast(Gated):
    def forward(self, x):
        h = self.bend(self.narrow(x)) * self.wide(x)
        if isinstance(self.back.weight, torch.Tensor) and h.dtype != self.back.weight.dtype:
            h = h.to(self.back.weight.dtype)
        return self.back(h)


class Plain(Gated):
    def forward(self, x):
        return self.back(self.drop(torch.nn.functional.relu(self.wide(x))))


class Half(Gated):
    def forward(self, x):
        x = self.wide(x)
        return self.bend(x)


class Packed(Gated):
    def __init__(self, up_first=False):
        super().__init__()
        self.both = nn.Linear(H, 2 * I)

    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.back(up * self.bend(gate))


class PackedUpFirst(Packed):
    def forward(self, x):
        halves = self.both(x).chunk(2, dim=-1)
        return self.back(halves[0] * self.bend(halves[1]))


GATED = {"gate": "narrow", "up": "wide", "down": "back"}
KNOWN = {
    Gated: MLPSpec("gated", **GATED, activation="bend"),
    UpFirst: MLPSpec("gated", **GATED, activation="bend", dropouts=("drop",)),
    WithFunctions: MLPSpec("gated", **GATED, function="silu", other_steps=True),
    WithCast: MLPSpec("gated", **GATED, activation="bend", other_steps=True),
    Plain: MLPSpec("plain", up="wide", down="back", function="relu", dropouts=("drop",)),
    Half: MLPSpec("half", up="wide", activation="bend"),
    Packed: MLPSpec("packed", up="both", down="back", activation="bend"),
    PackedUpFirst: MLPSpec("packed", up="both", down="back", activation="bend", up_first=True),
}


@pytest.mark.parametrize("cls", KNOWN, ids=lambda cls: cls.__name__)
def test_known_equations(cls):
    assert recognise(cls()) == KNOWN[cls]
    assert_fused_computes_the_same(cls())


def test_sequential():
    module = nn.Sequential(nn.Linear(H, I), nn.Dropout(0.1), nn.GELU(), nn.Linear(I, H), nn.Identity())
    assert recognise(module) == MLPSpec(
        "plain", up="0", down="3", activation="2", dropouts=("1", "4"), sequence=tuple("01234")
    )
    assert_fused_computes_the_same(module)
    assert recognise(nn.Sequential(nn.Linear(H, I), nn.GELU())) is None
    assert recognise(nn.Sequential(*(nn.Linear(H, H) for _ in range(3)))) is None


def test_up_first_and_inline_activation_run_through_the_module(monkeypatch):
    for cls in (PackedUpFirst, WithFunctions, Plain):
        module = cls().eval()
        x = torch.randn(5, H)
        with torch.no_grad():
            expected = module(x)
            fuse_model(module, strict=True)
            with monkeypatch.context() as patch:
                as_on_gpu(patch)
                torch.testing.assert_close(module(x), expected)


class Clamp(Gated):
    def forward(self, x):
        return self.back(self.bend(self.narrow(x)).clamp(max=7.0) * self.wide(x))


class Multiplier(Gated):
    def forward(self, x):
        return self.back(self.bend(self.narrow(x)) * self.wide(x)) * self.scale


class Constant(Gated):
    def forward(self, x):
        return self.back(self.bend(self.narrow(x)) * self.wide(x) * 2)


class Residual(Gated):
    def forward(self, x):
        return x + self.back(self.bend(self.narrow(x)) * self.wide(x))


class Norm(Gated):
    def forward(self, x):
        return self.back(self.norm(self.bend(self.narrow(x)) * self.wide(x)))


class Float(Gated):
    def forward(self, x):
        return self.back((self.bend(self.narrow(x).float()) * self.wide(x)).to(x.dtype))


class ActivatedTwice(Gated):
    def forward(self, x):
        return self.back(self.bend(self.bend(self.narrow(x))) * self.wide(x))


class NoActivation(Gated):
    def forward(self, x):
        return self.back(self.narrow(x) * self.wide(x))


class GateOfTheHalves(Packed):
    def forward(self, x):
        gate, _ = self.both(x).chunk(2, dim=-1)
        return self.back(self.bend(gate) * gate)


class ChunkOfTokens(Packed):
    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=0)
        return self.back(self.bend(gate) * up)


class AlwaysDrops(Gated):
    def forward(self, x):
        return self.back(F.dropout(self.bend(self.narrow(x)) * self.wide(x), p=0.5))


class OneProjectionTwice(Gated):
    def forward(self, x):
        return self.back(self.bend(self.wide(x)) * self.wide(x))


class TwoArguments(Gated):
    def forward(self, x, y):
        return self.back(self.bend(self.narrow(x)) * self.wide(y))


class ReadsADefault(Gated):
    def forward(self, x, y=None):
        return self.back(self.bend(self.narrow(x)) * self.wide(y))


class TanhGelu(Gated):
    def forward(self, x):
        return self.back(F.gelu(self.narrow(x), approximate="none") * self.wide(x))


class Branch(Gated):
    def forward(self, x):
        if self.scale > 1:
            x = self.norm(x)
        return self.back(self.bend(self.narrow(x)) * self.wide(x))


class Called(Gated):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Inner(Gated):
    def forward(self, x):
        def silu(y):
            return y

        return self.back(silu(self.narrow(x)) * self.wide(x))


def silu(x):
    return 2 * F.silu(x)


class OwnFunction(Gated):
    def forward(self, x):
        return self.back(silu(self.narrow(x)) * self.wide(x))


def decorated(forward):
    def call(self, x):
        return 2 * forward(self, x)

    return call


class Decorated(Gated):
    @decorated
    def forward(self, x):
        return self.back(self.bend(self.narrow(x)) * self.wide(x))


class Wrapped(Gated):
    """Wrapped after it was defined, so that its source does not show it."""

    def forward(self, x):
        return self.back(self.bend(self.narrow(x)) * self.wide(x))

    forward = functools.wraps(forward)(decorated(forward))


class Method(Gated):
    """`self.bend` is the method, though there is a child of that name too."""

    def __init__(self):
        super().__init__()
        self._modules["bend"] = nn.SiLU()

    def bend(self, x):
        return 2 * F.silu(x)

    def forward(self, x):
        return self.back(self.bend(self.narrow(x)) * self.wide(x))


class Shadowed(Gated):
    def forward(self, x, F=None):
        return self.back(F.silu(self.narrow(x)) * self.wide(x))


class CastToAnother(Gated):
    def forward(self, x):
        h = self.bend(self.narrow(x)) * self.wide(x)
        if h.dtype != self.norm.weight.dtype:
            h = h.to(self.norm.weight.dtype)
        return self.back(h)


class CountsCalls(Gated):
    def forward(self, x):
        if self.count():
            x = x.to(self.back.weight.dtype)
        return self.back(self.bend(self.narrow(x)) * self.wide(x))


class DeadCall(Gated):
    def forward(self, x):
        h = self.bend(self.narrow(x)) * self.wide(x)
        _ = self.norm(h)
        return self.back(h)


class Unusual(Gated):
    forward = functools.lru_cache(Gated.forward)


class Lambda(Gated):
    forward = lambda self, x: self.back(self.bend(self.narrow(x)) * self.wide(x))  # noqa: E731


class Async(Gated):
    async def forward(self, x):
        return self.back(self.bend(self.narrow(x)) * self.wide(x))


class Intercepted(Gated):
    def __getattribute__(self, name):
        return super().__getattribute__("drop" if name == "bend" else name)


NEAR_MISSES = [
    *(Clamp, Multiplier, Constant, Residual, Norm, Float, ActivatedTwice, NoActivation, GateOfTheHalves),
    *(ChunkOfTokens, AlwaysDrops, OneProjectionTwice, TwoArguments, ReadsADefault, TanhGelu, Branch, Called, Inner),
    *(OwnFunction, Decorated, Wrapped, Method, Shadowed, CastToAnother, CountsCalls),
    *(DeadCall, Unusual, Lambda, Async, Intercepted),
]


def test_every_class_is_in_a_table():
    assert {
        cls for cls in vars(sys.modules[__name__]).values() if isinstance(cls, type) and issubclass(cls, Gated)
    } == {
        *KNOWN,
        *NEAR_MISSES,
    }


@pytest.mark.parametrize(
    "cls, text",
    [
        (Clamp, "self.bend(self.narrow(x)).clamp(max=7.0)"),
        (Multiplier, "self.scale"),
        (Branch, "if self.scale > 1: x = self.norm(x)"),
        (NoActivation, None),
        (Wrapped, None),
    ],
)
def test_the_report_says_what_could_not_be_read(cls, text):
    (status,) = fusion_report(nn.ModuleDict({"mlp": cls()})).mlps
    assert ("reading stops at" in status.reason) == (text is not None)
    assert text is None or f"; reading stops at `{text}`; if it computes one anyway" in status.reason


@pytest.mark.parametrize("cls", NEAR_MISSES, ids=lambda cls: cls.__name__)
def test_near_misses_are_left_alone(cls):
    model = nn.ModuleDict({"mlp": cls()})
    assert recognise(model["mlp"]) is None
    assert not fusion_report(model).select("fusable")
    assert type(fuse_model(model)["mlp"]) is cls


def test_an_activation_subclass_is_unknown():
    class LoudSiLU(nn.SiLU):
        def forward(self, x):
            return 2 * super().forward(x)

    module = Gated()
    module.bend = LoudSiLU()
    assert recognise(module) is None


def test_a_dropout_that_changes_afterwards_is_called(monkeypatch):
    module = fuse_model(UpFirst().eval(), strict=True)
    as_on_gpu(monkeypatch)
    assert module.runs() == (None, None)
    module.drop = nn.Tanh()
    assert "drop is not a plain dropout" in module.runs()[0]
    x = torch.randn(3, H)
    expected = module.back(torch.tanh(module.wide(x) * module.bend(module.narrow(x))))
    torch.testing.assert_close(module(x), expected)


def test_a_dropout_that_is_left_on_is_called(monkeypatch):
    module = fuse_model(UpFirst(), strict=True)
    assert module.training
    as_on_gpu(monkeypatch)
    assert module.eval().runs() == (None, None)
    module.drop.train()
    assert module.runs()[0] == "drop is in training mode; call eval() on it"
    x = torch.ones(1, H)
    assert len({tuple(module(x)[0].tolist()) for _ in range(9)}) > 1


def append(model, monkeypatch):
    model[0].append(nn.Tanh())


def other_bound_forward(model, monkeypatch):
    model[1].wide.forward = nn.Linear(H, I).forward


def one_weight_in_double(model, monkeypatch):
    model[1].back.double()


def patch_linear(model, monkeypatch):
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * forward(self, x))


def patch_activation(model, monkeypatch):
    monkeypatch.setattr(nn.SiLU, "forward", lambda self, x: x)


@pytest.mark.parametrize("change", [append, other_bound_forward, one_weight_in_double, patch_linear, patch_activation])
def test_changes_after_fusing_count(change, monkeypatch):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Sequential(nn.Linear(H, I), nn.SiLU(), nn.Linear(I, H)), Gated()).eval()

    def outcome(model):
        try:
            return model(torch.ones(2, H))
        except RuntimeError as error:
            return str(error)

    plain, fused = build(), fuse_model(build(), strict=True)
    as_on_gpu(monkeypatch)
    for model in (plain, fused):
        torch.manual_seed(1)
        change(model, monkeypatch)
    expected = outcome(plain)
    if isinstance(expected, str):
        assert outcome(fused) == expected
    else:
        torch.testing.assert_close(outcome(fused), expected)


def test_no_name_of_a_fused_module_is_a_childs():
    for name in ("repack", "runs", "operands", "fused_spec", "original_class", "input_name"):
        module = Gated()
        setattr(module, name, nn.Identity())
        assert f"{name!r} has a name" in fusion_report(nn.ModuleList([module])).mlps[0].reason
        cls = type("Gated", (Gated,), {name: 1})
        assert f"{name!r} has a name" in fusion_report(nn.ModuleList([cls()])).mlps[0].reason


def test_a_patched_class_is_read_anew(monkeypatch):
    """The forward that is there is what counts, not the one that the class was born with."""
    module = fuse_model(nn.ModuleList([Gated().eval()]), strict=True)[0]
    monkeypatch.setattr(Gated, "forward", Residual.forward)
    assert "was replaced" in module.runs()[0]
    assert recognise(Gated()) is None


def test_a_forward_without_source_is_unknown():
    namespace = {"nn": nn, "Gated": Gated}
    exec(
        "class Typed(Gated):\n    def forward(self, x):\n        return self.back(self.bend(self.wide(x)))", namespace
    )
    assert recognise(namespace["Typed"]()) is None
