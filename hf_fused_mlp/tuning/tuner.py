"""Finds the fastest plan for a problem by measuring. Never called from a forward.

Most configurations are far from the best. A few measurements show that, and the rest are measured more often. Then the
best pair of launches is compared, as a whole MLP, with PyTorch's own kernels.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from os import cpu_count
from typing import Any, Protocol, TypeVar

import torch
import triton
from torch import Tensor
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from hf_fused_mlp.kernels import KERNELS, LAUNCHERS, describe_launch, linear, prepare
from hf_fused_mlp.logs import logger
from hf_fused_mlp.reference import dequantize, fp8_linear_ref, linear_ref
from hf_fused_mlp.tuning.cost import expected_us
from hf_fused_mlp.tuning.heuristics import heuristic_plan
from hf_fused_mlp.tuning.plan_files import TunedPlan
from hf_fused_mlp.tuning.timing import GRAPHS_UP_TO, Timing, round_robin, round_robin_graphs, weight_copies
from hf_fused_mlp.types import (
    ABSENT,
    FP8,
    TORCH,
    UNFUSED,
    ExpertsPlan,
    LinearKey,
    Matrix,
    MLPOperands,
    Plan,
    ProblemKey,
    TileConfig,
    scale_blocks,
)
from hf_fused_mlp.validation import inaccuracy

# of each launch: rounds, how many go on to the next stage, and how much slower than the fastest they may be
STAGES = ((2, 8, 1.5), (6, 3, 1.05))
# of whole MLPs: rounds of all plans, then of the fastest and PyTorch's
WHOLE_ROUNDS, LAST_ROUNDS = 10, 20
LONG = 4096  # tokens, from which on one call a turn is enough
CHECKED_ROWS = 256  # of the output; at up to 16384 tokens every tile of 64 rows has one of them

K = TypeVar("K")
Config = TypeVar("Config", bound=TileConfig | ExpertsPlan, contravariant=True)
Calls = list[Callable[[], Tensor]]


class Measured(Protocol[Config]):
    """A launch or an MLP to tune: tokens `x` and weights, and how a configuration runs them."""

    @property
    def key(self) -> Any: ...
    @property
    def x(self) -> Tensor: ...
    def run(self, x: Tensor, copy: int, config: Config) -> Tensor:
        """The output for one of the copies."""

    def calls(self, config: Config) -> Calls:
        """A call for each of the copies, which together exceed the L2."""


def candidates(key: LinearKey, most: int | None = None) -> list[TileConfig]:
    """Every configuration that may run `key`, the library's among them; or `most` of ours, those expected fastest."""
    own = [config for kernel in KERNELS.values() if kernel.supports(key) is None for config in kernel.candidates(key)]
    if most is not None and key.storage == "float":
        own.sort(key=lambda config: expected_us(key, config))
        # the best of each kernel first, because the model may not tell the tiles of one kernel apart
        first = {config.kernel: config for config in reversed(own)}.values()
        own = sorted(own, key=lambda config: config not in first)[:most]
    return [TORCH, *own]


@torch.no_grad()
def tune(key: ProblemKey, device: torch.device | str = "cuda", most: int | None = None) -> TunedPlan:
    """Finds the fastest plan for `key` by measuring on `device`, the current GPU, with random weights and tokens.

    The fastest configurations of either launch make plans in all pairs, since launches overlap; the rule makes one
    more, and PyTorch's own kernels the last. As whole MLPs they take turns; the one with the smallest median then does
    so with PyTorch's alone, and wins unless that is faster. Configurations that give a wrong answer or do not fit the
    GPU take no part. With `most`, only so many of ours are tried for each launch.

    Raises:
        torch.OutOfMemoryError: the GPU has no room for the problem.
    """
    rule = heuristic_plan(key)
    up, down = Launch.random(key.up, device), Launch.random(key.down, device)
    ups = correct(up, dict.fromkeys((*candidates(key.up, most), rule.up)))
    downs = correct(down, dict.fromkeys((*candidates(key.down, most), rule.down)))

    plans = [Plan(*pair) for pair in product(fastest(up, ups), fastest(down, downs))]
    if rule.up in ups and rule.down in downs:
        plans.append(rule)
    calls = {plan: mlp_calls(up, down, plan) for plan in (*plans, UNFUSED)}
    best = _fastest(measure(calls, key.m, WHOLE_ROUNDS))
    # the luckiest of many may not be the fastest of two
    timings = measure({plan: calls[plan] for plan in (best, UNFUSED)}, key.m, LAST_ROUNDS)
    plan = _fastest(timings)
    return TunedPlan(key, plan, timings[plan].median_us, timings[UNFUSED].median_us)


