"""A fused model where it is served: compiled, in CUDA graphs, batched continuously, in streams and threads."""

import gc
import re
import threading

import pytest
import torch
from models import Doubling, as_on_gpu, experts_as_on_gpu, tiny_model, tiny_moe, token_ids
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig
from transformers.activations import GELUTanh, QuickGELUActivation

from hf_fused_mlp import fuse_model, unfuse_model
from hf_fused_mlp.reading.activations import find_activation
from hf_fused_mlp.swap import Fused, original_form

DEVICES = pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
TYPES = pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox"])


@pytest.fixture
def models(where, monkeypatch, request):
    """The original and the fused model, in fp32, by model type."""
    if where == "cpu":
        as_on_gpu(monkeypatch)
    torch.compiler.reset()

    def make(model_type="llama", **changes):
        return tiny_model(model_type, **changes).to(where), fuse_model(
            tiny_model(model_type, **changes).to(where), strict=True
        )

    return make


def new_tokens(model, ids, count=12, **options):
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)
    return out[:, ids.shape[1] :].tolist()


def in_batches(model):
    """Prompts and answers of continuous batching, with little memory for its cache: by default it takes most."""
    prompts = [token_ids(1, length)[0].tolist() for length in (3, 9, 17)]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    outputs = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=small)
    return sorted((tuple(out.prompt_ids), tuple(out.generated_tokens)) for out in outputs.values())


@DEVICES
@TYPES
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}],
    ids=["beams", "static", "lookup"],
)
@torch.no_grad()
def test_ways_to_generate(where, model_type, options, models):
    original, fused = models(model_type)
    ids = token_ids(1, 7).to(where)
    assert new_tokens(fused, ids, **options) == new_tokens(original, ids, **options)


@DEVICES
@torch.no_grad()
def test_assisted_decoding(where, models):
    """The assistant is fused too: two fused models in one process."""
    original, fused = models()
    _, assistant = models(num_hidden_layers=1)
    ids = token_ids(1, 7).to(where)
    assert new_tokens(fused, ids, assistant_model=assistant) == new_tokens(original, ids)


@DEVICES
@torch.no_grad()
def test_continuous_batching(where, models):
    original, fused = models()
    answers = in_batches(original)
    assert len(answers) == 3
    assert in_batches(fused) == answers


@DEVICES
@pytest.mark.parametrize("door", ["class", "interface"])
@pytest.mark.parametrize("way", ["dynamic", "static", "continuous batching"])
@torch.no_grad()
def test_routed_experts(way, door, where, monkeypatch):
    """Each step of every layer runs fused, and gives the original's tokens."""
    torch.compiler.reset()
    calls = experts_as_on_gpu(monkeypatch) if where == "cpu" else []
    answers = []
    for fused in (False, True):
        model = tiny_moe().to(where)
        if fused:
            fuse_model(model, strict=True) if door == "class" else model.set_experts_implementation("hf_fused_mlp")
        if way == "continuous batching":
            answers.append(in_batches(model))
        else:
            answers.append(new_tokens(model, token_ids(2, 7).to(where), 6, cache_implementation=way))
    assert answers[0] == answers[1]
    assert len(answers[0]) == (3 if way == "continuous batching" else 2)
    assert where != "cpu" or len(calls) == 2 * 6


@DEVICES
@TYPES
@torch.no_grad()
def test_token_counts_do_not_recompile(where, model_type, models):
    """At most three compilations for 1 to 4096 tokens, none of them broken."""
    original, fused = models(model_type, max_position_embeddings=4096)
    counter = CompileCounterWithBackend("eager")
    mlp = torch.compile(fused.get_submodule(mlp_name(fused)), backend=counter, fullgraph=True)
    expected = original.get_submodule(mlp_name(original))
    for m in (7, 1, 2, 3, 16, 100, 129, 1000, 4096):
        x = torch.randn(1, m, 64, device=where)
        torch.testing.assert_close(mlp(x), expected(x), atol=1e-5, rtol=1e-4)
    assert 1 <= counter.frame_count <= 3
    assert all("hf_fused_mlp.mlp" in graph.code for graph in counter.graphs)


