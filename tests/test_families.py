"""What `fuse.py` may expect of a family, of every row of `FAMILIES`, and how families on request meet the others."""

import inspect
from dataclasses import fields

import pytest
from models import tiny_model
from torch import nn

from hf_fused_mlp import fuse_model, fusion_report
from hf_fused_mlp.families import FAMILIES
from hf_fused_mlp.options import FusionOptions
from hf_fused_mlp.swap import Fused

OPTIONS = {field.name: field.default for field in fields(FusionOptions)}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_contract(family):
    assert [other.name for other in FAMILIES].count(family.name) == 1
    assert [other.noun for other in FAMILIES].count(family.noun) == 1
    assert family.none_found.startswith("strict: found no ")
    assert issubclass(family.mixin, Fused)
    owed = ["forward", "runs"] if family.option else ["forward", "runs", "call_inputs", "by_operator"]
    assert [name for name in owed if getattr(family.mixin, name, None) is getattr(Fused, name, None)] == []
    assert family.option is None or OPTIONS[family.option] is False
    assert family.examine(nn.Identity()) is None


def test_fuse_model_passes_every_option(monkeypatch):
    parameters = dict(list(inspect.signature(fuse_model).parameters.items())[1:])
    assert {name: parameter.default for name, parameter in parameters.items()} == OPTIONS
    given = {name: ("a",) if name == "exclude" else not default for name, default in OPTIONS.items()}
    monkeypatch.setattr("hf_fused_mlp.fuse.fuse_with", lambda model, options: options)
    assert fuse_model(nn.Identity(), **given) == FusionOptions(**given)


@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "exclude"])
def test_options_are_true_or_false(option):
    with pytest.raises(TypeError, match=f"{option}=1: expected True or False"):
        FusionOptions(**{option: 1})


def test_a_model_of_norms_alone():
    """`strict` is about MLPs too, and says what could be fused without it."""
    norms = nn.Sequential(tiny_model().model.norm)
    message = "found no MLP to fuse; .*; without strict, norms=True fuses its 1 norms"
    for norms_too in (False, True):
        with pytest.raises(ValueError, match=message):
            fuse_model(norms, strict=True, norms=norms_too)
    fuse_model(norms, norms=True)
    assert fusion_report(norms).norms[0].state == "fused"


def test_exclude_names_a_norm():
    with pytest.raises(ValueError, match=r"'model\.norm' matches norms, which are fused with norms=True only;"):
        fuse_model(tiny_model(), exclude=["model.norm"])
    assert fusion_report(fuse_model(tiny_model(), exclude=["model.norm"], norms=True)).norms[-1].state == "fusable"
