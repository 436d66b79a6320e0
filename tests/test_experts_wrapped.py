"""What people put around routed experts: adapters, hooks, offload, quantizers, training, in any order with fusing."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from models import experts_as_on_gpu, token_ids
from test_experts import tiny
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config, GptOssConfig, TorchAoConfig

from hf_fused_mlp import fuse_model, fusion_report, unfuse_model
from hf_fused_mlp.families.experts import FusedExperts

ORDERS = pytest.mark.parametrize("order", ["before", "after"])
STACKS = "gate_up_proj", "down_proj"


@pytest.fixture
def calls(monkeypatch):
    """Experts on a CPU take the paths that they take on a GPU; the calls of their operator."""
    return experts_as_on_gpu(monkeypatch)


def ids():
    return token_ids(2, 7) % 64


def lora(model, *names, stacks=STACKS):
    """`model` with adapters of some effect on these parameters of its experts."""
    peft = pytest.importorskip("peft")
    for index, name in enumerate(names):
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj"], target_parameters=[f"mlp.experts.{stack}" for stack in stacks]
        )
        if index == 0:
            model = peft.get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@ORDERS
@pytest.mark.parametrize("stacks", [STACKS, STACKS[:1]], ids=["both", "one"])
def test_lora(order, stacks, calls):
    """An adapter runs the original forward, and the report says so; without it the operator runs."""
    plain = lora(tiny(), "one", stacks=stacks)
    if order == "before":
        fused = fuse_model(lora(tiny(), "one", stacks=stacks), strict=True)
    else:
        fused = lora(fuse_model(tiny(), strict=True), "one", stacks=stacks)
    with torch.no_grad():
        assert torch.equal(fused(ids()).logits, plain(ids()).logits)
        assert not calls
        assert all(experts.state == "fused" for experts in fusion_report(fused).experts)
        assert all("PEFT adapts" in experts.reason for experts in fusion_report(fused).experts)
        with plain.disable_adapter(), fused.disable_adapter():
            assert [experts.reason for experts in fusion_report(fused).experts] == [None, None]
            torch.testing.assert_close(fused(ids()).logits, plain(ids()).logits, atol=1e-5, rtol=1e-5)
        assert len(calls) == 2
    grads = []
    for model in (plain, fused):
        model.train()
        model(ids(), labels=ids()).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad(), model.eval()
    assert sum(grad is not None for grad in grads[0].values()) == 2 * 2 * (1 + len(stacks))
    for (name, grad), other in zip(grads[0].items(), grads[1].values(), strict=True):
        assert (grad is None and other is None) or torch.equal(grad, other), name
    assert len(calls) == 2

    with torch.no_grad():
        plain.merge_adapter(), fused.merge_adapter()
        torch.testing.assert_close(fused(ids()).logits, plain(ids()).logits, atol=1e-5, rtol=1e-5)
        assert len(calls) == 4
        plain.unmerge_adapter(), fused.unmerge_adapter()
        expected, merged = plain.merge_and_unload(), fused.merge_and_unload()
        assert all(isinstance(layer.mlp.experts, FusedExperts) for layer in merged.model.layers)
        assert [experts.reason for experts in fusion_report(merged).experts] == [None, None]
        torch.testing.assert_close(merged(ids()).logits, expected(ids()).logits, atol=1e-5, rtol=1e-5)
        assert len(calls) == 6
        assert torch.equal(unfuse_model(merged)(ids()).logits, expected(ids()).logits)


def test_lora_by_the_door_of_transformers(calls):
    plain, model = lora(tiny(), "one", "two"), lora(tiny(experts_implementation="hf_fused_mlp"), "one", "two")
    plain.get_base_model().set_experts_implementation("grouped_mm")
    with torch.no_grad():
        for adapter in ("one", "two"):
            plain.set_adapter(adapter), model.set_adapter(adapter)
            assert torch.equal(model(ids()).logits, plain(ids()).logits)
        assert not calls
        with plain.disable_adapter(), model.disable_adapter():
            torch.testing.assert_close(model(ids()).logits, plain(ids()).logits, atol=1e-5, rtol=1e-5)
        assert len(calls) == 2


@ORDERS
@pytest.mark.parametrize("offload", ["cpu", "disk", "one layer on disk", "none"])
@torch.no_grad()
def test_accelerate(offload, order, tmp_path, calls):
    """The operator reads the weights that a hook around the experts has fetched for the call."""
    plain, model = tiny(), tiny()
    expected = plain(ids()).logits
    if order == "after":
        fuse_model(model, strict=True)
    if offload == "cpu":
        cpu_offload(model, torch.device("cpu"))
    elif offload == "disk":
        disk_offload(model, tmp_path, torch.device("cpu"))
    else:
        places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm"), "cpu")
        places |= {"lm_head": "cpu", "model.layers.1": "cpu" if offload == "none" else "disk"}
        dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    fuse_model(model, strict=True)
    assert model.model.layers[1].mlp.experts.down_proj.is_meta == (offload != "none")
    torch.testing.assert_close(model(ids()).logits, expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2
    assert not any(operand.is_meta for call in calls for operand in call[3][:2])
    assert [(experts.state, experts.reason) for experts in fusion_report(model).experts] == [("fused", None)] * 2

    unfuse_model(model)
    assert torch.equal(model(ids()).logits, expected)
    assert len(calls) == 2
    fuse_model(model, strict=True)
    if offload == "none":  # the others keep their weights on meta
        remove_hook_from_submodules(model)
    torch.testing.assert_close(model(ids()).logits, expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 4


@ORDERS
@torch.no_grad()
def test_a_forward_on_the_instance(order, calls):
    """It runs, whether it was put there before or after fusing, and the report says so."""
    model = tiny()
    experts = model.model.layers[0].mlp.experts
    if order == "after":
        fuse_model(model, strict=True)
    experts.forward = lambda x, *routing: 2 * type(experts).forward(experts, x, *routing)
    doubled = model(ids()).logits
    fuse_model(model)
    torch.testing.assert_close(model(ids()).logits, doubled, atol=1e-6, rtol=1e-5)
    first, second = fusion_report(model).experts
    assert (second.state, second.reason) == ("fused", None)
    if order == "after":
        assert first.state == "fused" and "was replaced after fusing" in first.reason
    else:
        assert first.state == "skipped" and "replaced on the instance" in first.reason


@ORDERS
@torch.no_grad()
def test_a_forward_around_another(order, calls):
    """One that keeps the forward which it found, as parallelism does, keeps the fused one if that was there."""
    model = tiny()
    expected = model(ids()).logits
    experts = model.model.layers[0].mlp.experts
    if order == "after":
        fuse_model(model, strict=True)
    found = experts.forward
    experts.forward = lambda *args: found(*args)
    fuse_model(model)
    torch.testing.assert_close(model(ids()).logits, expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == (2 if order == "after" else 1)
    first, second = fusion_report(model).experts
    assert first.state == ("fused" if order == "after" else "skipped") and first.reason and second.reason is None
    assert torch.equal(unfuse_model(model)(ids()).logits, expected)
    assert len(calls) == (2 if order == "after" else 1)
    model.set_experts_implementation("hf_fused_mlp")  # reaches what was found
    torch.testing.assert_close(model(ids()).logits, expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == (4 if order == "after" else 3)


def gradients(model):
    loss = model(ids(), labels=ids()).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("door", ["class", "interface"])
@pytest.mark.parametrize("how", ["plain", "autocast", "checkpointing", "reentrant checkpointing", "evaluation mode"])
def test_gradients(how, door, calls):
    """Bit for bit the original's, which runs: nothing of ours has gradients."""
    found = []
    for fused in (False, True):
        model = tiny().train(how != "evaluation mode")
        model.set_experts_implementation("eager" if door == "class" else "grouped_mm")
        if fused and door == "class":
            fuse_model(model, strict=True)
            reason = "in training mode, where the original forward runs" if model.training else None
            assert [experts.reason for experts in fusion_report(model).experts] == [reason] * 2
        elif fused:
            model.set_experts_implementation("hf_fused_mlp")
        if "checkpointing" in how:
            model.gradient_checkpointing_enable({"use_reentrant": how.startswith("reentrant")})
            model.enable_input_require_grads()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found.append(gradients(model))
    assert torch.equal(found[0][0], found[1][0])
    for name, grad in found[0][1].items():
        assert torch.equal(found[1][1][name], grad), name
    assert not calls


