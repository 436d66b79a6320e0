"""RMSNorms: which classes are read as one, what the kernel makes of them, and when the original forward runs."""

import ast
import copy
import importlib
import itertools
import logging
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from models import tiny_model, token_ids
from torch import nn
from torch.nn.utils import parametrize
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from triton.runtime.errors import OutOfResources

from hf_fused_mlp import fuse_model, fusion_report, modes, unfuse_model
from hf_fused_mlp.families import norm as norm_family
from hf_fused_mlp.families.norm import FusedRMSNorm
from hf_fused_mlp.ops import dispatch
from hf_fused_mlp.reading.norm import FORMS, NormSpec, find_norm
from hf_fused_mlp.tuning import cache

CLASSES = {"rounded": LlamaRMSNorm, "weighed": Olmo2RMSNorm, "offset": GemmaRMSNorm}
CPU = modes.no_kernels(torch.device("cpu"))
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    cache.forget()
    yield
    cache.forget()


def norm_of(form, hidden=72, dtype=torch.float32, device="cpu"):
    """A module of the form's class, with a weight that matters and a large epsilon."""
    norm = CLASSES[form](hidden, eps=0.1).to(device, dtype).eval()
    nn.init.normal_(norm.weight)
    return norm


def tokens(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def launched(norm, x):
    spec = find_norm(norm)
    return dispatch.rms_norm(x, norm.weight, getattr(norm, spec.eps), spec.form)


def kernels_answer(fused, x):
    """What a call of a fused norm gives if the kernel may answer, or None."""
    return norm_family._launched(fused, type(fused), x)


def norm_classes():
    """Every class of Transformers whose name says that it is an RMSNorm."""
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        classes = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
        for name in classes:
            if name.endswith("RMSNorm"):
                yield getattr(importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}"), name)


@torch.no_grad()
def test_classes_of_transformers():
    read = Counter()
    x = tokens(3, 64, dtype=torch.bfloat16)  # in which the forms differ by where they round
    for cls in norm_classes():
        norm = object.__new__(cls)
        nn.Module.__init__(norm)
        if spec := find_norm(norm):
            norm.weight = nn.Parameter(tokens(64, dtype=torch.bfloat16))
            norm.eps = 0.1
            setattr(norm, spec.eps, 0.1)
            assert torch.equal(norm(x), FORMS[spec.form](norm, x)), cls.__name__
        read[spec and spec.form] += 1
    assert read["rounded"] > 100
    assert read["weighed"] >= 10
    assert read["offset"] > 5
    if transformers.__version__.startswith("5.24."):
        page = (Path(__file__).parent.parent / "docs/how-it-works.md").read_text()
        assert f"{read.total() - read[None]} of the {read.total()} RMSNorm classes of Transformers 5.24 are" in page


class Subclass(LlamaRMSNorm):
    pass


class ScaledRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


class Centred(LlamaRMSNorm):
    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        hidden_states = hidden_states - hidden_states.mean(-1, keepdim=True)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class OtherAxis(GemmaRMSNorm):
    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + self.eps)


class Inner(GemmaRMSNorm):
    def _norm(self, hidden):
        return torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps) * hidden


class Unused(LlamaRMSNorm):
    def forward(self, hidden_states):
        changed = hidden_states.add_(1.0)  # noqa: F841
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class Later(LlamaRMSNorm):
    async def forward(self, hidden_states):
        return super().forward(hidden_states)


class EpsilonOfTheClass(LlamaRMSNorm):
    variance_epsilon = property(lambda self: 0.5, lambda self, value: None)


class OwnRepack(LlamaRMSNorm):
    def repack(self):
        return self.weight


class NotTorch:
    """A forward that says `torch` and means something else."""

    rsqrt, float32 = torch.sqrt, torch.float32


@pytest.mark.parametrize(
    "cls, expected",
    [
        (Subclass, NormSpec("rounded", "variance_epsilon")),
        (Inner, NormSpec("offset", "eps", (("_norm", Inner._norm),))),
        (Unused, None),
        (Later, None),
        (EpsilonOfTheClass, None),
        (ScaledRMSNorm, None),
        (Centred, None),
        (OtherAxis, None),
        (nn.RMSNorm, None),
        (nn.LayerNorm, None),
    ],
)
def test_what_is_read(cls, expected):
    assert find_norm(cls(8)) == expected


def test_a_method_of_our_name_stays_the_modules():
    (norm,) = fusion_report(nn.ModuleList([OwnRepack(8)])).norms
    assert (norm.state, "'repack' has a name" in norm.reason) == ("skipped", True)


