"""Values that cross function boundaries: frozen, hashable, independent of `nn.Module` and Triton."""

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class GPU:
    """What a plan may depend on of the device.

    `capability` is CUDA's, `(0, 0)` where there is none; `shared_memory` is the bytes a thread block can have.
    """

    name: str
    num_sms: int
    capability: tuple[int, int]
    shared_memory: int

    @staticmethod
    @cache
    def of(device: torch.device) -> "GPU":
        """The GPU at `device`; for a CPU, where kernels are only interpreted, a GPU with four multiprocessors."""
        if device.type != "cuda":
            return GPU(device.type, 4, (0, 0), 1 << 18)
        properties = torch.cuda.get_device_properties(device)
        return GPU(
            properties.name,
            properties.multi_processor_count,
            (0, 0) if torch.version.hip else (properties.major, properties.minor),
            getattr(properties, "shared_memory_per_block_optin", 1 << 16),
        )

    @property
    def is_nvidia(self) -> bool:
        """Whether NVIDIA's device functions exist."""
        return self.capability > (0, 0)

    @property
    def has_dot(self) -> bool:
        """Whether Triton's `tl.dot` uses the tensor cores; for Turing's it makes code for the CUDA cores."""
        return not self.is_nvidia or self.capability >= (8, 0)

    @property
    def can_overlap(self) -> bool:
        """Whether a launch may begin while the one before is finishing: CUDA's programmatic dependent launch."""
        return self.capability >= (9, 0)


FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
FP8 = torch.float8_e4m3fn
SCALE_BLOCK = 128  # rows and columns of an FP8 matrix that share a scale
SCALES = frozenset((torch.float32, torch.float8_e8m0fnu))


class Matrix(NamedTuple):
    """A matrix as kernels read it; `ABSENT` stands for a projection that a module does not have.

    Args:
        data: `[N, K]`, memory that the layer keeps: nothing but a view is made at each call.
        scale: None for floats. For FP8 `data` (e4m3), a factor for each block of 128 x 128 elements (`SCALE_BLOCK`),
            `[ceil(N / 128), ceil(K / 128)]`, fp32 or a power of two (e8m0).
        bias: `[N]`, or None.
    """

    data: Tensor
    scale: Tensor | None
    bias: Tensor | None