@pytest.mark.parametrize("door", ["class", "interface"])
@torch.no_grad()
def test_autocast_without_gradients(door, calls):
    """Autocast rounds what the operator would not."""
    model = tiny()
    model.set_experts_implementation("grouped_mm")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids()).logits
        fuse_model(model, strict=True) if door == "class" else model.set_experts_implementation("hf_fused_mlp")
        assert torch.equal(model(ids()).logits, expected)
    assert not calls


def fp8(model):
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    replace_with_fp8_linear(model, quantization_config=FineGrainedFP8Config())


def mxfp4(model):
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    config = GptOssConfig(hidden_size=32, intermediate_size=24, num_local_experts=6)
    for layer in model.model.layers:
        layer.mlp.experts = Mxfp4GptOssExperts(config)


def gguf(model):
    utils = pytest.importorskip("transformers.integrations.gguf.utils")
    for layer in model.model.layers:
        layer.mlp.experts = utils.GgufExperts(6, 32, 24, 2, 2, torch.nn.SiLU())


QUANTIZED = {
    fp8: "gate_up_proj has scales [6, 2, 1] of torch.float32 for a weight [6, 48, 32], expected one for each block",
    mxfp4: "routed experts, whose weights are one tensor (experts.gate_up_proj",
    gguf: "routed experts, whose weights are one tensor (experts.gate_up_proj",
}


