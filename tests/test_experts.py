"""Routed experts: what is read of Transformers' classes, and fused modules and models against the originals."""

import copy
import importlib
import inspect
import itertools
import json
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from models import compiled_experts, experts_as_on_gpu
from torch import nn
from transformers.integrations import moe

import hf_fused_mlp
from hf_fused_mlp.families.experts import FusedExperts, fused_output
from hf_fused_mlp.fuse import fuse_model, fusion_report, unfuse_model
from hf_fused_mlp.reading.experts import find_experts, original_of

MODELS = Path(transformers.__file__).parent / "models"
SMALL = {
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), 48),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size"), 40),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 6),
    "moe_latent_size": None,
}
# the reason of those that no kernel computes
REFUSED = {
    "Inkling2Experts": "known loops",  # an activation of two arguments
    "Inkling2LoopExperts": "known loops",
    "MuseSparkExperts": "norm after each expert",
}


def decorated():
    """The names of all classes with Transformers' decorator, as `module.Class`."""
    found = []
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        name = f"transformers.models.{file.parent.name}.{file.stem}"
        lines = file.read_text().splitlines()
        for before, line in itertools.pairwise(lines):
            if before.startswith("@use_experts_implementation"):
                found.append(f"{name}.{line.split()[1].split('(')[0].rstrip(':')}")
    return found


def make(path, dtype=torch.float32):
    """A small instance of a decorated class with random weights."""
    module, _, name = path.rpartition(".")
    module = importlib.import_module(module)
    cls = getattr(module, name)
    parameters = list(inspect.signature(cls.__init__).parameters.values())
    width = [40] if len(parameters) > 2 and parameters[2].name == "intermediate_size" else []
    configs = vars(importlib.import_module(module.__name__.replace(".modeling_", ".configuration_")))
    known = [c for n, c in configs.items() if n.endswith("Config") and c.__module__ == configs["__name__"]]
    known.sort(key=lambda c: (c is not parameters[1].annotation, "Text" not in c.__name__))
    for config_class in known:
        config = config_class()
        for field in SMALL.keys() & set(dir(config)):
            now = getattr(config, field)
            setattr(config, field, [SMALL[field]] * len(now) if isinstance(now, (list, tuple)) else SMALL[field])
        config._experts_implementation = "eager"
        try:
            experts = cls(config, *width)
        except (AttributeError, TypeError):  # a config without what the class reads is not its own
            continue
        torch.manual_seed(0)
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.2)
        return experts.to(dtype).eval()
    raise AssertionError(f"no config for {path}")


def inputs(experts, tokens=9, top_k=3, dtype=torch.float32):
    torch.manual_seed(1)
    spec = getattr(experts, "fused_spec", None) or find_experts(experts)
    weight = experts.down_proj
    planes = isinstance(spec, str) or spec.form.layout == "planes"
    hidden, count = weight.shape[1 if planes else 2], weight.shape[0]
    ids = torch.stack([torch.randperm(count)[:top_k] for _ in range(tokens)])
    return torch.randn(tokens, hidden).to(dtype), ids, torch.rand(tokens, top_k).to(dtype)


