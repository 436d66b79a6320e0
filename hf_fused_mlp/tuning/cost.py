"""Predicts the time of a launch from bytes, operations, rounds of tiles, and a fixed part.

The constants were fitted to launches of 43 MLPs of published models, gated and plain, bf16 and fp16, at 1 to 4096
tokens on one H100 (263 problems, each launch by itself in CUDA graphs with cold weights, 2026-11-26): half of the
predictions of configurations near the best are within 4 %. Other GPUs are taken for an H100 of as many
multiprocessors as they have, which says which of two kernels is faster, not how fast they are.
"""

from hf_fused_mlp.types import LinearKey, TileConfig

H100_SMS = 132
# a launch waits for memory, for arithmetic, or for what one multiprocessor can load: a sum that is near the largest
_POWER = 3.2

# microseconds
LIBRARY_START = 3.1  # a GEMM of cuBLAS's
SPLIT_START = 4.0  # more if it splits K
KERNEL_START = 1.7  # activation, product or both after a GEMM
GEMV_START, SKINNY_START, GEMM_START = 2.7, 2.5, 2.8
SUM_START = 0.6  # more for the sum of the parts, which overlaps

# bytes per microsecond of the whole GPU
READ, SKINNY_READ, GEMV_READ = 2.82e6, 2.98e6, 3.12e6
L2 = 5e6  # products of a GEMM that the next kernel finds in the cache

# operations a microsecond of one multiprocessor, on large tiles and on tiles that are narrow or padded
FLOPS, SMALL_FLOPS, SKINNY_FLOPS = 5.9e6, 4.5e6, 2.8e6
SKINNY_LOAD = 0.069e6  # bytes of weights a microsecond into one multiprocessor

# number of PyTorch's kernels for an activation, if it is not one
_PASSES = {"identity": 0, "relu2": 2, "quick_gelu": 3}

LIBRARY_TILES = ((128, 256), (256, 128), (128, 128), (64, 256), (64, 128), (64, 64))


def expected_us(key: LinearKey, config: TileConfig) -> float:
    """The time of the launches of `config` for `key`, 16-bit floats in rows that are aligned, in microseconds."""
    n, planes = key.n, 2 if key.gated else 1
    if config.kernel == "gemv":
        return GEMV_START + _weight_bytes(key) / _scaled(GEMV_READ, key)
    if config.kernel == "skinny":
        return _skinny(key, config)
    if config.kernel == "gemm":
        return _gemm(key, config)
    if config.kernel == "wide":
        return _library(key, planes * n) + _elementwise(key, planes + 1)
    if config.kernel == "epilogue":
        return _library(key, n)
    products = planes * _library(key, n)
    if config.kernel == "elementwise":
        return products + _elementwise(key, 3)
    activation = _PASSES.get(key.activation, 1) * _elementwise(key, 2)
    return products + activation + (_elementwise(key, 3) if key.gated else 0.0)


def _scaled(rate: float, key: LinearKey) -> float:
    """The rate of the whole GPU, if `H100_SMS` multiprocessors have `rate`."""
    return rate * key.gpu.num_sms / H100_SMS


def _weight_bytes(key: LinearKey) -> int:
    return (2 if key.gated else 1) * key.n * key.k * key.dtype.itemsize


def _together(*us: float) -> float:
    return sum(time**_POWER for time in us) ** (1 / _POWER)


def _elementwise(key: LinearKey, tensors: int) -> float:
    """One kernel that reads and writes so many `[m, n]`."""
    return KERNEL_START + tensors * key.m * key.n * key.dtype.itemsize / _scaled(L2, key)


def _library(key: LinearKey, n: int) -> float:
    """A GEMM of cuBLAS's, which has tiles of many sizes and splits K where they are few."""
    m, k, size = key.m, key.k, key.dtype.itemsize
    times = []
    for block_m, block_n in LIBRARY_TILES:
        tiles = -(-m // block_m) * -(-n // block_n)
        for split in (1, 2, 4, 8):
            if split == 1 or k // split >= 512:
                rounds = -(-tiles * split // key.gpu.num_sms)
                parts = 0.0 if split == 1 else SPLIT_START + 8 * m * n * split / _scaled(2 * READ, key)
                times.append(rounds * 2 * block_m * block_n * k / split / FLOPS + parts)
    return LIBRARY_START + _together(min(times), (m * k + n * k + m * n) * size / _scaled(READ, key))


def _skinny(key: LinearKey, config: TileConfig) -> float:
    """Programs share a multiprocessor if its memory allows it; each of them reads its rows of weights separately."""
    m, n, k, planes, size = key.m, key.n, key.k, 2 if key.gated else 1, key.dtype.itemsize
    split = 1 if key.gated else config.split_k
    rows = planes * config.block_n
    shared = (config.block_m + rows) * config.block_k * size * config.num_stages
    slots = key.gpu.num_sms * max(1, min(4, key.gpu.shared_memory // shared))
    programs = -(-n // config.block_n) * -(-m // config.block_m) * split
    # of each multiprocessor, one after the other
    in_turn = -(-programs // slots) * min(slots // key.gpu.num_sms, -(-programs // key.gpu.num_sms))
    compute = in_turn * 2 * config.block_m * rows * k / split / SKINNY_FLOPS
    load = in_turn * size * rows * k / split / SKINNY_LOAD
    read = (_weight_bytes(key) + m * k * size) / _scaled(SKINNY_READ, key)
    parts = 0.0 if split == 1 else SUM_START + (4 * split + size) * m * n / _scaled(2 * READ, key)
    return SKINNY_START + _together(read, compute, load) + parts


def _gemm(key: LinearKey, config: TileConfig) -> float:
    """Tiles in rounds; with a gate, a last one that fills less than half of the GPU takes half of the time."""
    m, n, k, size = key.m, key.n, key.k, key.dtype.itemsize
    rows = config.block_n * (2 if key.gated else 1)
    whole, rest = divmod(-(-m // config.block_m) * -(-n // config.block_n), key.gpu.num_sms)
    last = 0.0 if rest == 0 else 0.55 if key.gated and whole and 2 * rest <= key.gpu.num_sms else 1.0
    is_large = config.block_m * rows >= 128 * 256
    compute = (whole + last) * 2 * config.block_m * rows * k / (FLOPS if is_large else SMALL_FLOPS)
    return GEMM_START + _together(compute, (_weight_bytes(key) + m * (k + n) * size) / _scaled(READ, key))
