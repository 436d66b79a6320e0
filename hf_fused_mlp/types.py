"""Values that cross function boundaries. They are frozen, hashable, and independent of `nn.Module` and Triton."""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class GPU:
    """The properties of a device that a plan may depend on.

    `capability` is CUDA's, or `(0, 0)`; `shared_memory` is the number of bytes that a thread block can use.
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
        """Whether a launch may start while the one before is finishing: CUDA's programmatic dependent launch."""
        return self.capability >= (9, 0)


FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
FP8 = torch.float8_e4m3fn
SCALE_BLOCK = 128  # rows and columns of an FP8 matrix that share a scale
SCALES = frozenset((torch.float32, torch.float8_e8m0fnu))


class Matrix(NamedTuple):
    """A matrix as kernels read it; `ABSENT` stands for a projection that a module does not have.

    Args:
        data: `[N, K]`, a view of memory that the layer keeps.
        scale: None for floats. For FP8 `data` (e4m3), a factor for each block of 128 x 128 elements (`SCALE_BLOCK`),
            `[ceil(N / 128), ceil(K / 128)]`, fp32 or a power of two (e8m0).
        bias: `[N]`, or None.
    """

    data: Tensor
    scale: Tensor | None
    bias: Tensor | None


def scale_blocks(n: int) -> int:
    """The number of blocks of scales in `n` rows or columns."""
    return -(-n // SCALE_BLOCK)


def has_block_scales(weight: Tensor, scale: Tensor | None) -> bool:
    """True if `weight`, a matrix or a stack of matrices, is FP8, and `scale` has a number for each block."""
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
    """How the matrices of an MLP are stored; None if in a way that no kernel reads, or in several ways.

    `"float"`: contiguous floats. `"transposed"`: floats, a view of contiguous `[K, N]`. `"fp8"`: contiguous, with
    scales.
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
    """How routed experts store gate and up, and how they combine them.

    `layout` is that of E stacked matrices: `"planes"`, gate `[E, I, H]` and up side by side in `[E, 2I, H]`, down
    `[E, H, I]`; `"transposed"`, `[E, H, 2I]` and `[E, I, H]`; `"interleaved"`, the same with alternating columns of
    gate and up. Without a gate, up is `[E, I, H]` or `[E, H, I]`. The equation is ``act(gate) * (up + up_offset)``. A
    `limit` other than 0 first clamps gate from above, and up on both sides.
    """

    layout: str
    gated: bool
    activation: str
    limit: float = 0.0
    up_offset: float = 0.0


class ExpertsOperands(NamedTuple):
    """The weights of routed experts, stacked as `form` says; `up` holds gate and up, biases are `[E, I]`, `[E, 2I]` or
    `[E, H]`, or None.

    FP8 weights have the layout `"planes"`, no biases, and stacks of scales like those of a `Matrix`.
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
        """The tensors in the order in which launches take them; scales only if there are some."""
        return self[:4] if self[5] is None else self[:4] + self[5:]


@dataclass(frozen=True)
class ExpertsCall:
    """One call of routed experts, without the addresses of its tensors and without the routing.

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
        """The number of pairs of a token and one of its experts."""
        return self.tokens * self.top_k

    @property
    def bias_strides(self) -> tuple[int, int, int]:
        """Strides of the bias of gate and up: from expert to expert, from gate to up, and along each."""
        planes = 2 if self.form.gated else 1
        width = planes * self.intermediate
        return (width, 1, planes) if self.form.layout == "interleaved" else (width, self.intermediate, 1)


@dataclass(frozen=True)
class LinearKey:
    """One launch: ``act(x @ weight.T)``, or with a gate ``act(x @ gate.T) * (x @ weight.T)``.

    `x` is `[m, k]`, `weight` and `gate` `[n, k]`, stored as `storage` says (`storage_of`). `one_block` says that gate
    and weight, and their scales, are adjacent in memory (trivially so without a gate) and 16-byte aligned, so that one
    tensor descriptor can address both. `bias` says that the MLP has biases.
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
    bias: bool = False


@dataclass(frozen=True)
class LinearCall:
    """One launch, without the addresses of its tensors.

    `x` is `[*lead, k]`, `m` tokens whose rows are `stride_xm` elements apart, each contiguous; `weight` and `gate` are
    `[n, k]`, stored as the kernel reads them. With `overlap` it may start while the launch before, which must be one
    of ours, is finishing.
    `reads_fp8` and `gives_fp8` say that `x` or the output is quantized: e4m3 data, and a scale for each `SCALE_BLOCK`
    elements of a row.
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
    """The key of a plan for an MLP.

    `m` is the token count, in measured plans one of a list (`tuning.buckets`); up is `[intermediate, hidden]`, down
    `[out, intermediate]`; without down, `out` is 0.
    `bias` is true if any projection has one; `one_block` is about the weights of both launches. `dtype` is that of
    `x`, of the output and, unless `storage` says otherwise, of the weights.
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
        """The launch from `[m, intermediate]` to `[m, out]`."""
        return self._launch(self.out, self.intermediate, False, "identity")

    def _launch(self, n: int, k: int, gated: bool, activation: str) -> LinearKey:
        alike = self.dtype, self.one_block, self.gpu, self.storage, self.bias
        return LinearKey(self.m, n, k, gated, activation, *alike)


@dataclass(frozen=True)
class ExpertsKey:
    """The key of a plan of routed experts.

    `m` is the token count rounded up to a power of two. `limit` and `up_offset` of an `ExpertsForm` are left out,
    because they cost no time. All addresses are multiples of 16; other calls have no measured plan.
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
        """The key of calls like `call`; `bias` says that up or down has one."""
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
    """The kernel of a launch and its settings. A kernel reads only the fields that it needs."""

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
