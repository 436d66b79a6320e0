"""Finds the fastest plan for a problem of routed experts: the tuner for `ExpertsKey`. Never called from a forward.

It chooses first the order and the number of rows per tile, then the tiles of up, then those of down. Each candidate is
timed as a whole call. As in decoding, each call of a round has other tokens and another routing.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_fused_mlp.kernels.experts import choices, prepare_experts, rule_of_thumb
from hf_fused_mlp.logs import logger
from hf_fused_mlp.reference import experts_ref, fp8_experts_ref
from hf_fused_mlp.tuning.plan_files import TunedPlan
from hf_fused_mlp.tuning.timing import GRAPHS_UP_TO
from hf_fused_mlp.tuning.tuner import LAST_ROUNDS, Calls, fastest, measure, runnable, spread
from hf_fused_mlp.types import FP8, ExpertsCall, ExpertsKey, ExpertsPlan, Matrix, scale_blocks
from hf_fused_mlp.validation import RELATIVE_RMS, Errors, inaccuracy

ROUTINGS = 8  # in a graph; beyond GRAPHS_UP_TO tokens, one call reads almost all experts
CHECKED_PAIRS = 32  # whose experts are computed in float64, which takes four times the memory of theirs


@torch.no_grad()
def tune(key: ExpertsKey, device: torch.device | str = "cuda") -> TunedPlan:
    """Finds the fastest plan for `key` by measuring on `device`, the current GPU, with random weights and routings.

    It wins only if it is faster than the rule's plan in turn with it. Plans that give a wrong answer or do not fit the
    GPU take no part.

    Raises:
        RuntimeError: the rule's plan is one of them.
        torch.OutOfMemoryError: the GPU has no room for the problem.
    """
    problem = Problem.random(key, torch.device(device))
    rule = rule_of_thumb(problem.call)

    def best_of(plans: list[ExpertsPlan]) -> ExpertsPlan:
        known, *others = plans
        others = [plan for plan in dict.fromkeys(others) if plan != known and choices.unsupported(key, plan) is None]
        return fastest(problem, [known, *correct(problem, others)])[0]

    if not correct(problem, [rule]):
        raise RuntimeError(f"the rule's plan for {key} gives a wrong answer or does not run here: {rule}")
    best = best_of([rule, *choices.first_plans(problem.call)])
    best = best_of([best, *(replace(best, up=tile) for tile in choices.tiles(problem.call, best, "up"))])
    best = best_of([best, *(replace(best, down=tile) for tile in choices.tiles(problem.call, best, "down"))])
    # the luckiest of many may not be the fastest of two
    timings = measure({plan: problem.calls(plan) for plan in (rule, best)}, key.m, LAST_ROUNDS)
    plan = min(timings, key=lambda plan: timings[plan].median_us)
    return TunedPlan(key, plan, timings[plan].median_us, timings[rule].median_us)


@dataclass(frozen=True)
class Problem:
    """Routed experts with random weights, and calls of them: each of `copies` is `(x, ids, weights)`."""

    key: ExpertsKey
    call: ExpertsCall
    stacks: tuple[Tensor | None, ...]  # up, down, their biases or None, and for FP8 their scales
    copies: list[tuple[Tensor, Tensor, Tensor]]

    @property
    def x(self) -> Tensor:
        return self.copies[0][0]

    @staticmethod
    def random(key: ExpertsKey, device: torch.device) -> "Problem":
        """Tokens of N(0, 1), weights over sqrt(fan_in), all experts equally likely.

        FP8 weights are N(0, 1), and their scales divide them by sqrt(fan_in).
        """
        is_fp8 = key.storage == "fp8"
        width = (2 if key.gated else 1) * key.intermediate

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = key.dtype) -> Tensor:
            made = torch.empty(shape, dtype=dtype, device=device)
            for part in made:  # one by one, which needs little memory besides
                part.copy_(torch.empty(part.shape, dtype=key.dtype, device=device).normal_(0, scale))
            return made

        def weights(rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
            if not is_fp8:
                return normal(key.experts, rows, columns, scale=columns**-0.5), None
            sizes = key.experts, scale_blocks(rows), scale_blocks(columns)
            scales = torch.rand(sizes, device=device, dtype=torch.float32)
            return normal(key.experts, rows, columns, dtype=FP8), scales.add_(0.5).mul_(columns**-0.5)

        up, up_scale = weights(width, key.hidden)
        down, down_scale = weights(key.hidden, key.intermediate)
        if key.layout != "planes":  # what is random may be read in any order
            up, down = up.view(key.experts, key.hidden, width), down.view(key.experts, key.intermediate, key.hidden)
        biases = (
            (normal(key.experts, width, scale=0.5), normal(key.experts, key.hidden, scale=0.5)) if key.bias else ()
        )
        copies = [
            (
                normal(key.m, key.hidden),
                torch.rand(key.m, key.experts, device=device, dtype=torch.float32).topk(key.top_k)[1],
                torch.rand(key.m, key.top_k, device=device, dtype=torch.float32).add_(0.5),
            )
            for _ in range(ROUTINGS if key.m <= GRAPHS_UP_TO else 1)
        ]
        call = key.call(up.device)  # which has an index
        scales = (up_scale, down_scale) if is_fp8 else ()
        return Problem(key, call, (up, down, *(biases or (None, None)), *scales), copies)

    def run(self, x: Tensor, copy: int, plan: ExpertsPlan) -> Tensor:
        _, *routing = self.copies[copy]
        return prepare_experts(plan, self.call)(x, *routing, *self.stacks)

    def calls(self, plan: ExpertsPlan) -> Calls:
        run = prepare_experts(plan, self.call)
        return [partial(run, *copy, *self.stacks) for copy in self.copies]


def correct(problem: Problem, plans: Iterable[ExpertsPlan]) -> list[ExpertsPlan]:
    """The `plans` that run and are accurate. Warns about the others.

    For some tokens, the error against float64 has to be like PyTorch's. All tokens have to agree with PyTorch. In FP8,
    Transformers' arithmetic, which quantizes tokens, takes the place of PyTorch's.
    """
    form, (x, ids, weights) = problem.call.form, problem.copies[0]
    up, down, up_bias, down_bias, *scales = problem.stacks
    assert up is not None and down is not None
    if scales:
        up_scale, down_scale = scales
        eager = fp8_experts_ref(x, ids, weights, Matrix(up, up_scale, None), Matrix(down, down_scale, None), form)
    else:
        eager = experts_ref(x, ids, weights, up, down, up_bias, down_bias, form)
    rows = spread(len(x), CHECKED_PAIRS // problem.key.top_k).to(x.device)
    used, places = ids[rows].unique(return_inverse=True)
    chosen: list[Any] = [None if stack is None else stack[used] for stack in problem.stacks]
    if not scales:  # `experts_ref` dequantizes FP8
        chosen = [None if stack is None else stack.double() for stack in chosen]
    stacks, scales_used = (chosen[0], chosen[1], chosen[2], chosen[3]), chosen[4:]
    oracle = experts_ref(x[rows].double(), places, weights[rows].double(), *stacks, form, *scales_used)
    del chosen, stacks, scales_used
    allowed = 2 * RELATIVE_RMS[x.dtype]
    if scales:
        allowed = max(allowed, 3 * Errors.of(eager[rows], oracle).relative_rms)

    passed = []
    for plan in runnable(problem, plans):
        torch.full_like(eager, float("nan"))  # what a kernel leaves out must not look right, as in `tuner.correct`
        answer = problem.run(x, 0, plan)
        reason = inaccuracy(answer[rows], eager[rows], oracle, quantized=bool(scales))
        difference = ((answer.float() - eager.float()).norm() / eager.float().norm()).item()
        if reason is None and not difference <= allowed:
            reason = f"relative difference from PyTorch's answer {difference:.3g}"
        if reason:
            logger.warning("%s gives a wrong answer for %s and is not used: %s", plan, problem.key, reason)
        else:
            passed.append(plan)
    return passed
