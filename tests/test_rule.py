"""The rule for problems that nothing was measured for, and the model of costs that it rests on."""

import itertools
from dataclasses import replace

import pytest
import torch

from hf_fused_mlp.tuning import heuristics
from hf_fused_mlp.tuning.buckets import bucket
from hf_fused_mlp.tuning.cost import expected_us
from hf_fused_mlp.tuning.heuristics import HOST_BOUND, gains_nothing_in_eager, heuristic_plan
from hf_fused_mlp.types import GPU, TORCH, UNFUSED, ExpertsKey, ProblemKey, TileConfig

H100 = GPU("NVIDIA H100 80GB HBM3", 132, (9, 0), 232448)
A100 = GPU("NVIDIA A100", 108, (8, 0), 166912)
COUNTS = (1, 2, 3, 8, 16, 24, 48, 64, 100, 128, 200, 300, 512, 600, 1000, 2048, 4096, 16384)


def problem(m, hidden, intermediate, gated=True, gpu=H100, **changes):
    key = ProblemKey(m, hidden, intermediate, hidden, gated, "silu", torch.bfloat16, False, True, gpu)
    return replace(key, **changes)


@pytest.mark.parametrize(
    "m, up, down",
    [
        (1, "gemv", "gemv"),
        (16, "skinny", "skinny"),
        (4096, "gemm", "torch"),
    ],
)
def test_what_won_on_an_h100(m, up, down):
    """Llama-3.2-1B, whose plans were measured too; and Qwen3-14B between few tokens and many."""
    plan = heuristic_plan(problem(m, 2048, 8192))
    assert (plan.up.kernel, plan.down.kernel) == (up, down)
    plan = heuristic_plan(problem(300, 5120, 17408))
    assert (plan.up.kernel, plan.down.kernel) == ("wide", "torch")


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("m", COUNTS[2:])
def test_rows_that_are_not_aligned_are_left_to_the_library(m, gated):
    """The kernels took 4 times as long as PyTorch's GEMMs there."""
    plan = heuristic_plan(problem(m, 1000, 2730, gated))
    assert plan.up.kernel == ("wide" if gated else "torch")
    assert plan.down == TORCH
    assert heuristic_plan(problem(m, 1000, 2730, True, one_block=False)).up.kernel == "elementwise"


def test_the_librarys_epilogue_where_it_has_the_activation():
    """SigLIP, Starcoder2 and GPT-2, unless the kernels for few tokens read the weights faster; OPT's ReLU likewise."""
    plain = {"gated": False, "activation": "gelu_tanh", "bias": True}
    for m in COUNTS[8:]:
        for changes in ({}, {"activation": "relu"}, {"gpu": A100}, {"dtype": torch.float16}):
            assert heuristic_plan(problem(m, 4608, 18432, **(plain | changes))).up == TileConfig("epilogue")
            key = problem(m, 768, 3072, storage="transposed", **(plain | changes))
            assert heuristic_plan(key).up == TileConfig("epilogue")
    assert [heuristic_plan(problem(m, 3072, 12288, **plain)).up.kernel for m in (1, 16)] == ["gemv", "skinny"]
    for other in ({"activation": "gelu"}, {"bias": False}, {"dtype": torch.float32}, {"gated": True}):
        assert heuristic_plan(problem(512, 4608, 18432, **(plain | other))).up.kernel != "epilogue"


def test_conv1d_on_an_h100():
    """Measured for GPT-2 and GPT-2 XL, and one as large as Starcoder2-3B, whose 48 tiles are too many to be split."""
    gpt2 = {"gated": False, "activation": "gelu_tanh", "bias": True, "storage": "transposed"}
    for m, hidden in itertools.product((1, 16, 33, 64, 100), (768, 1600, 3072)):
        plan = heuristic_plan(problem(m, hidden, 4 * hidden, **gpt2))
        assert plan.up.kernel == ("transposed_skinny" if m <= 16 else "epilogue")
        is_few = m <= 16 or (m <= 64 and hidden < 3072)
        assert plan.down.kernel == ("transposed_skinny" if is_few else "torch")