@TYPES
@pytest.mark.parametrize("where", ["cpu"])
@pytest.mark.parametrize("norms", [False, True])
@torch.no_grad()
def test_compiled_code_takes_an_unchanged_layer_for_one_thing(where, model_type, norms, models):
    """PyTorch can skip the guards of a module in which no dictionary changed; fusing leaves it able to."""
    original, fused = models(model_type)
    fuse_model(fused, norms=norms)
    expected, found = (wholes(model.base_model) for model in (original, fused))
    if norms:  # they find their class's forward by way of the first layer's, and in torch 2.11 of each norm's
        expected = {name for name in expected if not name.endswith(("norm']", "._modules['layers']._modules['0']"))}
    assert found >= expected
    assert any("['layers']" in name for name in found)


def wholes(model):
    """The modules that the guards of the compiled model skip as a whole."""
    torch.compiler.reset()
    if not hasattr(torch._dynamo.config, "use_recursive_dict_tags_for_guards"):
        pytest.skip("this PyTorch skips no guards")
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True):
        compiled = torch.compile(model, backend="eager", fullgraph=True)  # guards go with it
        compiled(token_ids(1, 5), use_cache=False)
    (entry,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(type(model).forward.__code__)
    return set(re.findall(r"source=(\S+), .*tag_safe=\(True, True\)", str(entry.guard_manager)))


def patch_instance(module, monkeypatch):
    monkeypatch.setattr(module, "forward", lambda x: 2 * type(module).forward(module, x), raising=False)


def replace_parameters(module, monkeypatch):
    for name, parameter in module.named_parameters():
        monkeypatch.setattr(module.get_submodule(name.rpartition(".")[0]), "weight", nn.Parameter(2 * parameter))


CHANGES = [(patch_instance, name) for name in ("", "up_proj", "down_proj", "act_fn")] + [
    (replace_parameters, name) for name in ("", "up_proj", "down_proj")
]
TAGS = hasattr(torch._dynamo.config, "use_recursive_dict_tags_for_guards")


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(not TAGS, reason="no such setting"))])
def dict_tags(request):
    """Whether PyTorch skips the guards of a module in which no dictionary changed, as some versions do."""
    torch.compiler.reset()
    if not request.param:
        yield
        return
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True):
        yield


@pytest.mark.parametrize("where", ["cpu"])
@pytest.mark.parametrize(("change", "name"), CHANGES)
@torch.no_grad()
def test_compiled_code_notices_a_change(where, change, name, models, monkeypatch, dict_tags):
    _, fused = models()
    mlp, x = fused.get_submodule(mlp_name(fused)), torch.randn(3, 64)
    compiled = torch.compile(mlp, backend="eager")
    for _ in range(3):  # guards are skipped from the second time on
        before = compiled(x)
    change(mlp.get_submodule(name), monkeypatch)
    torch.testing.assert_close(compiled(x), mlp(x))
    assert not torch.allclose(mlp(x), before, rtol=0.1, atol=0)


@pytest.mark.parametrize("where", ["cpu"])
@torch.no_grad()
def test_compiled_code_notices_another_class(where, models, dict_tags):
    _, fused = models()
    ids, ran = token_ids(1, 5), []

    def backend(graph, example_inputs):
        return lambda *inputs: ran.append("hf_fused_mlp.mlp" in graph.code) or graph(*inputs)

    compiled = torch.compile(fused, backend=backend, fullgraph=True)

    def runs_ours():
        for _ in range(3):  # guards are skipped from the second time on
            compiled(ids, use_cache=False)
        return ran[-3:]

    assert all(runs_ours())
    with original_form([module for module in fused.modules() if isinstance(module, Fused)]):
        assert not any(runs_ours())
    assert all(runs_ours())
    unfuse_model(fused)
    assert not any(runs_ours())
    fuse_model(fused)
    assert all(runs_ours())


@pytest.mark.parametrize("where", ["cpu"])
@torch.no_grad()
def test_compiled_code_in_a_function_mode(where, models):
    """Which may change what the original's functions return."""
    x = torch.randn(3, 64)
    mlps = (model.get_submodule(mlp_name(model)) for model in models())
    original, fused = (torch.compile(mlp, backend="eager", fullgraph=True) for mlp in mlps)
    with torch.device("cpu"):
        torch.testing.assert_close(fused(x), original(x))
    without = original(x)
    with Doubling():
        torch.testing.assert_close(fused(x), original(x))
        assert not torch.allclose(fused(x), without, rtol=0.1, atol=0)


