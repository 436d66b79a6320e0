"""The rule: a plan for problems without measurements, made of the configurations with the least expected time.

`cost.py` predicts the time of floats in 16 bits that are stored row by row. Fp32, FP8 and transposed weights repeat
what won nearby (docs/notes-kernels.md). The kernels for few tokens are bound by memory, and so are candidates on every
GPU that can run them; `gemm` is one on Hopper only, and Turing multiplies no tiles (`GPU.has_dot`).
"""

from collections.abc import Iterator

from hf_fused_mlp.kernels import epilogue, fp8_gemm, fp8_skinny, gemm, skinny, transposed_skinny, wide
from hf_fused_mlp.modes import no_kernels_on
from hf_fused_mlp.tuning.buckets import bucket
from hf_fused_mlp.tuning.cost import expected_us
from hf_fused_mlp.types import (
    SCALE_BLOCK,
    TORCH,
    UNFUSED,
    LinearKey,
    Plan,
    ProblemKey,
    TileConfig,
    next_power_of_two,
)

SMALL_GEMM = 30.0  # microseconds, up to which a GEMM without a bias and one kernel of ours beat PyTorch's two launches
# microseconds of an original MLP, up to which eager mode waits for the host: encoders of 86 to 150 M parameters on an
# H100 were 0.86x to 0.97x with kernels that save the GPU a few microseconds (docs/notes-kernels.md). Twice as many
# without a gate, where kernels save no launch
HOST_BOUND = 100.0
DECODED = 32  # tokens at once, as in decoding, for which our launches take the host no longer than the original
FEW = 64  # tokens, from which on a tile of `gemm` is worth its padding; without a gate later
MANY = 512


def heuristic_plan(key: ProblemKey) -> Plan:
    """The plan by rule; every key has one."""
    if key.storage != "float":
        key = bucket(key)
    return Plan(up=_linear(key.up), down=_linear(key.down) if key.out else TORCH)


def gains_nothing_in_eager(key: ProblemKey, plan: Plan, up_layers: int) -> bool:
    """Whether the original forward is as fast as `plan` in eager mode, which also takes the host's time.

    True for PyTorch's own operations, and for MLPs so small that the GPU presumably waits for the host. Not for up to
    `DECODED` tokens, and not if gate and up are two layers (`up_layers` is 2): then our launches take the host less.
    """
    if key.storage == "fp8":  # whose original forward needs other kernels
        return False
    if plan == UNFUSED:
        return True
    if up_layers > 1 or key.m <= DECODED or key.dtype.itemsize != 2:
        return False
    limit = HOST_BOUND if key.gated else 2 * HOST_BOUND
    return expected_us(key.up, TORCH) + (expected_us(key.down, TORCH) if key.out else 0.0) < limit


def _linear(key: LinearKey) -> TileConfig:
    if not key.gpu.is_nvidia or key.dtype.itemsize > 4 or no_kernels_on(key.gpu, key.dtype):
        return TORCH
    if not key.gpu.has_dot:
        return _without_dot(key)
    if key.storage == "fp8":
        return _fp8(key)
    if key.storage == "transposed":
        return _transposed(key)
    if key.m == 1:
        return _gemv(key)
    if key.dtype.itemsize > 2:  # fp32 without tf32 is what the library is best at
        return TileConfig("elementwise") if key.gated else TORCH
    by_library = _by_library(key)
    times = {config: expected_us(key, config) for config in by_library}
    times |= {config: _margin(key, config) * expected_us(key, config) for config in _ours(key)}
    return min(times, key=lambda config: times[config])


def _margin(key: LinearKey, config: TileConfig) -> float:
    """How many times faster than PyTorch's GEMMs a kernel must be expected to be.

    Predictions are off by a few percent. The margins come from 51 shapes on an H100 (docs/benchmarks/h100-rule.json).
    """
    if key.gated:
        return 1.0 if key.m > MANY else 1.06 if key.m > 128 else 1.02
    if config.kernel == "gemv":
        return 1.15
    return 1.1 if config.kernel == "skinny" and key.m > 32 else 1.05


def _without_dot(key: LinearKey) -> TileConfig:
    """For Turing, which runs fp16 only: configurations without `tl.dot`. Nothing was measured there."""
    if key.storage == "fp8":
        return TORCH
    if key.storage == "transposed":
        return _transposed(key)
    return _gemv(key) if key.m <= 2 else _by_library(key)[0]


def _gemv(key: LinearKey) -> TileConfig:
    return TileConfig("gemv", block_k=2048 if key.k > 2048 else 1024, num_warps=4)


def _by_library(key: LinearKey) -> list[TileConfig]:
    """The configurations that use PyTorch's GEMMs. With a gate, one kernel is never slower than two."""
    if not key.gated:
        if epilogue.supports(key) is None:  # as fast as PyTorch's GEMM without an activation
            return [TileConfig("epilogue")]
        is_aligned = key.k % 16 == 0 and key.n % 16 == 0
        if wide.supports(key) is not None or not is_aligned or key.m <= 2:
            return [TORCH]
        return [TileConfig("wide")] if expected_us(key, TORCH) < SMALL_GEMM else [TORCH, TileConfig("wide")]
    if wide.supports(key) is not None:
        return [TileConfig("elementwise")]
    # from there on cuBLAS runs two narrow GEMMs faster than a wide one at times, which the model does not know
    return [TileConfig("wide")] if key.m <= MANY or key.k % 8 or key.n % 8 else [TileConfig("elementwise")]


