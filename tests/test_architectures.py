"""Every registry row against the Transformers class it is about."""

import copy

import pytest
import torch
from models import MLP_CLASSES, MODEL_TYPES, real_mlp, tiny_model, token_ids
from numerics import assert_accurate, run_plan

from hf_fused_mlp import fuse_model, fusion_report, unfuse_model
from hf_fused_mlp.families.mlp.fused import FusedMLP
from hf_fused_mlp.types import Plan, TileConfig

SKINNY = TileConfig("skinny", block_m=16, block_n=64, block_k=64, num_stages=3)

ROWS = pytest.mark.parametrize("path", MLP_CLASSES, ids=lambda path: path.rsplit(".", 1)[1])


@ROWS
@pytest.mark.parametrize(
    "dtype, m, config", [(torch.float32, 2, TileConfig("gemv", block_k=64)), (torch.float16, 5, SKINNY)], ids=str
)
def test_kernels_compute_what_the_class_computes(path, dtype, m, config, device):
    mlp = real_mlp(path, dtype, device)
    x = torch.randn(m, 64).to(dtype).to(device)
    eager, oracle = mlp(x), copy.deepcopy(mlp).double()(x.double())
    fuse_model(mlp, strict=True)
    assert_accurate(run_plan(Plan(config, config), x, *mlp.operands().flat()), eager, oracle)


@pytest.mark.gpu
@ROWS
@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 17, 64), (2, 100, 64), (64,), (2, 3, 4, 64), (0, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@torch.no_grad()
def test_fused_module_on_gpu(path, dtype, shape):
    mlp = real_mlp(path, dtype, "cuda")
    x = torch.randn(shape, device="cuda").to(dtype)
    eager, oracle = mlp(x), copy.deepcopy(mlp).double()(x.double())
    fuse_model(mlp, strict=True)
    assert mlp.runs() == (None, None)
    fused = mlp(x)
    assert fused.shape == eager.shape
    assert fused.stride() == eager.stride()
    if fused.numel():
        assert_accurate(fused, eager, oracle)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_model_round_trip(model_type):
    """Fused on the CPU, a model gives the same bits, keeps its state dict, and comes back as it was."""
    model = tiny_model(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    ids = token_ids(2, 9)
    with torch.no_grad():
        logits = model(ids).logits
        fuse_model(model, strict=True)
        assert sum(isinstance(module, FusedMLP) for module in model.modules()) == 2
        assert torch.equal(model(ids).logits, logits)
    assert len(fusion_report(model).select("fused")) == 2

    unfuse_model(model)
    assert [type(module) for module in model.modules()] == classes
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 512, 4096])
@pytest.mark.parametrize(
    "row, sizes",
    [
        (MLP_CLASSES[0], {"hidden_size": 4096, "intermediate_size": 14336}),
        ("transformers.models.mistral.modeling_mistral.MistralMLP", {"hidden_size": 4096, "intermediate_size": 14336}),
        (
            "transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXMLP",
            {"hidden_size": 4096, "intermediate_size": 16384},
        ),
    ],
    ids=["llama-3-8b", "mistral-7b", "pythia-6.9b"],
)
@torch.no_grad()
def test_published_shapes(row, sizes, m):
    mlp = real_mlp(row, torch.bfloat16, "cuda", **sizes)
    x = torch.randn(m, sizes["hidden_size"], device="cuda").bfloat16()
    eager, oracle = mlp(x), copy.deepcopy(mlp).double()(x.double())
    fuse_model(mlp, strict=True)
    assert_accurate(mlp(x), eager, oracle)
    # the plan may prefer the library's GEMM at a shape; the kernels have to be right there all the same
    config = {1: TileConfig("gemv", block_k=2048), 16: SKINNY}.get(
        m, TileConfig("gemm", 128, 128, 64, num_warps=8, num_stages=3, group_m=8)
    )
    assert_accurate(run_plan(Plan(config, config), x, *mlp.operands().flat()), eager, oracle)