def scale_blocks(n: int) -> int:
    """How many blocks of scales `n` rows or columns have."""
    return -(-n // SCALE_BLOCK)


def has_block_scales(weight: Tensor, scale: Tensor | None) -> bool:
    """True if `weight`, a matrix or a stack of them, is FP8, and `scale` has a number for each of its blocks."""
    return (
        weight.dtype == FP8
        and scale is not None
        and scale.dtype in SCALES
        and scale.device == weight.device
        and scale.dim() == weight.dim()
        and scale.shape[-2] == scale_blocks(weight.shape[-2])
        and scale.shape[-1] == scale_blocks(weight.shape[-1])
        and (weight.dim() == 2 or scale.shape[:-2] == weight.shape[:-2])
    )


ABSENT = Matrix(None, None, None)  # type: ignore[arg-type]


def storage_of(*matrices: Matrix) -> str | None:
    """How the matrices of an MLP are stored, in one of the ways that kernels read; None if in another, or in several.

    `"float"`: data is contiguous. `"transposed"`: floats, and data is a view of contiguous `[K, N]`. `"fp8"`:
    contiguous, with scales.
    """
    weights, scales, biases = ([t for t in kind if t is not None] for kind in zip(*matrices, strict=True))
    if not all(tensor.is_contiguous() for tensor in (*scales, *biases)):
        return None
    if all(weight.is_contiguous() for weight in weights):
        return "fp8" if scales else "float"
    return "transposed" if not scales and all(weight.t().is_contiguous() for weight in weights) else None


class MLPOperands(NamedTuple):
    """The weights of an MLP: gate and up are `[I, H]`, down is `[O, I]`; gate and down may be `ABSENT`.

    `batch_invariant` asks for sums that do not depend on the token count. `flat` also takes bare tuples.
    """

    gate: Matrix
    up: Matrix
    down: Matrix
    activation: str
    batch_invariant: bool = False

    @property
    def storage(self) -> str | None:
        """How the weights are stored; see `storage_of`."""
        return storage_of(self.gate, self.up, self.down)

    def flat(self) -> tuple:
        """In the order of the operator `torch.ops.hf_fused_mlp.mlp`: weights, biases, activation, scales.

        `batch_invariant` is not among them: it changes no equation.
        """
        (gate, *of_gate), (up, *of_up), (down, *of_down), activation, _ = self
        scales, biases = zip(of_gate, of_up, of_down, strict=True)
        return gate, up, down, *biases, activation, *scales

    @staticmethod
    def of(
        gate,
        up,
        down,
        gate_bias,
        up_bias,
        down_bias,
        activation,
        gate_scale=None,
        up_scale=None,
        down_scale=None,
        batch_invariant=False,
    ) -> "MLPOperands":
        """The inverse of `flat`."""
        first = Matrix(gate, gate_scale, gate_bias), Matrix(up, up_scale, up_bias)
        return MLPOperands(*first, Matrix(down, down_scale, down_bias), activation, batch_invariant)


class ExpertsForm(NamedTuple):
    """How routed experts store gate and up, and what they make of them.

    `layout` is that of E stacked matrices: `"planes"`, gate `[E, I, H]` and up side by side in `[E, 2I, H]`, down
    `[E, H, I]`; `"transposed"`, `[E, H, 2I]` and `[E, I, H]`; `"interleaved"`, the same with columns of gate and up in
    turn. Without a gate there is up alone, in `[E, I, H]` or `[E, H, I]`.
    The equation is ``act(gate) * (up + up_offset)``; before that, a `limit` other than 0 clamps gate from above, and
    up on both sides.
    """

    layout: str
    gated: bool
    activation: str
    limit: float = 0.0
    up_offset: float = 0.0


class ExpertsOperands(NamedTuple):
    """The weights of routed experts, stacked as `form` says; `up` holds gate and up, biases are `[E, I]`, `[E, 2I]` or
    `[E, H]`, or None.

    Weights in FP8 are planes, without biases, and have stacks of the scales of a `Matrix`.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    form: ExpertsForm
    up_scale: Tensor | None = None
    down_scale: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but the form, in the order in which launches take them; scales only where there are some."""
        return self[:4] if self[5] is None else self[:4] + self[5:]


@dataclass(frozen=True)
class ExpertsCall:
    """One call of routed experts, all but the addresses of its tensors and where tokens go.

    `x` is `[tokens, hidden]`, whose rows are `stride_xm` elements apart; each token has `top_k` of `experts`.
    `storage`, `"float"` or `"fp8"`, is that of the weights; `dtype` is that of `x` and the output.
    """

    tokens: int
    top_k: int
    experts: int
    hidden: int
    intermediate: int
    stride_xm: int
    form: ExpertsForm
    dtype: torch.dtype
    device: torch.device
    storage: str = "float"

    @property
    def pairs(self) -> int:
        """How many pairs of a token and one of its experts there are."""
        return self.tokens * self.top_k

    @property
    def bias_strides(self) -> tuple[int, int, int]:
        """Of the bias of gate and up: from expert to expert, from gate to up, and along each of them."""
        planes = 2 if self.form.gated else 1
        width = planes * self.intermediate
        return (width, 1, planes) if self.form.layout == "interleaved" else (width, self.intermediate, 1)


@dataclass(frozen=True)
class LinearKey:
    """One launch: ``act(x @ weight.T)``, or with a gate ``act(x @ gate.T) * (x @ weight.T)``.

    `x` is `[m, k]`, `weight` and `gate` `[n, k]`, stored as `storage` says (`storage_of`). `one_block` says that gate
    and weight, and their scales, are adjacent in memory (trivially so without a gate) and 16-byte aligned, so that one
    tensor descriptor can address both.
    """

    m: int
    n: int
    k: int
    gated: bool
    activation: str
    dtype: torch.dtype
    one_block: bool
    gpu: GPU
    storage: str = "float"


@dataclass(frozen=True)
class LinearCall:
    """One launch, all but the addresses of its tensors.

    `x` is `[*lead, k]`, `m` tokens whose rows are `stride_xm` elements apart, each contiguous; `weight` and `gate` are
    `[n, k]`, stored as the kernel reads them. `overlap` lets it begin while the launch before, which must be one of
    ours, is finishing.
    `reads_fp8` and `gives_fp8` say that `x` and the output are quantized: pairs of e4m3 data and a scale for each
    `SCALE_BLOCK` elements of a row.
    """

    lead: tuple[int, ...]
    m: int
    n: int
    k: int
    stride_xm: int
    gated: bool
    activation: str
    dtype: torch.dtype
    device: torch.device
    overlap: bool = False
    reads_fp8: bool = False
    gives_fp8: bool = False


@dataclass(frozen=True)
class ProblemKey:
    """What a plan is chosen by.

    `m` is the token count, of measured plans a power of two (`bucket`); up is `[intermediate, hidden]`, down
    `[out, intermediate]`, and `out` is 0 where there is no down.
    `bias` says that any projection has one; `one_block` holds for the weights of both launches. `dtype` is that of `x`
    and the output, and unless `storage` says otherwise of the weights.
    """

    m: int
    hidden: int
    intermediate: int
    out: int
    gated: bool
    activation: str
    dtype: torch.dtype
    bias: bool
    one_block: bool
    gpu: GPU
    storage: str = "float"

    @property
    def up(self) -> LinearKey:
        """The launch from `x` to the activated `[m, intermediate]`."""
        return self._launch(self.intermediate, self.hidden, self.gated, self.activation)

    @property
    def down(self) -> LinearKey:
        """The launch from there to `[m, out]`."""
        return self._launch(self.out, self.intermediate, False, "identity")

    def _launch(self, n: int, k: int, gated: bool, activation: str) -> LinearKey:
        return LinearKey(self.m, n, k, gated, activation, self.dtype, self.one_block, self.gpu, self.storage)


@dataclass(frozen=True)
class ExpertsKey:
    """What a plan of routed experts is chosen by.

    `m` is the token count rounded up to a power of two. `limit` and `up_offset` of an `ExpertsForm` are left out: they
    cost nothing. All addresses are multiples of 16; calls with others have no plan to choose.
    """

    m: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    layout: str
    gated: bool
    activation: str
    dtype: torch.dtype
    bias: bool
    gpu: GPU
    storage: str = "float"

    @staticmethod
    def of(call: ExpertsCall, bias: bool) -> "ExpertsKey":
        """Of calls like `call`; `bias` says that up or down has one."""
        form = call.form
        return ExpertsKey(
            m=next_power_of_two(call.tokens),
            experts=call.experts,
            top_k=call.top_k,
            hidden=call.hidden,
            intermediate=call.intermediate,
            layout=form.layout,
            gated=form.gated,
            activation=form.activation,
            dtype=call.dtype,
            bias=bias,
            gpu=GPU.of(call.device),
            storage=call.storage,
        )

    def call(self, device: torch.device) -> ExpertsCall:
        """A call of `m` tokens at `device`."""
        form = ExpertsForm(self.layout, self.gated, self.activation)
        sizes = self.m, self.top_k, self.experts, self.hidden, self.intermediate, self.hidden
        return ExpertsCall(*sizes, form, self.dtype, device, self.storage)


@dataclass(frozen=True)
class TileConfig:
    """Which kernel runs a launch, and how; a kernel reads only the fields that it needs."""

    kernel: str
    block_m: int = 1
    block_n: int = 1
    block_k: int = 1
    num_warps: int = 4
    num_stages: int = 1
    group_m: int = 1
    split_k: int = 1


@dataclass(frozen=True)
class Plan:
    """How one MLP call runs: its up launch (activation included) and its down launch."""

    up: TileConfig
    down: TileConfig


@dataclass(frozen=True)
class ExpertsPlan:
    """How a call of routed experts runs: `order` is `"pairs"` (nothing sorted), `"sorted"` or `"gathered"` (the rows
    of `x` sorted too), `rows` the pairs of one expert in a tile."""

    order: str
    rows: int
    up: TileConfig
    down: TileConfig


TORCH = TileConfig("torch")
UNFUSED = Plan(TORCH, TORCH)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


Key = TypeVar("Key", bound="ProblemKey | ExpertsKey")


def bucket(key: Key) -> Key:
    """The problem whose measured plan serves `key`: token counts up to a power of two share one."""
    return replace(key, m=next_power_of_two(key.m))