def test_what_torch_means(monkeypatch):
    namespace = {"torch": NotTorch, "nn": nn}
    forward = type(LlamaRMSNorm.forward)(LlamaRMSNorm.forward.__code__, namespace)
    assert find_norm(type("Other", (LlamaRMSNorm,), {"forward": forward})(8)) is None


@DTYPES
@pytest.mark.parametrize("shape", [(1, 72), (3, 2, 72), (17, 2048), (1, 1, 4100), (5, 3)], ids=str)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_kernel(form, shape, dtype, device):
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts bf16 off where a GPU rounds")
    norm, x = norm_of(form, shape[-1], dtype, device), tokens(*shape, dtype=dtype, device=device)
    out, expected = launched(norm, x), norm(x)
    assert out.shape == x.shape
    assert out.is_contiguous()
    # the sum's order is another, which moves what lies between two neighbours
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=2e-6 if dtype == torch.float32 else 2**-7)
    if dtype != torch.float32:
        assert (out != expected).float().mean() < 0.02


@torch.no_grad()
def test_rows_that_are_apart(device):
    norm, x = norm_of("rounded", 64, device=device), tokens(6, 128, device=device)[:, 64:]
    torch.testing.assert_close(launched(norm, x), norm(x))


@pytest.mark.parametrize("lead", [(2, 9, 3), (1, 9, 3), (2, 1, 3), (1, 1, 1), (4, 5), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("gap", [0, 8])
@torch.no_grad()
def test_tokens_in_another_order_in_memory(lead, gap, device):
    """As Gemma 3 has its heads. The output lies in memory as the original's does, so that views of it work."""
    norm = norm_of("offset", 64, dtype=torch.float16, device=device)
    for order in itertools.permutations(range(len(lead))):
        x = tokens(*lead, 64 + gap, dtype=torch.float16, device=device)[..., :64].permute(*order, -1)
        expected = norm(x)
        for _ in range(2):
            out = launched(norm, x)
            torch.testing.assert_close(out, expected, atol=1e-3, rtol=2**-9)
            assert strides(out) == strides(expected), (order, x.stride())


def strides(tensor):
    """Those that matter to a view."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@torch.no_grad()
def test_the_original_runs_where_the_order_is_not_clear(device):
    norm, x = norm_of("rounded", 64, device=device), tokens(64, 3, 64, device=device)
    assert launched(norm, x.transpose(0, 2)) is None
    assert launched(norm, x[:, :1].transpose(0, 1).expand(5, -1, -1)) is None
    torch.testing.assert_close(launched(norm, x[0, 0].expand(5, 7, -1)), norm(x[0, 0].expand(5, 7, -1)))


@torch.no_grad()
def test_a_kernel_that_does_not_run(monkeypatch, caplog):
    def fails(x, weight):
        raise OutOfResources(1, 0, "shared memory")

    monkeypatch.setattr(dispatch.norm, "rms_norm", lambda call, eps, form: fails)
    norm, x = norm_of("rounded", 64), tokens(4, 64)
    assert launched(norm, x) is None
    assert launched(norm, x) is None
    assert caplog.text.count("the kernel for RMSNorms does not run here") == 1


@pytest.mark.parametrize("ends", [float("inf"), float("nan"), 1e30, 0.0])
@torch.no_grad()
def test_extreme_values(ends, device):
    norm, x = norm_of("weighed", device=device), tokens(3, 72, device=device)
    x[1] = 0.0
    x[1, 5] = ends
    torch.testing.assert_close(launched(norm, x), norm(x), equal_nan=True)


@torch.no_grad()
def test_no_kernel_for_it(device):
    norm, x = norm_of("rounded", 64, device=device), tokens(4, 64, device=device)
    wide = copy.deepcopy(norm).double()
    apart = nn.Parameter(tokens(128, device=device)[::2])
    assert launched(norm, x) is not None
    for cannot in (x.double(), x.half(), x[:, :32], x[:0], x[:, 1:], x[0, 0]):
        assert launched(norm, cannot) is None
        assert launched(norm, cannot) is None
    assert launched(wide, x.double()) is None
    norm.weight = apart
    assert launched(norm, x) is None


@pytest.fixture
def kernel_runs(monkeypatch):
    """Lets tokens on the CPU be taken for a GPU's, and `FORMS` for the kernel; counts the answers."""
    answers = []

    def rms_norm(x, weight, eps, form):
        norm = nn.Module()
        norm.weight, norm.eps = weight, eps
        answers.append(FORMS[form](norm, x))
        return answers[-1]

    monkeypatch.setattr(dispatch, "rms_norm", rms_norm)
    monkeypatch.setattr(modes, "runs_now", lambda x: not torch.is_grad_enabled())
    return answers


@pytest.mark.parametrize("model_type, norms", [("llama", 5), ("gemma2", 9), ("olmo2", 9), ("qwen3", 9)])
@torch.no_grad()
def test_a_model(model_type, norms, kernel_runs):
    model, ids = tiny_model(model_type), token_ids(2, 5)
    expected, state = model(ids).logits, copy.deepcopy(model.state_dict())
    assert fuse_model(model, strict=True, norms=True) is model
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert len(kernel_runs) == norms == len(fusion_report(model).norms)
    assert f"{norms} of {norms} norms are fused" in str(fusion_report(model))
    assert isinstance(model.model.norm, FusedRMSNorm)
    torch.testing.assert_close(model.state_dict(), state, atol=0, rtol=0)

    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert sum(isinstance(module, FusedRMSNorm) for module in twin.modules()) == norms
        torch.testing.assert_close(twin(ids).logits, model(ids).logits)

    unfuse_model(model)
    kernel_runs.clear()
    assert torch.equal(model(ids).logits, expected)
    assert not kernel_runs
    assert not any(isinstance(module, FusedRMSNorm) for module in model.modules())


def test_only_when_asked():
    model = fuse_model(tiny_model())
    assert {norm.state for norm in fusion_report(model).norms} == {"fusable"}
    assert "norm" not in str(fusion_report(model))
    fuse_model(model, norms=True)
    assert {norm.state for norm in fusion_report(model).norms} == {"fused"}
    assert {norm.reason for norm in fusion_report(model).norms} == {CPU}
    assert len(fusion_report(model).to_dict()["norms"]) == 5


def test_excluded_norms():
    model = fuse_model(tiny_model("qwen3"), norms=True, exclude=["*.q_norm", "*.mlp"])
    fused = [norm.name for norm in fusion_report(model).norms if norm.state == "fused"]
    assert len(fused) == 7
    assert not any(name.endswith("q_norm") for name in fused)
    assert not fusion_report(model).select("fused")


def test_strict_and_norms_that_cannot_be_fused(caplog):
    model = tiny_model()
    model.model.norm = ScaledRMSNorm(64)
    with pytest.raises(ValueError, match="1 of 5 norms cannot be fused"):
        fuse_model(model, strict=True, norms=True)
    assert not fusion_report(model).select("fused")
    with caplog.at_level(logging.WARNING):
        fuse_model(model, norms=True)
    assert "ScaledRMSNorm has a forward that is not recognised as an RMSNorm" in caplog.text
    with pytest.raises(ValueError, match="found no RMSNorm to fuse"):
        fuse_model(tiny_model("gpt_neox"), strict=True, norms=True)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        fuse_model(tiny_model("gpt_neox"), norms=True)
    assert "0 of 0 norms" in caplog.text
    assert {record.levelno for record in caplog.records} == {logging.INFO}, "none are no reason to complain"


def test_none_that_is_not_excluded(caplog):
    """Is no reason to complain: whoever excluded them knows."""
    with caplog.at_level(logging.INFO):
        fuse_model(tiny_model(), strict=True, norms=True, exclude=["*.mlp"])
    assert "fused 5 of 5 norms" in caplog.messages
    with pytest.raises(ValueError, match="matches no MLP or norm of this model"):
        fuse_model(tiny_model(), norms=True, exclude=["model.nrom"])
    with pytest.raises(ValueError, match="found no MLP to fuse"):
        fuse_model(nn.ModuleList([norm_of("rounded")]), strict=True, norms=True)


def helper_of_the_instance(norm, monkeypatch):
    norm._norm = lambda x: x


def helper_of_the_class(norm, monkeypatch):
    monkeypatch.setattr(GemmaRMSNorm, "_norm", lambda self, x: x)


@pytest.mark.parametrize("change", [helper_of_the_instance, helper_of_the_class])
@torch.no_grad()
def test_a_helper_that_was_replaced(change, kernel_runs, monkeypatch):
    norm, x = norm_of("offset"), tokens(2, 72)
    fused = fuse_model(nn.ModuleList([copy.deepcopy(norm)]), norms=True)[0]
    before = norm(x)
    assert kernels_answer(fused, x) is not None
    for module in (norm, fused):
        change(module, monkeypatch)
    assert not torch.equal(norm(x), before)
    assert torch.equal(fused(x), norm(x))
    assert "was replaced after fusing" in fusion_report(nn.ModuleList([fused])).norms[0].reason
    assert fusion_report(nn.ModuleList([norm])).norms[0].state == "skipped"


def test_what_a_report_says_of_fused_norms(monkeypatch):
    model = fuse_model(tiny_model(), norms=True)

    def reason():
        return fusion_report(model).norms[-1].reason

    assert reason() == CPU
    model.model.norm.forward = lambda x: x
    assert "its forward, its weight or its epsilon was replaced" in reason()
    del model.model.norm.forward
    model.model.norm._parameters["weight"] = None
    assert "its forward, its weight or its epsilon was replaced" in reason()


def test_a_class_put_on_top():
    """Unfusing would take it away."""
    model = fuse_model(tiny_model(), norms=True)
    parametrize.register_parametrization(model.model.norm, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"model.norm has become a ParametrizedLlamaRMSNorm since it was fused"):
        unfuse_model(model)
    assert len(fusion_report(model).select("fused")) == 2
    parametrize.remove_parametrizations(model.model.norm, "weight")
    assert not fusion_report(unfuse_model(model)).of("norms").select("fused")


@torch.no_grad()
def test_compiles_as_it_is():
    model, ids = tiny_model(), token_ids(1, 5)
    expected = model(ids).logits
    fuse_model(model, norms=True)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(ids).logits, expected)


def test_norms_that_hold_more():
    model = tiny_model()
    model.model.norm.register_buffer("scale", torch.ones(1))
    model.model.layers[0].input_layernorm.forward = lambda x: x
    skipped = [norm.reason for norm in fusion_report(model).norms if norm.state == "skipped"]
    assert len(skipped) == 2
    assert "replaced on the instance" in skipped[0]
    assert "it holds scale, weight" in skipped[1]


def test_when_the_original_forward_runs(kernel_runs, monkeypatch):
    norm, x = norm_of("rounded"), tokens(2, 72)
    fused = fuse_model(nn.ModuleDict({"norm": copy.deepcopy(norm)}), norms=True)["norm"]

    def takes_kernel(call=lambda: fused(x)):
        kernel_runs.clear()
        torch.testing.assert_close(call(), norm(x))
        return bool(kernel_runs)

    assert not takes_kernel()  # gradients are wanted
    with torch.no_grad():
        assert takes_kernel()
        assert not takes_kernel(lambda: fused(hidden_states=x))
        fused.variance_epsilon = norm.variance_epsilon = torch.tensor(0.1)
        assert not takes_kernel()
        fused.variance_epsilon = norm.variance_epsilon = 0.2
        assert takes_kernel()
        with monkeypatch.context() as without:
            without.setattr(modes, "HAS_TRITON", False)
            assert not takes_kernel()
        assert takes_kernel()
        monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: x)
        assert not takes_kernel()


