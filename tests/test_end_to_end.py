"""Real trained models: SmolLM2 as Llama and, with the same weights, as Mistral; a small GPT-NeoX and a small Mixtral.

On the CPU a fused module runs the original forward, so the CPU tests also send the models through the operator.
"""

import copy
import math
import pydoc_data.topics
import statistics
from pathlib import Path

import pytest
import torch
from models import as_on_gpu, experts_as_on_gpu, tiny_model
from numerics import assert_accurate, run_plan
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from hf_fused_mlp import fuse_model, fusion_report, launch_cache, ops, unfuse_model, validate
from hf_fused_mlp.bench.generate import quantized
from hf_fused_mlp.families.mlp.fused import FusedMLP
from hf_fused_mlp.integrations import demo

BYTE_NEOX = Path(__file__).parent / "data" / "byte_neox"
BYTE_MIXTRAL = Path(__file__).parent / "data" / "byte_mixtral"
PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List three uses of copper.",
    "def fibonacci(n):",
]
TEXT = pydoc_data.topics.topics["lambda"] + pydoc_data.topics.topics["with"] + pydoc_data.topics.topics["typesseq"]

DEVICES = pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(scope="module")
def smollm2():
    """The original and the fused model, loaded separately, fp32 on the CPU; and the tokenizer."""
    original = demo.load_demo(dtype=torch.float32)
    fused = demo.load_demo(dtype=torch.float32, use_fused_mlp="strict")
    assert len(fusion_report(fused).select("fused")) == 30
    assert not any(isinstance(module, FusedMLP) for module in original.modules())
    return original, fused, demo.load_demo_tokenizer()


def prompt_ids(tokenizer, prompt, where):
    turn = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return ids["input_ids"].to(where)


def greedy(model, ids, new_tokens=64):
    # no end token, so that every prompt gives all its tokens
    mask = torch.ones_like(ids)
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0
    )
    return out[0, ids.shape[1] :].tolist()


@torch.no_grad()
def perplexity(model, ids):
    return math.exp(model(ids, labels=ids).loss.item())


@pytest.mark.slow
@DEVICES
def test_smollm2_generates_the_same_tokens(smollm2, where, monkeypatch):
    original, fused, tokenizer = smollm2
    original, fused = original.to(where), fused.to(where)
    if where == "cpu":
        as_on_gpu(monkeypatch)
    for prompt in PROMPTS:
        ids = prompt_ids(tokenizer, prompt, where)
        expected, got = greedy(original, ids), greedy(fused, ids)
        assert len(got) == 64
        assert got == expected, prompt
        if prompt == PROMPTS[0]:
            assert tokenizer.decode(got).startswith("The capital of France is Paris.")


@pytest.mark.slow
@DEVICES
def test_smollm2_perplexity(smollm2, where, monkeypatch):
    original, fused, tokenizer = smollm2
    original, fused = original.to(where), fused.to(where)
    if where == "cpu":
        as_on_gpu(monkeypatch)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :2000].to(where)
    assert ids.shape[1] == 2000
    expected = perplexity(original, ids)
    assert 2 < expected < 60, "the model predicts real text"
    assert abs(perplexity(fused, ids) - expected) <= 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_layer_through_the_interpreted_kernels(smollm2, device):
    """The first layer's trained weights and real hidden states, in fp16, through the kernel for a few tokens."""
    from hf_fused_mlp.types import Plan, TileConfig

    original, fused, tokenizer = smollm2
    inputs = []
    hook = original.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    original.to("cpu")(prompt_ids(tokenizer, PROMPTS[0], "cpu")[:, :12])
    hook.remove()
    x = inputs[0][0].half().to(device)
    mlp = copy.deepcopy(fused.model.layers[0].mlp).half().to(device)
    config = TileConfig("skinny", block_m=16, block_n=128, block_k=128)
    # the layer's outputs are small; the tolerance rule wants a signal of the order of one, and down is linear
    mlp.down_proj.weight *= 100
    oracle = copy.deepcopy(mlp).double()
    eager = type(mlp).original_class.forward(mlp, x)
    expected = type(mlp).original_class.forward(oracle, x.double())
    assert_accurate(run_plan(Plan(config, config), x, *mlp.operands().flat()), eager, expected)