@pytest.mark.parametrize("quantize", QUANTIZED, ids=lambda function: function.__name__)
def test_quantized_experts_are_left_alone(quantize):
    """Before, and where they come after fusing."""
    for fused in (False, True):
        with torch.device("meta"):
            model = tiny()
            quantize(fuse_model(model) if fused else model)
        report = fusion_report(fuse_model(model))
        assert [module.state for module in (*report.experts, *report.mlps)] == ["skipped"] * 2
        assert all(QUANTIZED[quantize] in module.reason for module in (*report.experts, *report.mlps))


@torch.no_grad()
def test_bitsandbytes(tmp_path, calls):
    """It quantizes the projections around experts only, which fuse."""
    pytest.importorskip("bitsandbytes")
    tiny().save_pretrained(tmp_path)
    how = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu"}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, **how)
    fused = AutoModelForCausalLM.from_pretrained(tmp_path, **how, use_fused_mlp=True)
    assert [(experts.state, experts.reason) for experts in fusion_report(fused).experts] == [("fused", None)] * 2
    torch.testing.assert_close(fused(ids()).logits, plain(ids()).logits, atol=1e-4, rtol=1e-4)
    assert len(calls) == 2


@torch.no_grad()
def test_torchao(tmp_path, calls):
    """Experts of which a stack is quantized run as they are, by both doors."""
    quantization = pytest.importorskip("torchao.quantization")
    tiny().save_pretrained(tmp_path)
    config = quantization.FqnToConfig({r"re:.*experts\.down_proj": quantization.Int8WeightOnlyConfig()})
    how = {"quantization_config": TorchAoConfig(config), "device_map": "cpu", "experts_implementation": "eager"}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, **how)
    expected = plain(ids()).logits
    assert not torch.equal(expected, tiny()(ids()).logits), "it is quantized"
    fused = AutoModelForCausalLM.from_pretrained(tmp_path, **how, use_fused_mlp=True)
    assert all("down_proj is Int8Tensor" in experts.reason for experts in fusion_report(fused).experts)
    assert torch.equal(fused(ids()).logits, expected)
    assert not calls
