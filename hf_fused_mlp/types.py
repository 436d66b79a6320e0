"""The values that cross function boundaries: frozen, hashable, and free of torch modules and of Triton."""

from dataclasses import dataclass
from enum import Enum
from functools import cache, cached_property

import torch


class MLPKind(str, Enum):
    """The ways a Transformers MLP is written; gated and packed compute the same equation."""

    GATED = "gated"  # down(act(gate(x)) * up(x)), gate and up two projections
    PACKED = "packed"  # the same, gate and up the two halves of one projection
    PLAIN = "plain"  # down(act(up(x)))
    HALF = "half"  # act(up(x)), as in BERT, where down is a part of another module


@dataclass(frozen=True)
class MLPSpec:
    """What an MLP class computes, by the names of its attributes.

    Args:
        kind: which of the three equations.
        up, down: names of the `nn.Linear` projections; for a packed MLP `up` holds the rows of gate, then those of up;
            half an MLP has no `down`.
        activation: name of the activation module, or None where the forward calls a function.
        gate: name of the gate projection; for a gated MLP only.
        function: key of `ACTIVATIONS` for the function that the forward calls, where there is no module.
        dropouts: names of dropout and identity modules on the way, which do nothing in evaluation mode.
        up_first: a packed MLP has the rows of up before those of gate.
        sequence: names of all children of an `nn.Sequential`, in order.
        other_steps: the forward casts, drops out without a module, or could not be read: only the kernels or the whole
            forward may stand for it, and not its projections called one by one.

    Raises:
        ValueError: `gate` missing for a gated MLP, or given for another; `down` given for half an MLP, or missing for
            another; not one of `activation` and `function`.
    """

    kind: MLPKind
    up: str
    down: str | None = None
    activation: str | None = None
    gate: str | None = None
    function: str | None = None
    dropouts: tuple[str, ...] = ()
    up_first: bool = False
    sequence: tuple[str, ...] = ()
    other_steps: bool = False

    def __post_init__(self):
        object.__setattr__(self, "kind", MLPKind(self.kind))
        if (self.kind is MLPKind.GATED) != (self.gate is not None):
            expected = "the gate projection's name" if self.kind is MLPKind.GATED else "None"
            raise ValueError(f"MLPSpec(kind={self.kind.value!r}, gate={self.gate!r}): gate must be {expected}")
        if (self.kind is MLPKind.HALF) != (self.down is None):
            expected = "None" if self.kind is MLPKind.HALF else "the down projection's name"
            raise ValueError(f"MLPSpec(kind={self.kind.value!r}, down={self.down!r}): down must be {expected}")
        if (self.activation is None) == (self.function is None):
            given = f"activation={self.activation!r}, function={self.function!r}"
            raise ValueError(f"MLPSpec({given}): name the activation's module, or else the function")

    # these are asked for over and over, so they are made once: a cached property keeps its value beside the fields
    @cached_property
    def first(self) -> tuple[str, ...]:
        """The names of the `nn.Linear` children before the activation, gate first where there is one."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @cached_property
    def projections(self) -> tuple[str, ...]:
        """The names of all `nn.Linear` children, in the order of the equation."""
        return self.first if self.down is None else (*self.first, self.down)

    @cached_property
    def children(self) -> tuple[str, ...]:
        """The names of all children that the forward calls."""
        return (*self.projections, *self.dropouts) + (() if self.activation is None else (self.activation,))

    @cached_property
    def halves(self) -> tuple[int, int] | None:
        """Of a packed projection's output, which half is gate's and which is up's; None where none is packed."""
        if self.kind is not MLPKind.PACKED:
            return None
        return (1, 0) if self.up_first else (0, 1)


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
    def can_overlap(self) -> bool:
        """Whether a launch may begin while the one before is finishing: CUDA's programmatic dependent launch."""
        return self.capability >= (9, 0)


@dataclass(frozen=True)
class LinearKey:
    """One launch: ``act(x @ weight.T)``, or with a gate ``act(x @ gate.T) * (x @ weight.T)``.

    `x` is `[m, k]`, `weight` and `gate` `[n, k]`. `one_block` says that gate and weight are adjacent in memory
    (trivially so without a gate) and 16-byte aligned, so that one tensor descriptor can address both.
    """

    m: int
    n: int
    k: int
    gated: bool
    activation: str
    dtype: torch.dtype
    one_block: bool
    gpu: GPU


@dataclass(frozen=True)
class LinearCall:
    """One launch, all but the addresses of its tensors.

    `x` is `[*lead, k]`, `m` tokens whose rows are `stride_xm` elements apart, each contiguous; `weight` and `gate` are
    `[n, k]`, contiguous. `overlap` lets it begin while the launch before, which must be one of ours, is finishing.
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


@dataclass(frozen=True)
class ProblemKey:
    """What a plan is chosen by.

    `m` is the token count rounded up to a power of two; up is `[intermediate, hidden]`, down `[out, intermediate]`,
    and `out` is 0 where there is no down.
    `bias` says that any projection has one; `one_block` holds for the weights of both launches.
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

    @property
    def up(self) -> LinearKey:
        """The launch from `x` to the activated `[m, intermediate]`."""
        return LinearKey(
            self.m, self.intermediate, self.hidden, self.gated, self.activation, self.dtype, self.one_block, self.gpu
        )

    @property
    def down(self) -> LinearKey:
        """The launch from there to `[m, out]`."""
        return LinearKey(self.m, self.out, self.intermediate, False, "identity", self.dtype, self.one_block, self.gpu)


@dataclass(frozen=True)
class TileConfig:
    """Which kernel family runs a launch, and how; a family reads only the fields it has a use for."""

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


TORCH = TileConfig("torch")
UNFUSED = Plan(TORCH, TORCH)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`; of token counts, the bucket that shares a plan."""
    return 1 << (n - 1).bit_length() if n > 1 else 1
