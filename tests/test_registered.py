"""Registered classes: what the spec does not name is not bypassed once something is put around it."""

import pytest
import torch
from models import as_on_gpu
from torch import nn

from hf_fused_mlp import MLPSpec, fuse_model, fusion_report, register_mlp
from hf_fused_mlp.reading.mlp import MLP_SPECS


class SquaredReLU(nn.Module):
    def forward(self, x):
        return torch.relu(x).square()


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = SquaredReLU()

    def forward(self, x):
        return self.inner(x)


class Squashed(nn.Module):
    def __init__(self, squash=None):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.squash = squash or SquaredReLU()

    def forward(self, x):
        return self.down(self.squash(self.up(x)))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    as_on_gpu(monkeypatch)
    register_mlp(Squashed, MLPSpec("plain", up="up", down="down", function="relu2"))
    yield
    del MLP_SPECS[Squashed]


def hook(child):
    child.register_forward_hook(lambda module, args, output: 3 * output)


def replace_forward(child):
    child.forward = lambda x: 3 * x


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("wrap", [hook, replace_forward])
@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
@torch.no_grad()
def test_a_wrapped_child_that_the_spec_does_not_name_is_called(nested, wrap, when, compiled):
    model, x = nn.ModuleDict({"mlp": Squashed(Holder() if nested else None)}).eval(), torch.randn(3, 8)
    mlp = model["mlp"]
    child, name = (mlp.squash.inner, "squash.inner") if nested else (mlp.squash, "squash")
    if when == "after":
        fuse_model(model, strict=True)
        assert mlp.runs() == (None, None)
        torch.testing.assert_close(mlp(x), Squashed.forward(mlp, x))
    wrap(child)
    if when == "before":
        fuse_model(model)
    expected = Squashed.forward(mlp, x)
    torch.compiler.reset()
    torch.testing.assert_close((torch.compile(mlp, backend="eager") if compiled else mlp)(x), expected)
    (status,) = fusion_report(model).mlps
    assert status.reason.startswith(f"{name} has hooks or a replaced forward")


def test_the_report_names_the_remedy():
    del MLP_SPECS[Squashed]
    model = nn.ModuleDict({"mlp": Squashed()})
    assert "call register_mlp with MLPSpec(..., function=...) first" in fusion_report(model).mlps[0].reason
    register_mlp(Squashed, MLPSpec("plain", up="up", down="down", function="relu2"))
    assert fusion_report(model).mlps[0].state == "fusable"