@torch.no_grad()
def time_candidates(key: LinearKey, rounds: int = 10, device: torch.device | str = "cuda") -> dict[TileConfig, Timing]:
    """Times `candidates(key)` in turn on random data; a configuration that the GPU has no room for is left out."""
    launch = Launch.random(key, device)
    return measure({config: launch.calls(config) for config in runnable(launch, candidates(key))}, key.m, rounds)


def _fastest(timings: dict[Plan, Timing]) -> Plan:
    """The plan with the smallest median, the first of several."""
    return min(timings, key=lambda plan: timings[plan].median_us)


@dataclass(frozen=True)
class Launch:
    """One launch on random data: its input, and copies of its weights that together exceed the L2.

    Each copy is `(weight, gate)`.
    """

    key: LinearKey
    x: Tensor
    copies: list[tuple[Matrix, Matrix]]

    @staticmethod
    def random(key: LinearKey, device: torch.device | str) -> "Launch":
        """Tokens of N(0, 1), weights over sqrt(fan_in), so that what comes out is of the order of one.

        FP8 weights are of N(0, 1), and their scales do the rest.
        """

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=key.dtype, device=device)

        planes = 2 if key.gated else 1
        count = planes if key.one_block else 2 * planes - 1  # a third plane keeps the two apart
        is_transposed = key.storage == "transposed"
        block = normal(count, key.k, key.n).mT if is_transposed else normal(count, key.n, key.k)
        scales: Any = [None] * count
        if key.storage == "fp8":
            block = block.to(FP8)
            sizes = count, scale_blocks(key.n), scale_blocks(key.k)
            scales = torch.rand(sizes, device=device, dtype=torch.float32).add_(0.5).mul_(key.k**-0.5)
        else:
            block.mul_(key.k**-0.5)
        blocks = [block]
        if key.m <= GRAPHS_UP_TO:
            blocks += [blocks[0].clone() for _ in range(weight_copies(blocks[0].nbytes) - 1)]
        biases = normal(planes, key.n).mul_(0.5) if key.bias else [None, None]
        copies = [
            (
                Matrix(block[-1], scales[-1], biases[-1]),
                Matrix(block[0], scales[0], biases[0]) if key.gated else ABSENT,
            )
            for block in blocks
        ]
        return Launch(key, normal(key.m, key.k), copies)

    def run(self, x: Tensor, copy: int, config: TileConfig) -> Tensor:
        return linear(x, *self.copies[copy % len(self.copies)], self.key.activation, config)

    def calls(self, config: TileConfig) -> Calls:
        weight, _ = self.copies[0]
        call = describe_launch(self.x, weight.data, self.key.gated, self.key.activation)
        run = LAUNCHERS[config.kernel](call, config)
        return [partial(run, self.x, *copy) for copy in self.copies]


def mlp_calls(up: Launch, down: Launch, plan: Plan) -> Calls:
    """Whole MLPs, one for each copy of the weights of the launch that has more of them."""
    (weight, gate), (down_weight, _) = up.copies[0], down.copies[0]
    run = prepare(plan, up.x, MLPOperands(gate, weight, down_weight, up.key.activation))

    def call(copy: int) -> Tensor:
        weight, gate = up.copies[copy % len(up.copies)]
        down_weight, _ = down.copies[copy % len(down.copies)]
        return run(up.x, gate, weight, down_weight)

    return [partial(call, copy) for copy in range(max(len(up.copies), len(down.copies)))]