@pytest.mark.slow
def test_smollm2_saves_and_reloads_without_us(smollm2, tmp_path):
    original, fused, _ = smollm2
    fused.to("cpu").save_pretrained(tmp_path, max_shard_size="200MB")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = original.to("cpu").state_dict()
    assert reloaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in reloaded.state_dict().items())
    assert not any(isinstance(module, FusedMLP) for module in reloaded.modules())


@pytest.mark.slow
@DEVICES
def test_smollm2_fine_tuned(smollm2, where, monkeypatch):
    """The loss of every step is that of the unfused run; on a GPU in fifty steps, on the CPU in three."""
    if where == "cpu":
        as_on_gpu(monkeypatch)
    *models, tokenizer = smollm2
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][0]
    steps, length = (50, 128) if where == "cuda" else (3, 32)
    curves = []
    for model in models:
        model = copy.deepcopy(model).to(where).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        losses = []
        for step in range(steps):
            batch = ids[: 4 * length].view(4, length)[step % 2 :: 2].to(where)
            loss = model(batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    assert max(abs(fused - original) for original, fused in zip(*curves, strict=True)) <= 1e-3
    assert curves[0][-1] < curves[0][0], "it learns"


@pytest.mark.slow
@DEVICES
def test_smollm2_as_mistral(smollm2, where, monkeypatch):
    """Mistral's layers compute what Llama's do, so the same tensors make a second real model of another class."""
    original, _, tokenizer = smollm2
    llama = original.config.to_dict()
    names = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
        "hidden_act",
    ]
    config = MistralConfig(**{name: llama[name] for name in names}, sliding_window=None)
    model = MistralForCausalLM(config).eval()
    model.load_state_dict(original.state_dict())
    model.to(where)
    ids = prompt_ids(tokenizer, PROMPTS[0], where)
    expected = greedy(model, ids, 16)
    assert tokenizer.decode(expected).startswith("The capital of France is Paris.")
    fuse_model(model, strict=True)
    if where == "cpu":
        as_on_gpu(monkeypatch)
    assert greedy(model, ids, 16) == expected


@DEVICES
def test_byte_neox(where, monkeypatch):
    """A GPT-NeoX trained on Python source (see data/train_byte_neox.py), loaded by the flag."""
    model = AutoModelForCausalLM.from_pretrained(BYTE_NEOX, dtype=torch.float32, use_fused_mlp="strict").to(where)
    ids = torch.tensor([list(TEXT.encode()[:400])], device=where)
    source = b'def main():\n    """'
    start = torch.tensor([list(source)], device=where)
    if where == "cpu":
        as_on_gpu(monkeypatch)
    tokens, loss = greedy(model, start), perplexity(model, ids)
    unfuse_model(model)
    assert tokens == greedy(model, start)
    assert bytes(tokens).decode().isascii()
    assert abs(loss - perplexity(model, ids)) <= 1e-4
    assert loss < 40, "far from the 256 of a guess: it has learned"


@DEVICES
@pytest.mark.parametrize("door", ["class", "interface"])
def test_byte_mixtral(door, where, monkeypatch):
    """A Mixtral trained on Python source (see data/train_byte_mixtral.py), loaded by either flag."""
    flag = {"use_fused_mlp": "strict"} if door == "class" else {"experts_implementation": "hf_fused_mlp"}
    model = AutoModelForCausalLM.from_pretrained(BYTE_MIXTRAL, dtype=torch.float32, **flag).to(where)
    ids = torch.tensor([list(TEXT.encode()[:400])], device=where)
    start = torch.tensor([list(b'def main():\n    """')], device=where)
    calls = experts_as_on_gpu(monkeypatch) if where == "cpu" else []
    tokens, loss = greedy(model, start), perplexity(model, ids)
    assert len(calls) == (3 * 65 if where == "cpu" else 0)
    unfuse_model(model).set_experts_implementation("eager")
    assert tokens == greedy(model, start)
    assert bytes(tokens).decode().isascii()
    assert abs(loss - perplexity(model, ids)) <= 1e-4
    assert loss < 40, "far from the 256 of a guess: it has learned"
    assert len(calls) == (3 * 65 if where == "cpu" else 0)


