"""`hf-fused-mlp bench experts`: routed experts of published models, fused and as Transformers runs them.

GPU time of a captured call. Weights are random. As in decoding, each call of a round has other tokens and another
routing, so that experts are read from memory and not from a cache.
"""

import logging
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_fused_mlp.bench.names import EXPERTS_IMPLEMENTATIONS
from hf_fused_mlp.bench.results import Row
from hf_fused_mlp.fuse import fuse_model
from hf_fused_mlp.reference import quantize_weight_ref
from hf_fused_mlp.swap import original_form
from hf_fused_mlp.types import SCALE_BLOCK

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experts:
    """The routed experts of a published model; `top_k` of `experts` for each token."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    activation: str = "silu"
    gpt_oss: bool = False

    def floor_us(self, m: int, experts_hit: float, fp8: bool = False) -> float:
        """Microseconds that an H100 needs to read the weights of the selected experts, or to multiply."""
        size = 3 * self.hidden * self.intermediate
        times = 2 if fp8 else 1  # twice as many numbers in a byte, and tensor cores twice as fast
        return max(experts_hit * size * 2 / BYTES_PER_US, 2 * m * self.top_k * size / FLOPS_PER_US) / times

    @property
    def has_fp8(self) -> bool:
        """Whether Transformers stores such experts in FP8."""
        return not (self.gpt_oss or self.hidden % SCALE_BLOCK or self.intermediate % SCALE_BLOCK)


# of an H100: the best that GEMMs and reads of this size have reached
BYTES_PER_US, FLOPS_PER_US = 3.0e6, 750e6
SHAPES = {
    "qwen3-30b-a3b": Experts(128, 8, 2048, 768),
    "mixtral-8x7b": Experts(8, 2, 4096, 14336),
    "olmoe-1b-7b": Experts(64, 8, 2048, 1024),
    "gpt-oss-20b": Experts(32, 4, 2880, 2880, gpt_oss=True),
    "deepseek-v2-lite": Experts(64, 6, 2048, 1408),
    "gemma-4-26b-a4b": Experts(128, 8, 2816, 704, "gelu_pytorch_tanh"),
    "deepseek-v3": Experts(256, 8, 7168, 2048),
}
OPTIONAL = ("sonicmoe", "deepgemm")  # Transformers loads their kernels from the hub, for some GPUs
MOST_COPIED = 20e9  # bytes that batched_mm may copy
MOST_DIFFERENCE = 0.01  # relative, between the outputs of two implementations in bfloat16
MOST_FP8_DIFFERENCE = 0.1  # the same in FP8: some quantize tokens


def build(shape: Experts, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> nn.Module:
    """Experts of these sizes with random weights, of a class of Transformers."""
    from transformers import GptOssConfig, MixtralConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    sizes: Any = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
    }
    with torch.device(device):
        made: nn.Module
        if shape.gpt_oss:
            made = GptOssExperts(GptOssConfig(**sizes)).to(dtype)
        else:
            made = MixtralExperts(MixtralConfig(**sizes, hidden_act=shape.activation)).to(dtype)
    for parameter in made.requires_grad_(False).parameters():
        parameter.normal_(0, shape.hidden**-0.5)
    return made.eval()


def build_fp8(shape: Experts, device: str = "cuda") -> nn.Module:
    """The same in FP8, as in an FP8 checkpoint."""
    from transformers import MixtralConfig
    from transformers.integrations import finegrained_fp8
    from transformers.integrations.moe import use_experts_implementation

    sizes: Any = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "hidden_act": shape.activation,
    }
    registry = finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS
    decorated: Any = use_experts_implementation(finegrained_fp8.FP8Experts, experts_interface=registry)
    with torch.device(device):
        made = decorated(MixtralConfig(**sizes), block_size=[SCALE_BLOCK, SCALE_BLOCK])
    made.requires_grad_(False)
    for name in ("gate_up_proj", "down_proj"):
        data, scale = getattr(made, name), getattr(made, f"{name}_scale_inv")
        for e in range(shape.experts):
            weight = torch.empty(data.shape[1:], device=device).normal_(0, shape.hidden**-0.5)
            data[e], scale[e] = quantize_weight_ref(weight)
    return made.eval()


def routing(kind: str, shape: Experts, m: int, device: torch.device | str = "cuda") -> Tensor:
    """Random expert ids `[m, top_k]`: all experts equally likely, or the i-th with a weight of 1 / i."""
    scores = -torch.empty(m, shape.experts, device=device).exponential_().log()  # Gumbel's distribution
    if kind == "zipf":
        scores -= torch.arange(1, shape.experts + 1, device=device).log()
    return scores.topk(shape.top_k)[1]


@torch.no_grad()
def measure(name: str, m: int, kind: str, names: list[str], rounds: int, fp8: bool = False) -> list[Row]:
    """Times implementations in turn on `m` tokens.

    Args:
        name: a key of `SHAPES`.
        kind: one of `ROUTINGS`.
        names: of `EXPERTS_IMPLEMENTATIONS`.
        fp8: time experts of an FP8 checkpoint; a shape that `has_fp8`.

    Returns:
        One row for each implementation and one for the floor, in microseconds. `peak_mb` is the peak memory of a call,
        its output included. Implementations of `OPTIONAL`, and in FP8 all but ours, are logged and left out if they do
        not load or run here.

    Raises:
        AssertionError: the output of the fused experts differs from Transformers'.
    """
    shape = SHAPES[name]
    module = fuse_model(build_fp8(shape) if fp8 else build(shape), strict=True)
    device = next(module.parameters()).device
    calls = 8 if m <= 1024 else 2
    inputs: list[tuple[Tensor, ...]] = [
        (
            torch.randn(m, shape.hidden, device=device, dtype=torch.bfloat16),
            routing(kind, shape, m, device),
            torch.rand(m, shape.top_k, device=device),
        )
        for _ in range(calls)
    ]
    runs: dict[str, Callable[[], None]] = {}
    peaks: dict[str, float] = {}
    expected = None
    for impl in names:
        copied = m * shape.top_k * 3 * shape.hidden * shape.intermediate * 2
        if impl.startswith("batched_mm") and copied > MOST_COPIED:
            continue
        call = implementation(impl, module)
        try:
            answer = call(*inputs[0])
            peaks[impl] = peak_mb(call, inputs[0])
            run = repeated(call, inputs, graph=impl != "eager")
        except Exception as error:
            if impl not in OPTIONAL and not (fp8 and impl != "fused"):
                raise
            logger.warning("%s: left out at %s, M = %s: %s: %s", impl, name, m, type(error).__name__, error)
            continue
        expected = answer if expected is None else expected
        difference = ((answer - expected).float().norm() / expected.float().norm()).item()
        if not difference <= (MOST_FP8_DIFFERENCE if fp8 else MOST_DIFFERENCE):
            raise AssertionError(f"{name}, M = {m}: {impl} is off by {difference:.1%}, so none is timed")
        runs[impl] = run
    hit = statistics.mean(len(ids.unique()) for _, ids, _ in inputs)
    common = {"shape": name, "m": m, "routing": kind} | ({"dtype": "fp8"} if fp8 else {})
    floor = round(shape.floor_us(m, hit, fp8), 2)
    rows: list[Row] = [common | {"impl": "floor", "median_us": floor, "p20_us": floor, "p80_us": floor}]
    for impl, times in in_turn(runs, rounds).items():
        cuts = statistics.quantiles([time / calls for time in times], n=10)
        figures = {"median_us": cuts[4], "p20_us": cuts[1], "p80_us": cuts[7], "peak_mb": peaks[impl]}
        rows.append(common | {"impl": impl} | {field: round(value, 2) for field, value in figures.items()})
    return rows


def peak_mb(call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
    """Megabytes (10^6) that a call has allocated at its peak."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(*inputs)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def implementation(impl: str, module: nn.Module) -> Callable[..., Tensor]:
    """A function of tokens, ids and weights."""
    if impl == "fused":
        return module
    how = impl.removesuffix("-max-autotune")

    def call(*inputs: Tensor) -> Tensor:
        module.config._experts_implementation = how  # type: ignore[union-attr]
        with original_form([module]):  # type: ignore[list-item]
            return module(*inputs)

    if how == impl:
        return call
    from transformers.integrations.moe import batched_mm_experts_forward

    torch._dynamo.reset()  # torch stops compiling a function after eight shapes
    options: dict[str, Any] = {"max_autotune": True, "coordinate_descent_tuning": True}
    compiled = torch.compile(batched_mm_experts_forward, options=options, dynamic=False)
    return lambda *inputs: compiled(module, *inputs)


