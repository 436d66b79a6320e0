"""From tensors to launches on a GPU: looks up a plan, never measures one, and runs its launches.

Imports Triton, so it is imported at the first call on a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice

import torch
from torch import Tensor
from triton.errors import TritonError

from hf_fused_mlp.kernels import describe_launch, has_rows, norm, prepare
from hf_fused_mlp.kernels.elementwise import Rows, act_mul, act_mul_backward
from hf_fused_mlp.kernels.experts import describe_experts, prepare_experts, rule_of_thumb, without_sorting
from hf_fused_mlp.launch_cache import answer, experts_kind, mlp_kind, remember
from hf_fused_mlp.logs import logger
from hf_fused_mlp.modes import COMPLETE, no_kernels_on, why_variant
from hf_fused_mlp.reference import experts_ref, mlp_ref
from hf_fused_mlp.tuning.cache import shipped_plan, unusable, user_plan
from hf_fused_mlp.tuning.heuristics import gains_nothing_in_eager, heuristic_plan
from hf_fused_mlp.tuning.invariant import invariant_plan
from hf_fused_mlp.types import (
    GPU,
    UNFUSED,
    ExpertsCall,
    ExpertsKey,
    ExpertsOperands,
    ExpertsPlan,
    MLPOperands,
    Plan,
    ProblemKey,
    TileConfig,
)
from hf_fused_mlp.weights import is_packed

# asked in turn; the last knows every problem
MEASURED = user_plan, shipped_plan
SOURCES: list[Callable[[ProblemKey], Plan | None]] = [*MEASURED, heuristic_plan]


# for each storage, fallback plans for problems whose plan does not run; the last one always runs
_FALLBACKS = {"fp8": (Plan(TileConfig("fp8_dequantized"), TileConfig("fp8_dequantized")), UNFUSED)}


@contextmanager
def by_rule() -> Iterator[None]:
    """A context in which new calls of MLPs run the plans of the rule, as for shapes that were never measured."""
    before = list(SOURCES)
    SOURCES[:] = [heuristic_plan]
    try:
        yield
    finally:
        SOURCES[:] = before


def find_plan(key: ProblemKey) -> Plan:
    """The plan of the first source that knows `key`, or a fallback if that plan does not run here."""
    plan = next(filter(None, (source(key) for source in SOURCES)))
    return next(plan for plan in (plan, *_fallbacks(key.storage)) if plan not in unusable)


def _invariant_plan(key: ProblemKey) -> Plan:
    """The plan whose sums do not depend on the token count; where there is none, the usual one and a warning."""
    if reason := why_variant(key.storage, key.dtype, key.gpu):
        _warn_of_variance(reason)
    return invariant_plan(key) or find_plan(key)


@cache
def _warn_of_variance(reason: str) -> None:
    logger.warning("batch_invariant: %s; the usual ones run", reason)


def _fallbacks(storage: str | None) -> tuple[Plan, ...]:
    return _FALLBACKS.get(storage or "", (UNFUSED,))


def problem_key(m: int, operands: MLPOperands, dtype: torch.dtype | None = None) -> ProblemKey:
    """The problem of `m` tokens of `dtype` and an MLP's weights. Float weights have the same dtype."""
    gate, up, down, activation, _ = operands
    storage = operands.storage
    assert storage is not None  # otherwise no kernel reads them
    first: Tensor = up.data if gate.data is None else gate.data
    aligned = first.data_ptr() % 16 == 0 and (down.data is None or down.data.data_ptr() % 16 == 0)
    packed = gate.data is None or is_packed(gate.data, up.data)
    if gate.scale is not None:
        packed = packed and is_packed(gate.scale, up.scale)
    return ProblemKey(
        m=m,
        hidden=up.data.shape[1],
        intermediate=up.data.shape[0],
        out=0 if down.data is None else down.data.shape[0],
        gated=gate.data is not None,
        activation=activation,
        dtype=dtype or up.data.dtype,
        bias=any(matrix.bias is not None for matrix in (gate, up, down)),
        one_block=aligned and packed,
        gpu=GPU.of(up.data.device),
        storage=storage,
    )


