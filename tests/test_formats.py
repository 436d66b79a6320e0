"""A storage format of projections is one row: what the package makes of a third, a fourth and one with scales."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import as_on_gpu
from torch import nn

from hf_fused_mlp import fuse_model, fusion_report, ops, unfuse_model
from hf_fused_mlp.calls import class_path, is_hooked
from hf_fused_mlp.families import FAMILIES
from hf_fused_mlp.families.mlp.fused import SMALL_INPUT, FusedMLP
from hf_fused_mlp.reading.mlp import find_spec
from hf_fused_mlp.types import GPU, Matrix
from hf_fused_mlp.weights import formats

H, I = 12, 20


class RenamedLinear(nn.Linear):
    """Keeps its matrix in a parameter of another name."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.kernel = nn.Parameter(self._parameters.pop("weight").detach())

    def forward(self, x):
        return F.linear(x, self.kernel, self.bias)


class CachedLinear(RenamedLinear):
    """Stores fp16 numbers, and keeps what they are in fp32."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.stored = nn.Parameter(self._parameters.pop("kernel").detach().half())
        self.register_buffer("kernel", self.stored.detach().float())


class ScaledLinear(RenamedLinear):
    """Stores rows over a scale each."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.register_buffer("scale", self.kernel.detach().abs().amax(1, keepdim=True))
        self.kernel.data /= self.scale

    def forward(self, x):
        return F.linear(x, self.kernel * self.scale, self.bias)


def read_kernel(linear):
    known = type(linear) in (RenamedLinear, CachedLinear, ScaledLinear) and not is_hooked(linear)
    return Matrix(linear.kernel, getattr(linear, "scale", None), linear.bias) if known else None


def why_not_kernel(linear):
    return "has its kernel on meta" if linear.kernel.is_meta else None


class Gated(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.gate, self.up, self.down = linear(H, I), linear(H, I), linear(I, H)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.up, self.down = linear(H, I), linear(I, H)
        self.act = nn.GELU()

    def forward(self, x):
        return self.down(self.act(self.up(x)))


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """One more row, on what stands for a GPU, and few tokens are as few as they are for users."""
    classes = frozenset(map(class_path, (RenamedLinear, CachedLinear, ScaledLinear)))
    rows = (*formats.FORMATS, formats.Format(classes, read_kernel, why_not_kernel, glance=read_kernel))
    monkeypatch.setattr(formats, "FORMATS", rows)
    monkeypatch.setattr(formats, "_READERS", tuple(row.read for row in rows))
    monkeypatch.setattr(formats, "_OTHERS", formats._by_name(rows))
    monkeypatch.setattr("hf_fused_mlp.families.mlp.fused.SMALL_INPUT", SMALL_INPUT)
    as_on_gpu(monkeypatch)


@pytest.fixture
def by_kernels(monkeypatch):
    """The calls that kernels would answer as a whole."""
    calls, mlp = [], ops.mlp_if_fits
    monkeypatch.setattr(ops, "mlp_if_fits", lambda *args: calls.append(args) or mlp(*args))
    return calls


def fused(linear, kind=Gated):
    return fuse_model(nn.ModuleDict({"mlp": kind(linear)}).eval())


@pytest.mark.parametrize("kind", [Gated, Plain])
@pytest.mark.parametrize("linear", [nn.Linear, RenamedLinear, CachedLinear])
@torch.no_grad()
def test_a_format_is_read_for_few_tokens(linear, kind, by_kernels):
    model, x = nn.ModuleDict({"mlp": kind(linear)}).eval(), torch.randn(5, H)
    expected, stored = model["mlp"](x), copy.deepcopy(model.state_dict())
    fuse_model(model, strict=True)
    assert model["mlp"].runs(elements=x.numel()) == (None, None)
    torch.testing.assert_close(model["mlp"](x), expected)
    assert len(by_kernels) == 1
    assert formats.may_be_read(model["mlp"].up)
    assert (formats.glance(model["mlp"].up)[0]) is formats.read(model["mlp"].up).data
    unfuse_model(model)
    assert all(torch.equal(stored[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [Gated, Plain])
@torch.no_grad()
def test_a_matrix_with_scales_is_called(kind, by_kernels):
    """No kernel takes them, and the numbers without them are wrong."""
    model, x = nn.ModuleDict({"mlp": kind(ScaledLinear)}).eval(), torch.randn(5, H)
    expected = model["mlp"](x)
    fuse_model(model)
    (mlp,) = fusion_report(model).mlps
    assert mlp.state == ("fused" if kind is Gated else "skipped")
    assert "is test_formats.ScaledLinear, whose scales no kernel takes yet" in mlp.reason
    torch.testing.assert_close(model["mlp"](x), expected)
    assert by_kernels == []
    assert formats.described(model["mlp"].up).scale is not None
    assert formats.read(model["mlp"].up) is formats.glance(model["mlp"].up) is None


def test_why_a_layer_of_the_format_is_called():
    layer = RenamedLinear(H, I)
    layer.register_forward_hook(lambda module, args, output: output)
    assert formats.why_called(layer).startswith("has hooks")
    assert formats.why_called(RenamedLinear(H, I).to("meta")) == "has its kernel on meta"


def test_only_parameters_are_packed():
    plan = {linear: fused(linear)["mlp"] for linear in (RenamedLinear, CachedLinear)}
    assert plan[RenamedLinear].why_not_packed() is None
    assert formats.read(plan[RenamedLinear].up).data is plan[RenamedLinear].up.kernel
    assert "gate and up cannot be moved" in plan[CachedLinear].why_not_packed()
    problems = [FAMILIES[0].problem(mlp, mlp.fused_spec, 1, GPU.of(torch.device("cpu"))) for mlp in plan.values()]
    assert [problem.one_block for problem in problems] == [True, False]


def test_what_is_checked_is_what_was_read():
    """Shapes, dtypes and problems are those of the matrices, with the weights on meta too."""
    mlp = Gated(RenamedLinear)
    mlp.up.kernel = nn.Parameter(torch.randn(I + 1, H))
    (status,) = fusion_report(nn.ModuleDict({"mlp": mlp})).mlps
    assert "the shapes do not fit" in status.reason
    assert f"up [{I + 1}, {H}]" in status.reason
    mlp.up.kernel = nn.Parameter(torch.randn(I, H).double())
    (status,) = fusion_report(nn.ModuleDict({"mlp": mlp})).mlps
    assert "up.weight torch.float64" in status.reason
    meta = Gated(RenamedLinear).to("meta")
    problem = FAMILIES[0].problem(meta, find_spec(meta), 1, GPU.of(torch.device("cpu")))
    assert (problem.hidden, problem.intermediate, problem.out, problem.bias) == (H, I, H, True)


def test_a_class_that_shares_the_name_has_no_format():
    namesake = type("RenamedLinear", (nn.Linear,), {"__module__": "elsewhere"})(H, I)
    assert not formats.may_be_read(namesake)
    assert formats.why_called(namesake).startswith("is elsewhere.RenamedLinear, expected nn.Linear")
    assert not isinstance(fused(lambda *sizes: namesake, Plain)["mlp"], FusedMLP)
