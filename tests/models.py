"""Small real models: one for every row of a table, built from Transformers' own classes with random weights."""

import copy
import importlib

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.integrations import finegrained_fp8
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_fused_mlp import fuse_model, modes, ops
from hf_fused_mlp.families.mlp.fused import FusedMLP
from hf_fused_mlp.reading.mlp import recognise
from hf_fused_mlp.reference import fp8_linear_ref
from hf_fused_mlp.types import Matrix

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

# MLP classes of every kind, and the model type that has them
_CLASSES = {
    "llama.modeling_llama.LlamaMLP": "llama",
    "mistral.modeling_mistral.MistralMLP": "mistral",
    "qwen2.modeling_qwen2.Qwen2MLP": "qwen2",
    "qwen3.modeling_qwen3.Qwen3MLP": "qwen3",
    "gemma.modeling_gemma.GemmaMLP": "gemma",
    "gemma2.modeling_gemma2.Gemma2MLP": "gemma2",
    "gemma3.modeling_gemma3.Gemma3MLP": "gemma3_text",
    "olmo2.modeling_olmo2.Olmo2MLP": "olmo2",
    "phi3.modeling_phi3.Phi3MLP": "phi3",
    "gpt_neox.modeling_gpt_neox.GPTNeoXMLP": "gpt_neox",
    "phi.modeling_phi.PhiMLP": "phi",
    "starcoder2.modeling_starcoder2.Starcoder2MLP": "starcoder2",
}
MLP_CLASSES = tuple(f"transformers.models.{path}" for path in _CLASSES)
MODEL_TYPES = tuple(_CLASSES.values())


def tiny_config(model_type="llama", **changes):
    return CONFIG_MAPPING[model_type](**(SIZES | changes))


def tiny_model(model_type="llama", dtype=torch.float32, **changes):
    """A causal language model in eval mode; the same weights at every call."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), dtype=dtype).eval()


def tiny_moe(model_type="qwen3_moe", **changes):
    """The same with six routed experts, of which a token takes two."""
    count = "num_local_experts" if model_type == "mixtral" else "num_experts"
    sizes = {count: 6, "num_experts_per_tok": 2, "intermediate_size": 48, "moe_intermediate_size": 48}
    return tiny_model(model_type, **sizes | changes)


def mlp_class(path):
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def real_mlp(path, dtype=torch.float32, device="cpu", **changes):
    """One MLP module of the class at `path`, in eval mode, scaled so that its output is of the order of one."""
    model_type = MODEL_TYPES[MLP_CLASSES.index(path)]
    torch.manual_seed(0)
    mlp = mlp_class(path)(tiny_config(model_type, **changes))
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.2)
    return mlp.to(dtype).to(device).eval()


def token_ids(*shape):
    return torch.randint(2, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(0))


def as_on_gpu(monkeypatch):
    """Lets fused modules on a CPU call the operators, unless more than the device forbids it."""
    monkeypatch.setattr(modes, "no_kernels", lambda *_, **__: None)


def experts_as_on_gpu(monkeypatch):
    """The same for routed experts, eager ones too; returns the list of the operator's calls."""
    as_on_gpu(monkeypatch)
    runs_now = lambda x: modes.needs_only_output(x) and not torch._C._is_any_autocast_enabled()  # noqa: E731
    monkeypatch.setattr(modes, "runs_now", runs_now)
    calls, operator = [], ops.experts_if_fits

    def counted(*args):
        out = operator(*args)
        calls.extend([] if out is None else [args])
        return out

    monkeypatch.setattr(ops, "experts_if_fits", counted)
    return calls


class Doubling(TorchFunctionMode):
    """Doubles what `F.linear` returns, meanwhile."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is nn.functional.linear else out


def fp8_by_reference(monkeypatch):
    """Transformers' FP8 layers without kernels from the Hub; the weights that they are called with."""
    calls = []

    def fp8_linear(x, weight, scale, block_size=None, bias=None, *_, **__):
        calls.append(weight)
        return fp8_linear_ref(x, Matrix(weight, scale, bias))

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", fp8_linear)
    return calls


def compiled_experts(model, tokens):
    """The logits of a model compiled without graph breaks, and how often the operator of experts is in the graph."""
    nodes = []

    def backend(graph, _):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    out = torch.compile(model.model, fullgraph=True, backend=backend)(tokens)
    return model.lm_head(out.last_hidden_state), sum("hf_fused_mlp.experts" in node for node in nodes)


def assert_fused_computes_the_same(module):
    """`module` in evaluation mode, against the operator on what its fused form hands it."""
    module = module.eval()
    x = torch.randn(2, 3, module.get_submodule(recognise(module).up).in_features)
    with torch.no_grad():
        expected = module(x)
        fused = fuse_model(nn.ModuleList([copy.deepcopy(module)]), strict=True)[0]
        assert isinstance(fused, FusedMLP)
        torch.testing.assert_close(fused.by_operator(x), expected, atol=1e-5, rtol=1e-5)
