"""The results of an audit, as values that can be printed and written as JSON."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from hf_fused_mlp.report import State

DIGITS = 4  # significant digits in `to_dict`; tables and the page show fewer
HOST_BOUND_BELOW = 0.7  # the share of the time that the GPU is busy
# the displayed names of forms
LABELS = {"original": "eager", "fused": "fused", "fused_norms": "fused + norms"}

Bound = Literal["host-bound", "memory-bound", "compute-bound"]


@dataclass(frozen=True)
class Kernel:
    """A GPU kernel, copy or fill; on a CPU, an operator of PyTorch that no other operator called."""

    name: str
    count: float
    us: float


@dataclass(frozen=True)
class Speedup:
    """The speedup of one form over another, from paired rounds.

    Args:
        median: of the rounds' ratios.
        low, high: an interval around it.
        confidence: the probability that the interval contains the true median: at least `intervals.CONFIDENCE`, or
            less if there are too few rounds.
    """

    median: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Form:
    """One phase of one form of the model. A step is one forward: of the prompts, or of one token for each of them.

    Wall-clock times come from rounds without the profiler, shares and kernels from the profiler. The first two shares
    are None on a CPU. The counts of an MLP's call are None if no MLP was called.

    Args:
        wall_us, wall_min_us, wall_max_us: time of a step; the first is the median.
        rounds_us: time of a step in each round. The forms of a round were measured right after each other.
        speedup: over the original; None for the original itself.
        gpu_busy_share: part of the wall-clock time in which any kernel runs.
        mlp_gpu_share: part of the busy time taken by kernels that MLPs launched.
        mlp_wall_share: part of the wall-clock time taken by the MLPs' kernels; on a CPU, by the MLPs.
        mlp_host_share: part of the host's time spent in calls of MLPs; fewer launches reduce it.
        launches_per_mlp: launches in one call of an MLP; on a CPU operators. A CUDA graph is one launch.
        kernels_per_mlp: the number of different kernels in `mlp_kernels`.
        mlp_kernels: the kernels of one call of an MLP, averaged over its calls, longest first.
        top_kernels: the ten kernels that take longest in one step, of MLPs or not.
    """

    wall_us: float
    wall_min_us: float
    wall_max_us: float
    rounds_us: tuple[float, ...]
    speedup: Speedup | None
    tokens_per_s: float
    dollars_per_1m_tokens: float | None
    gpu_busy_share: float | None
    mlp_gpu_share: float | None
    mlp_wall_share: float
    mlp_host_share: float
    launches_per_mlp: float | None
    kernels_per_mlp: int | None
    mlp_kernels: tuple[Kernel, ...]
    top_kernels: tuple[Kernel, ...]

    def mlp_share(self, bound: Bound) -> float:
        """The part of a step that fusing can shorten; if the GPU waits for the host, a part of the host's time."""
        return self.mlp_host_share if bound == "host-bound" else self.mlp_wall_share


@dataclass(frozen=True)
class Prediction:
    """The predicted speedup of a step, or None; and the basis of the prediction, or why there is none."""

    gain: float | None
    basis: str


@dataclass(frozen=True)
class Phase:
    """Prefill or decode.

    `original` is eager Transformers, `fused` is `fuse_model(model)`, and `fused_norms` is `fuse_model(model,
    norms=True)`. A fused form is None if it would run the original forwards, as on a CPU.

    Args:
        tokens: all tokens of a step, over the batch.
        bound: what the phase waits for; see `estimates.bound_of`.
        flops_per_byte: operations of the MLPs per byte of their weights.
        predicted: of `fused`.
        measured_gain: the measured speedup of a step: the median of `fused.speedup`.
        gain_limit: the speedup if MLPs took no time.
    """

    name: str
    tokens: int
    bound: Bound
    flops_per_byte: float
    predicted: Prediction
    measured_gain: float | None
    gain_limit: float
    original: Form
    fused: Form | None
    fused_norms: Form | None

    @property
    def forms(self) -> dict[str, Form]:
        """The measured forms, the original first."""
        return {name: form for name in LABELS if (form := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Roofline:
    """The measured peak rates of the device: a large product in the model's dtype, and a large copy."""

    tflops: float
    tbps: float

    @property
    def flops_per_byte(self) -> float:
        """Above this, arithmetic takes longer than reading its operands; below it, reading takes longer."""
        return self.tflops / self.tbps


@dataclass(frozen=True)
class MLPGroup:
    """MLPs of one class and state, in the words of `fusion_report` while the model was fused."""

    class_name: str
    count: int
    state: State
    reason: str | None


@dataclass(frozen=True)
class Verdict:
    """Whether to fuse, for a whole request: prefill, then decode.

    Args:
        fuse: None if the measurements cannot tell.
        headline: the verdict in a few words.
        reason: the basis of the verdict, in one sentence.
        form: the judged form, `"fused"` or `"fused_norms"`; None if neither was measured.
        speedup: of that form over the original.
    """

    fuse: bool | None
    headline: str
    reason: str
    form: str | None
    speedup: Speedup | None


@dataclass(frozen=True)
class AuditReport:
    """Where the time of prefill and decode goes, original and fused.

    Args:
        on_gpu: kernels are those of a GPU, not operators on a CPU.
        attention: the implementation that the model's config names.
        fusable_norms: RMSNorms that `fuse_model(model, norms=True)` fuses.
        price_per_hour: dollars, or None.
        verdict: whether to fuse.
        advice: other advice that follows from the figures, most important first.
    """

    model: str
    device: str
    dtype: str
    attention: str | None
    fusable_norms: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    price_per_hour: float | None
    versions: dict[str, str]
    on_gpu: bool
    roofline: Roofline
    mlps: tuple[MLPGroup, ...]
    phases: tuple[Phase, ...]
    verdict: Verdict
    advice: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON; floats have four significant digits."""
        return _plain(asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
