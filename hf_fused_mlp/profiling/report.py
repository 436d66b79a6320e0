"""What an audit found, as values that print, and that JSON can hold."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from hf_fused_mlp.report import State

DIGITS = 4  # significant ones in `to_dict`; tables and the page show fewer
HOST_BOUND_BELOW = 0.7  # the share of the time that the GPU is busy
# what people read for the names of forms
LABELS = {"original": "eager", "fused": "fused", "fused_norms": "fused + norms"}

Bound = Literal["host-bound", "memory-bound", "compute-bound"]


@dataclass(frozen=True)
class Kernel:
    """A GPU kernel, copy or fill; on a CPU an operator of PyTorch that no other one called."""

    name: str
    count: float
    us: float


@dataclass(frozen=True)
class Speedup:
    """How many times faster one form is than another, over paired rounds.

    Args:
        median: of the rounds' ratios.
        low, high: an interval around it.
        confidence: how likely the interval contains the true median; `intervals.CONFIDENCE` or more, or less where
            there are too few rounds for that.
    """

    median: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Form:
    """One phase of one form of the model. A step is one forward: of the prompts, or of a token each.

    Wall-clock times are over rounds without the profiler, shares and kernels are what it saw. The first two shares are
    None on a CPU; so are the counts of an MLP's call where no MLP was called.

    Args:
        wall_us, wall_min_us, wall_max_us: time of a step; the first is the median.
        rounds_us: the same in each round. The same round of another form was measured right before or after.
        speedup: over the original; None for the original itself.
        gpu_busy_share: part of the wall-clock time in which any kernel runs.
        mlp_gpu_share: of that part, what kernels launched by MLPs take.
        mlp_wall_share: the MLPs' kernels as a part of the wall-clock time; on a CPU the MLPs' time.
        mlp_host_share: part of the host's time that passes in calls of MLPs; fewer launches make it less.
        launches_per_mlp: launches in one call of an MLP; on a CPU operators. A CUDA graph is one launch.
        kernels_per_mlp: how many different ones `mlp_kernels` has.
        mlp_kernels: the kernels of one call of an MLP, averaged over its calls, longest first.
        top_kernels: the ten that take longest in one step, MLPs or not.
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
        """The part of a step that fusing can shorten: where the GPU waits for the host, of the host's time."""
        return self.mlp_host_share if bound == "host-bound" else self.mlp_wall_share


@dataclass(frozen=True)
class Prediction:
    """How many times shorter fusing should make a step, or None; and what that rests on, or why nothing says."""

    gain: float | None
    basis: str


@dataclass(frozen=True)
class Phase:
    """Prefill or decode.

    `original` is eager Transformers, `fused` what `fuse_model(model)` makes of it, and `fused_norms` what
    `fuse_model(model, norms=True)` does. A fused form is None where it would run the original forwards, as on a CPU.

    Args:
        tokens: in a step, the batch's together.
        bound: what the phase waits for; see `estimates.bound_of`.
        flops_per_byte: of the MLPs, weights counted as the bytes.
        predicted: of `fused`.
        measured_gain: how many times shorter fusing made a step, wall clock: the median of `fused.speedup`.
        gain_limit: what it would be if MLPs cost nothing.
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
        """Those that were measured, the original first."""
        return {name: form for name in LABELS if (form := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Roofline:
    """What the device does at best, measured: a large product in the model's dtype, and a large copy."""

    tflops: float
    tbps: float

    @property
    def flops_per_byte(self) -> float:
        """Above it arithmetic takes longer than reading its operands, below it the other way round."""
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
        fuse: None where the measurements cannot tell.
        headline: the verdict in a few words.
        reason: what it rests on, in a sentence.
        form: the form that it is about, `"fused"` or `"fused_norms"`; None if neither was measured.
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
        advice: what else the figures say should be done, most important first.
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