def runnable(launch: Measured[Config], configs: Iterable[Config]) -> list[Config]:
    """The `configs` that compile and fit the GPU. They are compiled in parallel and have run once.

    Most of a compilation is outside of Python, and Triton itself compiles in threads where it is asked to.
    """
    if launch.x.is_cuda:
        triton.runtime.driver.active.get_current_target()  # made at its first use, which is not for several threads

    @torch.no_grad()  # like the current device, a thread's own
    def runs(config: Config) -> bool:
        try:
            with torch.cuda.device_of(launch.x):
                launch.run(launch.x, 0, config)
        except OutOfResources:
            return False
        except TritonError as error:
            logger.warning("%s does not compile and is not used: %s", config, error)
            return False
        return True

    configs = list(configs)
    with ThreadPoolExecutor(min(16, cpu_count() or 1)) as pool:
        return [config for config, ran in zip(configs, pool.map(runs, configs), strict=True) if ran]


def correct(launch: Launch, configs: Iterable[TileConfig]) -> list[TileConfig]:
    """The `configs` that run and are as accurate against float64 as PyTorch; warns about the others."""
    configs = runnable(launch, configs)
    m, (up, gate) = launch.key.m, launch.copies[0]
    rows = spread(m, CHECKED_ROWS).to(launch.x.device)

    def exact(tensor: Tensor | None, scale: Tensor | None = None) -> Any:
        if scale is not None and tensor is not None:
            return dequantize(tensor, scale, torch.float64)
        return None if tensor is None else tensor.double()

    weights = exact(up.data, up.scale), exact(up.bias), exact(gate.data, gate.scale), exact(gate.bias)
    oracle = linear_ref(exact(launch.x[rows]), *weights, launch.key.activation)
    del weights
    quantized = up.scale is not None
    if quantized:
        eager = fp8_linear_ref(launch.x[rows], up, gate, launch.key.activation)
    else:
        eager = launch.run(launch.x, 0, TORCH)[rows]

    passed = []
    for config in configs:
        # new memory is likely to be what the last one gave back; what a kernel leaves out must not look right
        launch.x.new_full((m, launch.key.n), float("nan"))
        reason = inaccuracy(launch.run(launch.x, 0, config)[rows], eager, oracle, quantized)
        if reason and config != TORCH:
            logger.warning("%s gives a wrong answer for %s and is not used: %s", config, launch.key, reason)
        else:
            passed.append(config)
    return passed


def spread(count: int, most: int) -> Tensor:
    """Up to `most` evenly spaced indices from 0 to `count - 1`. The default dtype does not matter."""
    return torch.linspace(0, count - 1, max(1, min(count, most)), dtype=torch.float64).long()


def fastest(launch: Measured[Config], configs: list[Config]) -> list[Config]:
    """The configurations with the smallest medians, found in stages of fewer configurations and more rounds."""
    for rounds, keep, within in STAGES:
        if len(configs) > 1:
            timings = measure({config: launch.calls(config) for config in configs}, launch.key.m, rounds)
            configs = sorted(configs, key=lambda config: timings[config].median_us)[:keep]
            limit = within * timings[configs[0]].median_us
            configs = [config for config in configs if timings[config].median_us <= limit]
    return configs


def measure(calls: dict[K, Calls], m: int, rounds: int) -> dict[K, Timing]:
    """Times calls for `m` tokens in turn: in graphs if there are few, alone if there are many."""
    if m <= GRAPHS_UP_TO:
        return round_robin_graphs(calls, rounds)
    return round_robin({name: copies[0] for name, copies in calls.items()}, rounds, repeats=1 if m >= LONG else 4)