def _ours(key: LinearKey) -> Iterator[TileConfig]:
    """The kernels' configurations that won somewhere, for rows that they can read fast."""
    if key.m == 2:
        yield _gemv(key)
    if skinny.supports(key) is None and (key.gated or key.m <= FEW):
        yield from _skinny(key)
    is_bare = key.activation == "identity" and not key.gated
    if key.gpu.capability == (9, 0) and not is_bare and gemm.supports(key) is None:
        planes = 2 if key.gated else 1
        for block_m, rows in ((128, 256), (64, 256), (128, 128)):
            # without a gate nothing but the activation is saved, which a short K's first loads outweigh
            if key.m > FEW if key.gated else key.m >= MANY and key.k >= 2048 and block_m * rows == 128 * 256:
                # a last group of few tiles reads its weights once more
                group_m = 16 if 8 < -(-key.m // block_m) <= 16 else 8
                yield TileConfig("gemm", block_m, rows // planes, 64, num_warps=8, num_stages=4, group_m=group_m)


def _skinny(key: LinearKey) -> Iterator[TileConfig]:
    """All tokens in one tile, so that weights are read once; where many multiprocessors would be idle K may be split,
    or with a gate the tokens."""
    tokens, block_n, planes = max(16, next_power_of_two(key.m)), 64, 2 if key.gated else 1
    for block_m in (tokens, tokens // 2, tokens // 4):
        tiles = tokens // block_m * -(-key.n // block_n)
        if block_m < 16 or (block_m < tokens and (not key.gated or tiles > key.gpu.num_sms)):
            continue
        for split_k in (1, 2, 4) if tiles < key.gpu.num_sms and not key.gated else (1,):
            for block_k, stages in ((128, 4), (256, 3)) if split_k == 2 and block_m <= 32 else ((128, 4),):
                stage_bytes = (block_m + block_n * planes) * block_k * key.dtype.itemsize
                stages = min(stages, max(1, key.gpu.shared_memory // stage_bytes))
                yield TileConfig("skinny", block_m, block_n, block_k, num_stages=stages, split_k=split_k)


def _transposed(key: LinearKey) -> TileConfig:
    """For floats stored as `[K, N]`."""
    if key.gated:
        return TileConfig("elementwise")
    # more tokens than a tile of 16 pay where all tiles of four parts of K run at once
    is_narrow = key.activation == "identity" and 4 * -(-key.n // 64) <= key.gpu.num_sms
    if transposed_skinny.supports(key) is None and key.m <= (64 if is_narrow else 16):
        return _few_tokens(key)
    return TileConfig("epilogue") if epilogue.supports(key) is None else TORCH


def _fp8(key: LinearKey) -> TileConfig:
    """For weights in FP8."""
    if key.m == 1:
        return TileConfig(
            "fp8_gemv", block_n=1, block_k=max(SCALE_BLOCK, min(4096, next_power_of_two(key.k))), num_warps=4
        )
    if key.dtype.itemsize == 2 and key.m <= 64:
        block_m, block_n, quantized = max(16, key.m), 64, fp8_skinny.multiplies_fp8(key.gpu)
        stage_bytes = block_m * SCALE_BLOCK * (1 if quantized else 2) + block_n * SCALE_BLOCK * (2 if key.gated else 1)
        # a converted gate and up take so many registers that fewer stages, and so more blocks at once, are faster
        stages = min(4 if quantized or not key.gated else 3, max(1, key.gpu.shared_memory // stage_bytes))
        split_k = _split_k(key, block_n)
        return TileConfig("fp8_skinny", block_m, block_n, SCALE_BLOCK, num_stages=stages, split_k=split_k)
    return TileConfig("fp8_gemm" if fp8_gemm.supports(key) is None else "fp8_dequantized")


def _split_k(key: LinearKey, block_n: int) -> int:
    """The number of parts of K with which tiles of this many rows fill the GPU; with a gate K is not split."""
    split_k = 1
    while split_k < 4 and not key.gated and -(-key.n // block_n) * split_k < key.gpu.num_sms:
        split_k *= 2
    return split_k


def _few_tokens(key: LinearKey) -> TileConfig:
    """All tokens in one tile, and K split if many multiprocessors would be idle."""
    block_m, block_n, split_k = max(16, key.m), 64, _split_k(key, 64)
    block_k, num_stages = (256, 3) if split_k == 2 and block_m <= 32 else (128, 4)
    num_stages = min(num_stages, max(1, key.gpu.shared_memory // ((block_m + block_n) * block_k * key.dtype.itemsize)))
    return TileConfig("transposed_skinny", block_m, block_n, block_k, num_stages=num_stages, split_k=split_k)