def test_where_the_gpu_waits_for_the_host_the_original_runs_in_eager_mode(monkeypatch):
    """BERT, ViT, CLIP and ModernBERT, whose layers take the GPU less time than Python."""
    monkeypatch.setattr(heuristics, "HOST_BOUND", HOST_BOUND)

    def gains_nothing(key, up_layers=1):
        return gains_nothing_in_eager(key, heuristic_plan(key), up_layers)

    for m in (50, 197, 512, 1576):
        for activation in ("gelu", "quick_gelu"):
            assert gains_nothing(problem(m, 768, 3072, gated=False, activation=activation, bias=True))
        assert gains_nothing(problem(m, 768, 1152))  # gate and up are one layer
        assert not gains_nothing(problem(m, 768, 1152), up_layers=2)
    for m in (1, 16, 32):
        assert not gains_nothing(problem(m, 768, 3072, gated=False)) and not gains_nothing(problem(m, 768, 1152))
    plain = problem(512, 768, 3072, gated=False)
    for other in (problem(512, 768, 1152, dtype=torch.float32), replace(plain, storage="fp8")):
        assert not gains_nothing(other)
    conv1d = replace(plain, storage="transposed")
    assert gains_nothing(conv1d) and gains_nothing_in_eager(conv1d, UNFUSED, 1)
    half = replace(plain, out=0)
    assert gains_nothing(half) and gains_nothing_in_eager(half, UNFUSED, 1)
    # larger ones take the GPU longer than Python
    assert not gains_nothing(problem(512, 3072, 8192)) and not gains_nothing(problem(4096, 2048, 8192, gated=False))
    assert heuristic_plan(problem(16384, 768, 3072, gated=False)).up == TORCH
    # of three kernels that PyTorch takes for the activation, one is left at any size
    many = problem(16384, 768, 3072, gated=False, activation="quick_gelu")
    assert heuristic_plan(many).up == TileConfig("wide") and not gains_nothing(many)


def test_other_gpus_run_no_gemm_of_ours():
    for m in COUNTS:
        plan = heuristic_plan(problem(m, 4096, 14336, gpu=A100))
        assert "gemm" not in (plan.up.kernel, plan.down.kernel)


def test_the_library_is_chosen_unless_a_kernel_is_clearly_faster():
    """Without a gate there is PyTorch's own path, and a kernel has to be expected to be faster than the error."""
    for m in COUNTS[1:]:
        key = problem(m, 4096, 16384, gated=False)
        plan = heuristic_plan(key)
        for launch, config in ((key.up, plan.up), (key.down, plan.down)):
            assert config == TORCH or expected_us(launch, config) < expected_us(launch, TORCH) / 1.04


def test_costs_grow_with_the_problem():
    configs = (
        *(TORCH, TileConfig("wide"), TileConfig("elementwise"), TileConfig("gemv", block_k=2048)),
        *(TileConfig("skinny", 64, 64, 128, num_stages=3), TileConfig("gemm", 128, 128, 64, num_stages=4)),
    )
    for config in configs:
        small, more, wide = (problem(m, 2048, n).up for m, n in ((64, 8192), (512, 8192), (64, 16384)))
        assert 0 < expected_us(small, config) < expected_us(wide, config)
        assert expected_us(small, config) <= expected_us(more, config)
    # weights of 350 MB at 3 TB/s
    key = problem(1, 4096, 14336)
    assert 100 < sum(expected_us(launch, TileConfig("gemv")) for launch in (key.up, key.down)) < 130


def test_a_plan_serves_counts_that_have_as_many_rounds_of_tiles():
    """Up to 128 tokens and from 4096 on, powers of two; between, no count is more than 1.5 times the one before."""
    of = {m: bucket(problem(m, 64, 64)).m for m in range(1, 20000)}
    assert all(of[m] >= m and of[of[m]] == of[m] for m in of if m <= 16384)
    assert [of[m] for m in (1, 3, 100, 129, 193, 300, 600, 1100, 3000, 16384)] == [
        *(1, 4, 128, 192, 256, 320, 640, 1280, 3072, 16384)
    ]
    assert all(-(-of[m] // 128) == -(-m // 128) for m in range(1, 385)), "as many tiles of 128 tokens"
    counts = sorted({of[m] for m in range(128, 4097)})
    assert all(after <= 1.5 * before for before, after in itertools.pairwise(counts))
    assert of[16385] == 32768, "beyond the counts that ship, a user may measure powers of two"
    experts = ExpertsKey(96, 8, 2, 64, 64, "planes", True, "silu", torch.bfloat16, False, H100)
    assert bucket(replace(experts, m=300)).m == 512