def gains_nothing(x: Tensor, operands: MLPOperands, up_layers: int) -> bool:
    """True if the original forward, with `up_layers` before the activation, is as fast as the plan in eager mode."""
    if x.numel() == 0 or operands.storage is None or operands.batch_invariant:
        return False
    key = problem_key(x.numel() // x.shape[-1], operands, x.dtype)
    return gains_nothing_in_eager(key, find_plan(key), up_layers)


def mlp_cuda(x: Tensor, operands: MLPOperands) -> Tensor:
    """`hf_fused_mlp.ops.mlp` on a GPU, for tensors that fit together."""
    gate, up, down, *_ = operands
    kind = _kind(mlp_kind(*operands))
    out = answer(kind, (x, *gate, *up, *down), (x, gate, up, down))
    if out is None:
        with torch.cuda.device_of(x):  # kernels launch on the current device
            out = _first_call(x, operands)
    return out


def _kind(kind):
    """The cache key of the operator. Differs from `kind` under autocast, where modules cast and operators do not."""
    if not torch._C._is_any_autocast_enabled():
        return kind
    return "autocast", torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), kind


def _first_call(x: Tensor, operands: MLPOperands) -> Tensor:
    """Plans calls like this one, runs it, and remembers the launches if they succeeded."""
    gate, up, down, *_ = operands
    tensors = *gate, *up, *down
    if x.numel() == 0 or operands.storage is None:
        if operands.batch_invariant and operands.storage is None:
            _warn_of_variance(why_variant(None, x.dtype, GPU.of(x.device)))
        return mlp_ref(x, *operands.flat())
    if not has_rows(x):
        rows = x.clone(memory_format=torch.contiguous_format)  # a contiguous tensor may still have no rows
        return mlp_cuda(rows, operands) if has_rows(rows) else mlp_ref(x, *operands.flat())

    key = problem_key(x.numel() // x.shape[-1], operands, x.dtype)
    plans = _invariant_plan(key) if operands.batch_invariant else find_plan(key), *_fallbacks(operands.storage)
    # a shipped plan may have been measured with a Triton that needed fewer resources, and anyone may have written the
    # user's file
    message = (
        "batch_invariant: %s does not run here (%s); PyTorch's GEMMs do, whose sums depend on the token count"
        if operands.batch_invariant
        else "%s does not run here (%s) and is not used; find one with `hf-fused-mlp tune`"
    )
    run, out = _first_that_runs(plans, lambda plan: prepare(plan, x, operands), (x, gate, up, down), message)
    remember(_kind(mlp_kind(*operands)), (x, *tensors), run)
    return out


def _first_that_runs(plans, prepared, arguments, message):
    """The function that `prepared` makes from the first of `plans` that runs, and its output.

    Plans that fail are logged once and not tried again. The error of the last one is raised.
    """
    *others, last = dict.fromkeys(plans)
    for plan in others:
        if plan in unusable:
            continue
        try:
            run = prepared(plan)
            return run, run(*arguments)
        except torch.OutOfMemoryError:  # the plan is not the cause
            raise
        except Exception as error:
            logger.warning(message, plan, error)
            unusable.add(plan)
    run = prepared(last)
    return run, run(*arguments)


def experts_cuda(x: Tensor, ids: Tensor, weights: Tensor, operands: ExpertsOperands) -> Tensor:
    """`hf_fused_mlp.ops.experts` on a GPU, for tensors that fit together."""
    tensors = x, ids, weights, *operands.tensors
    kind = _kind(experts_kind(operands))
    out = answer(kind, tensors, tensors)
    if out is None:
        with torch.cuda.device_of(x):
            out = _first_experts(kind, tensors, operands.form)
    return out


def _first_experts(kind, tensors, form):
    """Plans calls like this one, runs it, and remembers the launches if they succeeded."""
    x, ids, weights, *stacks = tensors
    if x.numel() == 0:
        return x.new_empty(x.shape)
    gpu = GPU.of(x.device)
    if gpu.name != "cpu" and no_kernels_on(gpu, least=COMPLETE):  # compiled code did not ask (`modes.no_kernels`)
        return experts_ref(x, ids, weights, *stacks[:4], form, *stacks[4:])
    if not (has_rows(x) and _is_usual(ids) and _is_usual(weights)):
        # the routing is small enough to copy, so only x and the stacks decide the plan
        x = x if has_rows(x) else x.clone(memory_format=torch.contiguous_format)
        ids, weights = (t.clone(memory_format=torch.contiguous_format) for t in (ids, weights))
        tensors = x, ids, weights, *stacks
        if (out := answer(kind, tensors, tensors)) is not None:
            return out
    usual = all(tensor is None or tensor.is_contiguous() for tensor in stacks)
    if not usual:  # weights are copied for this call only, which Transformers never causes
        tensors = x, ids, weights, *(None if tensor is None else tensor.contiguous() for tensor in stacks)
    call = describe_experts(x, ids, *tensors[3:5], form)
    aligned = all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)
    plans = experts_plans(call, any(tensor is not None for tensor in tensors[5:7])) if aligned else ()
    plans = *plans, without_sorting(call)
    message = "%s does not run here (%s); a slower plan does"
    run, out = _first_that_runs(plans, lambda plan: prepare_experts(plan, call), tensors, message)
    if usual:
        remember(kind, tensors, run)
    return out


