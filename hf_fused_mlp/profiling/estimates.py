"""The arithmetic of an audit: what bounds a phase, what fusing can gain, what a token costs."""

import torch
from torch.utils.benchmark import Timer

from hf_fused_mlp.profiling.report import HOST_BOUND_BELOW, Bound, Roofline


def bound_of(gpu_busy_share: float | None, flops_per_byte: float, ridge: float) -> Bound:
    """What a phase waits for.

    The host, if the GPU works less than 70 % of the time. Otherwise the limit of its MLPs: memory, if they do fewer
    operations per byte of weights than the device could (`ridge`), or arithmetic, if they do more. A CPU has no busy
    share.
    """
    if gpu_busy_share is not None and gpu_busy_share < HOST_BOUND_BELOW:
        return "host-bound"
    return "compute-bound" if flops_per_byte >= ridge else "memory-bound"


def amdahl(share: float, gain: float) -> float:
    """The speedup of the whole if a part of it, `share`, becomes `gain` times as fast."""
    return 1 / (1 - share + share / gain)


def dollars_per_1m_tokens(price_per_hour: float | None, us: float, tokens: int) -> float | None:
    """The price of a million tokens when `tokens` take `us` microseconds."""
    return None if price_per_hour is None else price_per_hour / 3600 * us / tokens


def roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measures the roofline of a device in about a second."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    dtype = dtype if dtype in (torch.float32, torch.float16) else torch.bfloat16
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    source = torch.zeros(1 << (28 if on_gpu else 26), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    names = {"a": a, "b": b, "source": source, "target": target, "torch": torch}
    threads = torch.get_num_threads()

    def seconds(statement: str) -> float:
        return Timer(statement, globals=names, num_threads=threads).blocked_autorange(min_run_time=0.2).median

    return Roofline(
        tflops=2 * size**3 / seconds("torch.mm(a, b)") / 1e12,
        tbps=2 * source.nbytes / seconds("target.copy_(source)") / 1e12,
    )
