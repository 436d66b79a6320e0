"""Several processes: tensor parallel, where each holds a part of every projection, and FSDP2."""

import os
import socket
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import as_on_gpu, experts_as_on_gpu, tiny_model, tiny_moe, token_ids
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import spawn
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_fused_mlp import fuse_model, fusion_report, launch_cache, ops, unfuse_model
from hf_fused_mlp.weights import is_packed

WORLD = 2
LONG = pytest.mark.long
GPUS = pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two GPUs")
DEVICES = pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPUS])])


def run(function, where, directory):
    """`function(where, directory)` in two processes that talk to each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_worker, (function, where, directory, str(port)), nprocs=WORLD)


def _worker(rank, function, where, directory, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": port, "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    if where == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if where == "cuda" else "gloo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_fused_mlp.families.mlp.fused.SMALL_INPUT", 0)
        if where == "cpu":
            as_on_gpu(patch)
        function(where, Path(directory))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what gloo's and autograd's threads do while Python shuts down aborts one run in many


@DEVICES
@pytest.mark.parametrize(
    "model_type", ["llama", *(pytest.param(name, marks=pytest.mark.long) for name in ("phi3", "gpt_neox"))]
)
def test_tensor_parallel(model_type, where, tmp_path):
    tiny_model(model_type, num_key_value_heads=4).save_pretrained(tmp_path / "plain")
    (tmp_path / "model_type").write_text(model_type)
    run(tensor_parallel, where, str(tmp_path))


def tensor_parallel(where, directory):
    """Logits, gradients and the checkpoint of a fused model are those of an unfused one."""
    plain = AutoModelForCausalLM.from_pretrained(directory / "plain", tp_plan="auto").eval()
    fused = AutoModelForCausalLM.from_pretrained(directory / "plain", tp_plan="auto", use_fused_mlp=True).eval()
    ids = token_ids(2, 7).to(where)
    model_type = (directory / "model_type").read_text()
    assert [mlp.state for mlp in fusion_report(fused).mlps] == ["fused"] * 2
    halves, products, mlp_if_fits = [], [], ops.mlp_if_fits

    def counted(*args):
        halves.append(args)
        out = mlp_if_fits(*args)
        launch_cache.remembered.clear()  # so that the next layer, which is like this one, comes here too
        return out

    ops.mlp_if_fits = counted
    ops.act_mul = lambda *args, act_mul=ops.act_mul: products.append(args) or act_mul(*args)
    with torch.no_grad():
        expected = plain(ids).logits
        torch.testing.assert_close(fused(ids).logits, expected, atol=1e-5, rtol=1e-5)
        whole = AutoModelForCausalLM.from_pretrained(directory / "plain").to(where)
        torch.testing.assert_close(expected, whole(ids).logits, atol=1e-4, rtol=1e-4)
    # Transformers gathers what phi3's packed projection gives; the others stay split until down is called
    assert len(products) == (2 if model_type == "phi3" else 0)
    for _, (gate, up, down, *_) in halves:
        assert up.data.shape == (176 // WORLD, 64)
        assert down.data is None
        # on a CPU the shards lie in the checkpoint's file
        assert gate.data is None or where == "cpu" or is_packed(gate.data, up.data)
    assert len(halves) == (0 if model_type == "phi3" else 2)

    grads = []
    for model in (plain, fused):
        model.train()
        model(ids, labels=ids).loss.backward()
        grads.append({name: whole_of(parameter.grad) for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-4, msg=name)

    fused.save_pretrained(directory / "saved")
    unfuse_model(fused).save_pretrained(directory / "unfused")
    plain.save_pretrained(directory / "again")
    dist.barrier()
    files = [(directory / name / "model.safetensors").read_bytes() for name in ("saved", "unfused", "again")]
    assert files[0] == files[1] == files[2]


def whole_of(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@DEVICES
@pytest.mark.parametrize("order", ["before", pytest.param("after", marks=LONG)])
def test_fsdp(order, where, tmp_path):
    run(fsdp_before if order == "before" else fsdp_after, where, str(tmp_path))


def fsdp_before(where, directory):
    fsdp(where, before=True)


def fsdp_after(where, directory):
    fsdp(where, before=False)


def fsdp(where, before):
    """A step of training and a forward, sharded before or after fusing."""
    mesh = init_device_mesh(where, (WORLD,))
    ids = token_ids(2, 9).to(where)

    def sharded(model):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    plain = sharded(tiny_model().to(where))
    model = tiny_model().to(where)
    model = fuse_model(sharded(model), strict=True) if before else sharded(fuse_model(model, strict=True))
    for step in range(2):
        losses = []
        for m in (plain, model):
            m.train()
            loss = m(ids, labels=ids).loss
            loss.backward()
            torch.optim.SGD(m.parameters(), lr=0.1).step()
            m.zero_grad()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
        with torch.no_grad() if step else nullcontext():
            torch.testing.assert_close(model.eval()(ids).logits, plain.eval()(ids).logits)
    for (name, p), (_, q) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(whole_of(q), whole_of(p), msg=name)

    plain = sharded(tiny_moe().to(where).eval())
    model = tiny_moe().to(where).eval()
    model = fuse_model(sharded(model)) if before else sharded(fuse_model(model, strict=True))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        calls = experts_as_on_gpu(patch)
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
        assert len(calls) == (0 if before else 2)  # of gathered weights
    if before:
        assert all("fuse before weights are sharded" in experts.reason for experts in fusion_report(model).experts)


@pytest.mark.gpu
@GPUS
@pytest.mark.parametrize("order", ["fused at load", "fused afterwards"])
@torch.no_grad()
def test_layers_on_two_gpus(order, tmp_path):
    """Kernels run on the GPU that a layer is on, whichever is the current one."""
    tiny_model().save_pretrained(tmp_path)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1}
    places |= {"model.norm": 1, "lm_head": 1}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)
    fused = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, use_fused_mlp=order == "fused at load")
    fuse_model(fused, strict=True)
    assert all(mlp.reason is None for mlp in fusion_report(fused).select("fused"))
    assert [layer.mlp.up_proj.weight.device.index for layer in fused.model.layers] == [0, 1]
    ids = token_ids(2, 7).to(0)
    for current in (0, 1):
        with torch.cuda.device(current):
            torch.testing.assert_close(fused(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
            assert torch.equal(fused.generate(ids, max_new_tokens=8), plain.generate(ids, max_new_tokens=8))


@DEVICES
def test_parallel_experts(where, tmp_path):
    if not hasattr(DistributedConfig, "ep_size"):
        pytest.skip("this Transformers shards experts in another way")
    for model_type in ("mixtral", "qwen3_moe"):
        tiny_moe(model_type, num_key_value_heads=4).save_pretrained(tmp_path / model_type)
    run(tensor_and_expert_parallel, where, str(tmp_path))


def tensor_and_expert_parallel(where, directory):
    parallel_experts(where, directory / "mixtral", {"tp_size": WORLD})
    # "auto" masks the ids of the other process's experts, and exchanges tokens where gradients are needed
    for implementation in ("auto", "all_to_all"):
        config = {"tp_size": WORLD, "ep_size": WORLD, "ep_implementation": implementation}
        parallel_experts(where, directory / "qwen3_moe", config)


def parallel_experts(where, path, config):
    """Each process's own experts, or its part of each, run fused by Transformers' door; by ours they say why not."""
    ids = token_ids(2, 7).to(where)

    def load(**options):
        distributed = DistributedConfig(**config)
        return AutoModelForCausalLM.from_pretrained(path, distributed_config=distributed, **options).eval()

    plain, by_flag, fused = load(), load(use_fused_mlp=True), load(experts_implementation="hf_fused_mlp")
    report = fusion_report(by_flag).experts
    assert all("as expert and tensor parallelism do" in experts.reason for experts in report), report
    assert [experts.state for experts in report] == ["skipped"] * 2
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        calls = experts_as_on_gpu(patch)
        expected = plain(ids).logits
        whole = AutoModelForCausalLM.from_pretrained(path).to(where)(ids).logits
        torch.testing.assert_close(expected, whole, atol=1e-4, rtol=1e-4)
        assert torch.equal(by_flag(ids).logits, expected)
        assert not calls
        torch.testing.assert_close(fused(ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert len(calls) == 2
        for _, routed, _, (up, *_) in calls:
            assert up.shape == ((3, 96, 64) if "ep_size" in config else (6, 96 // WORLD, 64))
            assert (routed == len(up)).any() == (config.get("ep_implementation") == "auto"), "ids of another process"
    grads = []
    for model in (plain, by_flag, fused):
        model.train()
        model(ids, labels=ids).loss.backward()
        grads.append({name: whole_of(parameter.grad) for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        for other in grads[1:]:
            torch.testing.assert_close(other[name], grad, atol=1e-6, rtol=1e-4, msg=name)
    saved = path.parent / "saved"
    for name, model in (("plain", plain), ("by flag", by_flag), ("fused", fused)):
        model.save_pretrained(saved / name)
    dist.barrier()
    files = [(saved / name / "model.safetensors").read_bytes() for name in ("plain", "by flag", "fused")]
    assert files[0] == files[1] == files[2]
    dist.barrier()