def experts_plans(call: ExpertsCall, bias: bool) -> tuple[ExpertsPlan, ...]:
    """The measured plan for calls like this one, if any, and the rule's plan; `bias` is true if there is one."""
    key = ExpertsKey.of(call, bias)
    measured = filter(None, (source(key) for source in MEASURED))
    return *islice(measured, 1), rule_of_thumb(call)


def _is_usual(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: str) -> Tensor | None:
    """``weight * normed``, rounded according to `form`, a key of `reading.norm.FORMS`; None if no kernel can.

    Args:
        x: `[..., H]`, fp16, bf16 or fp32.
        weight: `[H]`, of the same dtype and device.

    Returns:
        `[..., H]`, dense, with its dimensions in the order in which those of `x` lie in memory.
    """
    out = answer((form, eps), (x, weight), (x, weight))
    if out is None:
        with torch.cuda.device_of(x):
            out = _first_norm(x, weight, eps, form)
    return None if out is NotImplemented else out


def _first_norm(x, weight, eps, form):
    """Finds the launch for norms like this one, and remembers it or its absence."""
    run, out = _no_norm, NotImplemented
    if norm.supports(x, weight) and (order := _memory_order(x)) is not None:
        rows = x.permute(order)
        rows = rows if has_rows(rows) else rows.contiguous()
        launch = norm.rms_norm(describe_launch(rows, weight[None], False, "identity"), eps, form)
        run = launch if has_rows(x) else _in_order(launch, order)
        try:
            out = run(x, weight)
        except TritonError as error:
            logger.warning("the kernel for RMSNorms does not run here (%s); the original forward does", error)
            run = _no_norm
    remember((form, eps), (x, weight), run)
    return out


def _memory_order(x: Tensor) -> list[int] | None:
    """The dimensions of `x` as they lie in memory, the outermost first; PyTorch's operations keep this order.

    None if the last one is not the innermost, or if elements share memory.
    """
    *lead, last = range(x.dim())
    if has_rows(x):
        return [*lead, last]
    if x.stride(last) != 1 or any(x.stride(dim) == 0 for dim in lead if x.shape[dim] > 1):
        return None
    return [*sorted(lead, key=lambda dim: -x.stride(dim)), last]


def _in_order(launch: Callable[[Tensor, Tensor], Tensor], order: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """`launch` for tensors whose dimensions lie in memory in this order, and so do those of its output."""
    back = sorted(order, key=order.__getitem__)

    def run(x, weight):
        rows = x.permute(order)
        return launch(rows if has_rows(rows) else rows.contiguous(), weight).permute(back)

    return run


def _no_norm(x, weight):
    """Remembered in place of a launch if there is no kernel."""
    return NotImplemented


def act_mul_cuda(gate, up, activation):
    """`hf_fused_mlp.ops.act_mul` on a GPU, for tensors that fit together."""
    return _elementwise(act_mul, activation, gate, up).view(gate.shape)


def act_mul_backward_cuda(grad, gate, up, activation):
    """The gradients of `hf_fused_mlp.ops.act_mul` on a GPU, for tensors that fit together."""
    return tuple(grad.view(gate.shape) for grad in _elementwise(act_mul_backward, activation, grad, gate, up))


def _elementwise(make, activation, *tensors):
    rows = tuple(_rows(tensor) for tensor in tensors)
    out = answer((make, activation), rows, rows)
    if out is None:
        first, strides = rows[0], tuple(tensor.stride(0) for tensor in rows)
        run = make(Rows(*first.shape, strides, first.dtype, first.device), activation)
        with torch.cuda.device_of(first):
            out = run(*rows)
        remember((make, activation), rows, run)
    return out


def _rows(tensor: Tensor) -> Tensor:
    """`tensor` as `[M, I]`, contiguous in the last dimension."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
