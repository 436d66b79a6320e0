"""Every kernel family against the oracle: interpreted on the CPU, compiled on a GPU."""

import pytest
import torch
from numerics import assert_accurate, oracle_of, random_mlp

from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.dispatch import run_plan
from hf_fused_mlp.reference import mlp_ref
from hf_fused_mlp.types import TORCH, Plan, TileConfig

SMALL = {
    "gemv": TileConfig("gemv", block_n=16, block_k=64),
    "skinny": TileConfig("skinny", block_m=16, block_n=64, block_k=64, num_stages=3),
    "gemm": TileConfig("gemm", block_m=64, block_n=64, block_k=64, num_stages=3, group_m=2),
}
KINDS = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])


def check(family, M, H, I, device, gated=True, bias=False, activation="silu", dtype=torch.float16, config=None):
    operands = random_mlp(H, I, gated, bias, dtype, device)
    x = torch.randn(M, H, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    config = config or SMALL[family]
    plan = Plan(up=config, down=TORCH if family == "gemm" else config)
    assert_accurate(
        run_plan(plan, x, *operands, activation),
        mlp_ref(x, *operands, activation),
        oracle_of(x, operands, activation),
    )


@KINDS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("family", SMALL)
def test_activations(family, activation, gated, device):
    check(family, 3, 72, 104, device, gated, bias=True, activation=activation)


@KINDS
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("M", [1, 2, 3, 16, 17, 63, 128])
@pytest.mark.parametrize("family", SMALL)
def test_token_counts(family, M, gated, bias, device):
    check(family, M, 72, 104, device, gated, bias)


@pytest.mark.parametrize("shape", [(100, 72), (72, 100), (33, 7), (128, 256)], ids=str)
@pytest.mark.parametrize("family", ["gemv", "skinny"])
def test_any_hidden_and_intermediate_size(family, shape, device):
    check(family, 5, *shape, device)


@pytest.mark.parametrize("family", ["gemv", "skinny"])
def test_fp32_is_exact(family, device):
    check(family, 3, 72, 104, device, dtype=torch.float32)


def test_gemv_bf16(device):
    check("gemv", 2, 72, 104, device, dtype=torch.bfloat16)