def test_hooks_see_the_call(kernel_runs):
    fused = fuse_model(nn.ModuleDict({"norm": norm_of("offset")}), norms=True)["norm"]
    seen = []
    fused.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        assert fused(tokens(2, 72)) is seen[0] is kernel_runs[0]


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "olmo2", "qwen3"])
@torch.no_grad()
def test_a_model_on_a_gpu(model_type, dtype):
    model, ids = tiny_model(model_type, dtype=dtype).cuda(), token_ids(2, 33).cuda()
    expected = model(ids).logits
    fuse_model(model, norms=True, exclude=["*.mlp"])
    calls = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: calls.append(kernels_answer(module, args[0])))
        for module in model.modules()
        if isinstance(module, FusedRMSNorm)
    ]
    out = model(ids).logits
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(fusion_report(model).norms)
    assert all(call is not None for call in calls)
    torch.testing.assert_close(out, expected, atol={torch.float32: 1e-5}.get(dtype, 0.03), rtol=1e-2)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    if dtype == torch.float32:
        tokens_fused = model.generate(ids, **greedy)
        assert torch.equal(unfuse_model(model).generate(ids, **greedy), tokens_fused)


@pytest.mark.gpu
@torch.no_grad()
def test_compiled_captured_and_autocast():
    norm, x = norm_of("rounded", 4096, torch.bfloat16, "cuda"), tokens(3, 4096, dtype=torch.bfloat16, device="cuda")
    fused = fuse_model(nn.ModuleList([copy.deepcopy(norm)]), norms=True)[0]
    torch.testing.assert_close(torch.compile(fused, fullgraph=True)(x), norm(x))
    with torch.autocast("cuda", torch.float16):
        assert kernels_answer(fused, x) is None
    torch.testing.assert_close(kernels_answer(fused, x), norm(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused(x)
    x.mul_(3.0)
    graph.replay()
    torch.testing.assert_close(out, norm(x))