def repeated(call: Callable[..., Tensor], inputs: list[tuple[Tensor, ...]], graph: bool) -> Callable[[], None]:
    """A function that calls `call` with all `inputs` in turn, as a CUDA graph if that is possible."""
    for some in inputs:
        call(*some)
    if not graph:

        def run() -> None:
            for some in inputs:
                call(*some)

        return run
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for some in inputs:
            call(*some)
    return captured.replay


def in_turn(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of each run in each round, after two rounds that are not counted."""
    order = random.Random(0)
    times: dict[str, list[float]] = {impl: [] for impl in runs}
    for round_ in range(2 + rounds):
        for impl in order.sample(list(runs), len(runs)):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            runs[impl]()
            end.record()
            end.synchronize()
            if round_ >= 2:
                times[impl].append(start.elapsed_time(end) * 1e3)
    return times


def table(rows: list[Row]) -> str:
    """One line for each shape and M: microseconds, the ratio to the floor, and the speedup over the best other.

    With the peak memory of a fused call and of `batched_mm`, if it was measured.
    """
    problems: dict[tuple, dict[str, float]] = {}
    peaks: dict[tuple, dict[str, float]] = {}
    for row in rows:
        problem = row["shape"] + (" in FP8" if row.get("dtype") == "fp8" else ""), row["routing"], row["m"]
        problems.setdefault(problem, {})[row["impl"]] = row["median_us"]
        if "peak_mb" in row:
            peaks.setdefault(problem, {})[row["impl"]] = row["peak_mb"]
    others = [name for name in EXPERTS_IMPLEMENTATIONS[1:] if any(name in times for times in problems.values())]
    columns = ["shape", "routing", "M", "floor", "fused", "over floor", *others, "over the best"]
    columns += ["peak, MB", "batched_mm's peak, MB"] if peaks else []
    lines = [f"| {' | '.join(columns)} |", f"|---|---|{'---:|' * (len(columns) - 2)}"]
    for (shape, kind, m), times in problems.items():
        fused, floor = times["fused"], times["floor"]
        best = min((times[name] for name in others if name in times), default=None)
        cells = [shape, kind, str(m), f"{floor:.0f}", f"{fused:.0f}", f"{fused / floor:.2f}x"]
        cells += [f"{times[name]:.0f}" if name in times else "-" for name in others]
        cells.append("-" if best is None else f"{best / fused:.2f}x")
        if peaks:
            peak = peaks.get((shape, kind, m), {})
            cells += [f"{peak[name]:.1f}" if name in peak else "-" for name in ("fused", "batched_mm")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