@pytest.mark.parametrize("path", decorated(), ids=lambda path: path.rpartition(".")[2])
def test_every_decorated_class(path):
    """Its operator gives what the original forward gives, in Transformers' own loop and its grouped one."""
    experts = make(path)
    name = type(experts).__name__
    if reason := REFUSED.get(name):
        assert reason in fusion_report(experts).experts[0].reason
        return
    x = inputs(experts)
    with torch.no_grad():
        loop = experts(*x)
        experts.config._experts_implementation = "grouped_mm"
        grouped = experts(*x)
        fuse_model(experts, strict=True)
        assert isinstance(experts, FusedExperts)
        out = experts.by_operator(*x)
        torch.testing.assert_close(out, loop, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(out, grouped, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(experts(*x), grouped, rtol=0, atol=0)  # on a CPU, the original


def test_how_many_classes_fuse():
    assert len(decorated()) >= 50  # 68 in Transformers 5.24
    assert sum(path.endswith(tuple(REFUSED)) for path in decorated()) <= 0.05 * len(decorated())


def test_without_the_decorator(on_cpu):
    """A class that only its own forward speaks for, which is a known loop; where it clamps last, no kernel does."""
    pytest.importorskip("transformers.models.step3p7")
    experts = make("transformers.models.step3p7.modeling_step3p7.Step3p7Experts")
    x = inputs(experts)
    with torch.no_grad():
        expected = experts(*x)
        fuse_model(experts, strict=True)
        torch.testing.assert_close(experts(*x), expected, rtol=2e-5, atol=2e-5)
        assert len(on_cpu) == 1
        assert fusion_report(experts).experts[0].reason is None
        experts.limit = 0.5
        clamped = unfuse_model(copy.deepcopy(experts))
        assert not torch.allclose(clamped(*x), expected)
        assert torch.equal(experts(*x), clamped(*x))
        assert len(on_cpu) == 1
        assert "changed after fusing" in fusion_report(experts).experts[0].reason
    assert "clamps the output of its activation" in fusion_report(clamped).experts[0].reason
    clamped.limit = float("inf")
    clamped.forward = lambda *args: args[0]
    assert "as some patches do" in fusion_report(clamped).experts[0].reason


def test_a_loop_of_ones_own(mixtral, on_cpu):
    """Transformers' loop in a class that has neither decorator nor `_apply_gate`."""
    loop = original_of(type(mixtral).forward)
    own = type("OwnExperts", (nn.Module,), {"forward": loop})()
    own.num_experts, own.act_fn = mixtral.num_experts, mixtral.act_fn
    own.gate_up_proj, own.down_proj = mixtral.gate_up_proj, mixtral.down_proj
    x = inputs(mixtral)
    with torch.no_grad():
        expected = own.eval()(*x)
        fuse_model(own, strict=True)
        torch.testing.assert_close(own(*x), expected, rtol=2e-5, atol=2e-5)
    assert len(on_cpu) == 1
    own = type("Other", (nn.Module,), {"forward": lambda self, x, ids, _: x * nn.functional.one_hot(ids, 6).sum()})()
    assert find_experts(own) is None


@pytest.fixture
def mixtral():
    return make("transformers.models.mixtral.modeling_mixtral.MixtralExperts")


def test_near_misses(mixtral, monkeypatch):
    """One change of class or instance, and nothing is taken for a known loop."""
    cls = type(mixtral)
    for name in ("has_gate", "is_concatenated"):
        changed = copy.deepcopy(mixtral)
        setattr(changed, name, False)
        assert isinstance(find_experts(changed), str)
    for name in ("has_bias", "is_transposed", "has_post_expert_norm"):
        changed = copy.deepcopy(mixtral)
        setattr(changed, name, True)
        assert isinstance(find_experts(changed), str)
    changed = copy.deepcopy(mixtral)
    changed.act_fn = nn.Tanh()
    assert "activation" in find_experts(changed)
    changed.act_fn = nn.SiLU()
    changed.act_fn.register_forward_hook(lambda *_: None)
    assert "activation" in find_experts(changed)
    with monkeypatch.context() as patch:
        patch.setattr(cls, "_apply_gate", lambda self, h: h.chunk(2, -1)[0])
        assert "gate and up" in find_experts(mixtral)
    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", lambda self, *args: args[0])
        assert find_experts(mixtral) is None
    with monkeypatch.context() as patch:
        patch.setitem(original_of(cls.forward).__globals__, "nn", None)
        assert "known loops" in find_experts(mixtral)
    assert find_experts(mixtral).form.activation == "silu"


@pytest.fixture
def on_cpu(monkeypatch):
    """Calls take the paths of a GPU; the operator runs PyTorch's operations. A list of its calls."""
    return experts_as_on_gpu(monkeypatch)


def test_what_runs(mixtral, on_cpu):
    """The operator if only the output is needed, and else the original."""
    x, ids, weights = inputs(mixtral)
    fuse_model(mixtral, strict=True)
    with torch.no_grad():
        original = mixtral.original_output(x, ids, weights)
        torch.testing.assert_close(mixtral(x, ids, weights), original, rtol=2e-5, atol=2e-5)
        assert len(on_cpu) == 1
        mixtral(x, top_k_index=ids, top_k_weights=weights)  # by name: the original
        mixtral.has_bias, held = True, mixtral.has_bias
        assert fused_output(mixtral, mixtral.fused_spec, x, ids, weights) is None
        assert "changed after fusing" in fusion_report(mixtral).experts[0].reason
        mixtral.has_bias = held
        gate = type(mixtral).original_class._apply_gate
        for owner in (type(mixtral).original_class, mixtral):
            owner._apply_gate = lambda *args: gate(*args) * 2 if owner is not mixtral else gate(mixtral, *args) * 2  # noqa: B023
            on_cpu.clear()
            torch.testing.assert_close(mixtral(x, ids, weights), mixtral.original_output(x, ids, weights))
            assert not on_cpu and "its gate was replaced" in fusion_report(mixtral).experts[0].reason
            if owner is mixtral:
                del owner._apply_gate
            else:
                owner._apply_gate = gate
        act, mixtral.act_fn = mixtral.act_fn, nn.Tanh()
        assert fused_output(mixtral, mixtral.fused_spec, x, ids, weights) is None
        mixtral.act_fn = act
        with torch.autocast("cpu", torch.bfloat16):
            mixtral(x, ids, weights)
        on_cpu.clear()
        assert fused_output(mixtral, mixtral.fused_spec, x.double(), ids, weights) is None
        assert fused_output(mixtral, mixtral.fused_spec, x[:, :7], ids, weights) is None
    mixtral(x, ids, weights).sum().backward()
    assert mixtral.down_proj.grad is not None and not on_cpu


def test_round_trips(mixtral):
    state = {name: value.clone() for name, value in mixtral.state_dict().items()}
    cls = type(mixtral)
    fuse_model(mixtral, strict=True)
    for again in (copy.deepcopy(mixtral), pickle.loads(pickle.dumps(mixtral))):
        assert isinstance(again, FusedExperts) and again.state_dict().keys() == state.keys()
    unfuse_model(mixtral)
    assert type(mixtral) is cls
    assert all(torch.equal(value, state[name]) for name, value in mixtral.state_dict().items())


def tiny(**fields):
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=6, num_experts_per_tok=2, **fields,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).eval()


def test_model():
    """All experts of a model fuse, the block around them is nobody's, and one can be excluded."""
    model = tiny()
    report = fusion_report(model)
    assert [module.name for module in report.experts] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert not report.mlps
    fuse_model(model, strict=True, exclude=["*.1.mlp.experts"])
    assert [module.state for module in fusion_report(model).experts] == ["fused", "fusable"]
    fuse_model(tiny(mlp_only_layers=[0]), strict=True)


def test_door_of_transformers(tmp_path, on_cpu):
    """`experts_implementation="hf_fused_mlp"` runs the operator, is in no config, and can be set on a live model."""
    model = tiny()
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        model.set_experts_implementation("hf_fused_mlp")
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        assert len(on_cpu) == 2
        fuse_model(model, strict=True)  # both doors open
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        assert len(on_cpu) == 4
    model.save_pretrained(tmp_path)
    assert "hf_fused_mlp" not in (tmp_path / "config.json").read_text()
    assert "experts_implementation" not in json.loads((tmp_path / "config.json").read_text())
    again = type(model).from_pretrained(tmp_path, experts_implementation="hf_fused_mlp")
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(on_cpu) == 6
    again(tokens).logits.sum().backward()  # gradients: what Transformers runs
    assert len(on_cpu) == 6


def test_door_falls_back_and_says_so(caplog):
    experts = make("transformers.models.mixtral.modeling_mixtral.MixtralExperts")
    x = inputs(experts)
    with torch.no_grad():
        expected = experts(*x)
        experts.config._experts_implementation = "hf_fused_mlp"
        torch.testing.assert_close(experts(*x), expected, rtol=2e-5, atol=2e-5)
        experts.act_fn = nn.Tanh()
        for _ in range(2):
            experts(*x)
    assert len([r for r in caplog.records if "grouped_mm runs" in r.getMessage()]) == 1


def test_a_live_model_outlives_uninstall():
    """Its config names an implementation that must not vanish."""
    model = tiny()
    model.set_experts_implementation("hf_fused_mlp")
    try:
        hf_fused_mlp.uninstall()
        with torch.no_grad():
            model(torch.arange(6)[None])
    finally:
        hf_fused_mlp.install()
    assert "hf_fused_mlp" in moe.ALL_EXPERTS_FUNCTIONS


@pytest.mark.parametrize("door", ["class", "interface"])
def test_compiled(door, monkeypatch):
    """One graph without breaks, with the operator in it."""
    from hf_fused_mlp import modes

    monkeypatch.setattr(modes, "no_kernels", lambda *_, **__: None)
    model = tiny()
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        fuse_model(model, strict=True) if door == "class" else model.set_experts_implementation("hf_fused_mlp")
        compiled, count = compiled_experts(model, tokens)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)
    assert count == 2