@pytest.mark.parametrize("where", ["cpu"])
@torch.no_grad()
def test_another_model_compiles_nothing_anew(where, models):
    """Whatever its activations are: compiled code does not check what is known of others."""
    _, fused = models()
    x = torch.randn(3, 64)
    compiled = torch.compile(fused.get_submodule(mlp_name(fused)), backend="eager", fullgraph=True)
    compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for activation in (nn.GELU(), nn.ReLU(), nn.Tanh(), GELUTanh(), nn.Mish(), QuickGELUActivation()):
            find_activation(activation)
            compiled(x)
        fuse_model(tiny_model("gpt_neox"))(token_ids(1, 5))
        compiled(x)


def mlp_name(model):
    return next(name for name, _ in model.named_modules() if name.endswith(".mlp"))


@DEVICES
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@torch.no_grad()
def test_an_exported_program_holds_nothing_of_ours(where, strict, models):
    """It may be loaded where this package is not installed."""
    original, fused = models()
    ids = token_ids(1, 8).to(where)
    program = torch.export.export(fused, (ids,), {"use_cache": False}, strict=strict)
    torch.testing.assert_close(program.module()(ids, use_cache=False).logits, original(ids).logits)
    assert "hf_fused_mlp" not in program.graph_module.code


@pytest.mark.gpu
@TYPES
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("where", ["cuda"])
@torch.no_grad()
def test_compiled_generation(where, model_type, mode, models):
    """What a server would run; weights are neither copied into graphs nor compiled anew from call to call."""
    original, fused = models(model_type)
    ids = token_ids(2, 7).to(where)
    compiled = {"cache_implementation": "static", "compile_config": CompileConfig(mode=mode, fullgraph=True)}
    expected = new_tokens(original, ids)
    assert new_tokens(fused, ids, **compiled) == expected
    counts = dict(torch._dynamo.utils.counters["stats"])
    assert new_tokens(fused, ids, **compiled) == expected
    assert dict(torch._dynamo.utils.counters["stats"]) == counts


@pytest.mark.gpu
@torch.no_grad()
def test_graphs_take_no_copy_of_the_weights():
    """Under reduce-overhead the packed weights, 100 MB here, stay where they are."""
    from models import real_mlp

    path = "transformers.models.llama.modeling_llama.LlamaMLP"
    mlp = real_mlp(path, torch.bfloat16, "cuda", hidden_size=2048, intermediate_size=8192)
    fused = fuse_model(torch.nn.ModuleList([mlp]), strict=True)[0]
    compiled, x = torch.compile(fused, mode="reduce-overhead", fullgraph=True), torch.randn(1, 2048, device="cuda")
    x, expected = x.bfloat16(), fused(x.bfloat16())
    before = torch.cuda.memory_allocated()
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(compiled(x), expected)
    assert torch.cuda.memory_allocated() - before < 20e6


@pytest.mark.gpu
@torch.no_grad()
def test_streams_and_threads():
    """Several models at once, each in a thread and a stream of its own, give what they give alone."""
    models = [fuse_model(tiny_model(name).cuda(), strict=True) for name in ("llama", "phi3", "gpt_neox", "llama")]
    ids = [token_ids(1, 5 + i).cuda() for i in range(len(models))]
    expected = [new_tokens(model, tokens, 16) for model, tokens in zip(models, ids, strict=True)]
    answers = {}

    def serve(i):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            answers[i] = [new_tokens(models[i], ids[i], 16) for _ in range(5)]

    torch.cuda.synchronize()
    threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[i] for i in range(len(models))] == [[answer] * 5 for answer in expected]


@pytest.mark.gpu
@torch.no_grad()
def test_a_thousand_calls_take_no_more_memory():
    model = fuse_model(tiny_model().cuda(), strict=True)
    for i in range(1000):
        new_tokens(model, token_ids(1, 1 + i % 50).cuda(), 2)
        if i == 100:
            gc.collect()
            before = torch.cuda.memory_allocated()
    gc.collect()
    assert torch.cuda.memory_allocated() <= before