@pytest.mark.parametrize("order, rows", [("pairs", 1), ("sorted", 16), ("gathered", 64)])
@torch.no_grad()
def test_byte_mixtral_through_the_kernels(order, rows, device, monkeypatch):
    """Interpreted ones, or a GPU's, in each order that plans have, with real routing: in fp32, the same logits."""
    from hf_fused_mlp.kernels.experts import describe_experts, prepare_experts
    from hf_fused_mlp.types import ExpertsPlan, TileConfig

    tile = TileConfig("pairs" if order == "pairs" else "grouped", block_n=64, block_k=64, num_stages=2)
    calls = []

    def run(x, ids, weights, operands):
        call = describe_experts(x, ids, operands.up, operands.down, operands.form)
        calls.append(call)
        return prepare_experts(ExpertsPlan(order, rows, tile, tile), call)(x, ids, weights, *operands.tensors)

    model = AutoModelForCausalLM.from_pretrained(BYTE_MIXTRAL, dtype=torch.float32, use_fused_mlp=True).to(device)
    ids = torch.tensor([list(b"def main():")], device=device)
    expected = unfuse_model(model)(ids).logits
    fuse_model(model, strict=True)
    experts_as_on_gpu(monkeypatch)
    monkeypatch.setattr(ops, "experts_if_fits", run)
    launch_cache.remembered.clear()
    logits = model(ids).logits
    assert len(calls) == 3
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("length, texts", [(1, 64), (12, 32), (300, 6)])
@torch.no_grad()
def test_smollm2_logits_in_bf16(smollm2, length, texts):
    """Fused bf16 logits are no more than twice as far as eager's from those that the same weights give in fp32.

    Thirty layers make one text's error a matter of luck, ten times larger or smaller, hence the mean over texts.
    """
    original, fused, tokenizer = smollm2
    eager, kernels = copy.deepcopy(original).cuda().bfloat16(), copy.deepcopy(fused).cuda().bfloat16()
    oracle = copy.deepcopy(eager).float()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][0, : length * texts].cuda().view(texts, length)
    expected, unfused = oracle(ids).logits, eager(ids).logits
    fused_errors = torch.stack([kernels(text[None]).logits[0] for text in ids]).float() - expected
    ratios = (fused_errors.flatten(1).norm(dim=1) / (unfused.float() - expected).flatten(1).norm(dim=1)).tolist()
    assert statistics.geometric_mean(ratios) <= 2, sorted(ratios)


@pytest.mark.gpu
@pytest.mark.slow
@torch.no_grad()
def test_smollm2_with_fp8_mlps(smollm2):
    """Rows of 576 weights end in half a block. FP8 raises the perplexity by less than 1 %."""
    original, _, tokenizer = smollm2
    plain = copy.deepcopy(original).cuda().bfloat16()
    names = [name for name, _ in plain.named_modules() if name.endswith(".mlp")]
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :2048].cuda()
    report = validate(quantized(plain, names), ids, reference=plain, new_tokens=0)
    assert report.passed and len(report.layers) == 30, str(report)
    assert report.logits.perplexity <= 1.01 * report.logits.reference_perplexity


@pytest.mark.gpu
def test_device_map(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, use_fused_mlp="strict", device_map="cuda:0", dtype=torch.bfloat16
    )
    assert all(mlp.reason is None for mlp in fusion_report(model).mlps)