def test_bad_operands():
    experts = make("transformers.models.mixtral.modeling_mixtral.MixtralExperts")
    x, ids, weights = inputs(experts)
    fuse_model(experts)
    for bad in (
        (x[:, 1:], ids, weights),
        (x, ids[:4], weights),
        (x, ids.float(), weights),
        (x.double(), ids, weights),
    ):
        with pytest.raises(ValueError, match="expected x"):
            experts.by_operator(*bad)
    assert experts.by_operator(x[:0], ids[:0], weights[:0]).shape == (0, x.shape[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 5, 40, 300])
@pytest.mark.parametrize("model", ["mixtral.modeling_mixtral.Mixtral", "gpt_oss.modeling_gpt_oss.GptOss"])
def test_on_a_gpu(model, tokens, dtype):
    """Kernels answer as the original does, wait for nothing, repeat themselves bit for bit, and can be captured."""
    from hf_fused_mlp import launch_cache

    experts = make(f"transformers.models.{model}Experts", dtype)
    x, ids, weights = (tensor.cuda() for tensor in inputs(experts, tokens, dtype=dtype))
    experts = experts.cuda()
    with torch.no_grad():
        oracle = copy.deepcopy(experts).double()(x.double(), ids, weights.double())
        experts.config._experts_implementation = "grouped_mm"
        eager = experts(x, ids, weights)
        fuse_model(experts, strict=True)
        launch_cache.remembered.clear()
        first = experts(x, ids, weights)
        assert len(launch_cache.remembered) == 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = experts(x, ids, weights)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(first, second)
        off, eager_off = ((out.double() - oracle).norm() / oracle.norm() for out in (first, eager))
        assert off <= 1.2 * eager_off + 1e-7
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = experts(x, ids, weights)
        ids.copy_((ids + 1) % experts.num_experts)
        graph.replay()
        assert torch.equal(captured, experts(x, ids, weights))


@pytest.mark.gpu
@pytest.mark.parametrize("door", ["class", "interface"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_on_a_gpu(door, cache):
    """Greedy tokens in fp32 are the original's, eager and compiled."""
    model = tiny().cuda()
    tokens = torch.arange(12, device="cuda").view(2, 6)
    how = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    expected = model.generate(tokens, **how)
    fuse_model(model, strict=True) if door == "class" else model.set_experts_implementation("hf_fused_mlp")
    assert torch.equal(model.generate(tokens, **how), expected)
