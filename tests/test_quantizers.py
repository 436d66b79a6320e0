"""Quantized models for real: what fusing leaves as it is, which is everything but activation and product."""

import pytest
import torch
from models import as_on_gpu, tiny_model, token_ids
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from hf_fused_mlp import fuse_model, fusion_report, ops, unfuse_model


def quantized_at_load(model, path, config):
    model.save_pretrained(path)
    return {"quantization_config": config}


def bitsandbytes_8bit(model, path):
    return quantized_at_load(model, path, BitsAndBytesConfig(load_in_8bit=True))


def bitsandbytes_4bit(model, path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return quantized_at_load(model, path, config)


def torchao(model, path):
    from torchao.quantization import Int8WeightOnlyConfig

    return quantized_at_load(model, path, TorchAoConfig(Int8WeightOnlyConfig()))


def quanto(model, path):
    return quantized_at_load(model, path, QuantoConfig(weights="int8"))


def compressed_tensors(model, path):
    """A checkpoint with 8-bit weights, one scale a row."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=8, strategy="channel"))
    config = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], quantization_status="frozen")
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.abs().amax(1, keepdim=True) / 127
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)
    return {}


PACKAGES = {
    bitsandbytes_8bit: "bitsandbytes",
    bitsandbytes_4bit: "bitsandbytes",
    torchao: "torchao",
    quanto: "optimum.quanto",
    compressed_tensors: "compressed_tensors",
}


@pytest.mark.parametrize("quantize", PACKAGES, ids=lambda function: function.__name__)
@torch.no_grad()
def test_a_quantized_model_says_the_same(quantize, tmp_path, monkeypatch):
    pytest.importorskip(PACKAGES[quantize])
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    options = quantize(tiny_model(**sizes), tmp_path)

    def load(**kw):
        return AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", **options, **kw).eval()

    plain, ids = load(), token_ids(2, 7)
    expected = plain.generate(ids, max_new_tokens=8, do_sample=False)
    logits = plain(ids).logits
    assert not torch.equal(logits, tiny_model(**sizes)(ids).logits), "it is quantized"
    model = load(use_fused_mlp=True)
    calls = []
    monkeypatch.setattr(ops, "act_mul", lambda *args, call=ops.act_mul: calls.append(args) or call(*args))
    as_on_gpu(monkeypatch)
    torch.testing.assert_close(model(ids).logits, logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)
    report = fusion_report(model)
    assert [mlp.state for mlp in report.mlps] == ["fused", "fused"]
    assert all("calls some projections" in mlp.reason for mlp in report.mlps), report
    assert len(calls) >= 2 * 9
    assert torch.equal(unfuse_model(model)(ids).logits, logits)
    assert torch.equal(fuse_model(model).generate(ids, max_new_tokens=8, do_sample=False), expected)
