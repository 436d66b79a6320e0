"""From tensors to launches on a GPU: the plan is looked up, never measured, and its two launches run.

Imports Triton, so nothing imports this before the first call on a GPU.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from triton.errors import TritonError

from hf_fused_mlp.kernels import call_of, has_rows, norm, prepare
from hf_fused_mlp.kernels.elementwise import Rows, act_mul, act_mul_backward
from hf_fused_mlp.memory import answer, mlp_kind, remember
from hf_fused_mlp.reference import mlp_ref
from hf_fused_mlp.tuning.cache import shipped_plan, unusable, user_plan
from hf_fused_mlp.tuning.heuristics import heuristic_plan
from hf_fused_mlp.types import GPU, UNFUSED, Plan, ProblemKey, next_power_of_two
from hf_fused_mlp.weights import is_packed

logger = logging.getLogger("hf_fused_mlp")

# asked in turn; the first that knows the problem answers, and the last knows every problem
SOURCES: list[Callable[[ProblemKey], Plan | None]] = [user_plan, shipped_plan, heuristic_plan]


def find_plan(key: ProblemKey) -> Plan:
    """The plan of the first source that knows `key`; PyTorch's own operations if it turned out not to run here."""
    plan = next(filter(None, (source(key) for source in SOURCES)))
    return UNFUSED if plan in unusable else plan


def problem_key(
    m: int, gate: Tensor | None, up: Tensor, down: Tensor | None, activation: str, bias: bool = False
) -> ProblemKey:
    """The key of the MLP that `m` tokens and these operands make; `bias` says whether any projection has one."""
    first = up if gate is None else gate
    aligned = first.data_ptr() % 16 == 0 and (down is None or down.data_ptr() % 16 == 0)
    return ProblemKey(
        m=next_power_of_two(m),
        hidden=up.shape[1],
        intermediate=up.shape[0],
        out=0 if down is None else down.shape[0],
        gated=gate is not None,
        activation=activation,
        dtype=up.dtype,
        bias=bias,
        one_block=aligned and (gate is None or is_packed(gate, up)),
        gpu=GPU.of(up.device),
    )


def mlp_cuda(x, *operands):
    """`hf_fused_mlp.ops.mlp` on a GPU, for operands that fit together."""
    out = answer(_kind(*operands), (x, *operands[:-1]))
    if out is None:
        with torch.cuda.device_of(x):  # kernels launch on the current device
            out = _first_call(x, *operands)
    return out


def _kind(*operands):
    """Under autocast another than `mlp_kind`, which modules ask for: they cast then, and the operator does not."""
    kind = mlp_kind(*operands)
    return ("under autocast", kind) if torch._C._is_any_autocast_enabled() else kind


def _first_call(x, gate, up, down, gate_bias, up_bias, down_bias, activation):
    """Finds the way for calls like this one, which is remembered once it has led to an answer."""
    operands = gate, up, down, gate_bias, up_bias, down_bias
    if x.numel() == 0 or not all(tensor is None or tensor.is_contiguous() for tensor in operands):
        return mlp_ref(x, *operands, activation)
    if not has_rows(x):
        rows = x.clone(memory_format=torch.contiguous_format)  # a tensor may be contiguous and have no rows
        return mlp_cuda(rows, *operands, activation) if has_rows(rows) else mlp_ref(x, *operands, activation)

    bias = not (gate_bias is None and up_bias is None and down_bias is None)
    plan = find_plan(problem_key(x.numel() // x.shape[-1], gate, up, down, activation, bias))
    try:
        run = prepare(plan, x, gate, up, down, activation)
        out = run(x, *operands)
    except torch.OutOfMemoryError:  # which is no fault of the plan's
        raise
    except Exception as error:
        if plan == UNFUSED:
            raise
        # a plan that ships may have been measured with a Triton that needed less, or compiled more; and a file of
        # plans may have been written by anyone
        logger.warning("%s does not run here (%s) and is not used; find one with `hf-fused-mlp tune`", plan, error)
        unusable.add(plan)
        run = prepare(UNFUSED, x, gate, up, down, activation)
        out = run(x, *operands)
    remember(_kind(*operands, activation), (x, *operands), run)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: str) -> Tensor | None:
    """``weight * normed`` as `form`, a key of `hf_fused_mlp.norms.FORMS`, has it; None for what has no kernel.

    Args:
        x: `[..., H]`, fp16, bf16 or fp32.
        weight: `[H]`, of the same dtype and device.

    Returns:
        `[..., H]`, contiguous.
    """
    out = answer((form, eps), (x, weight))
    if out is None:
        with torch.cuda.device_of(x):
            out = _first_norm(x, weight, eps, form)
    return None if out is NotImplemented else out


def _first_norm(x, weight, eps, form):
    """Finds the way for norms like this one, which is remembered, also if there is none."""
    run, out = _no_norm, NotImplemented
    if norm.supports(x, weight):
        rows = x if has_rows(x) else x.contiguous()
        launch = norm.rms_norm(call_of(rows, weight[None], False, "identity"), eps, form)
        run = launch if rows is x else lambda x, weight: launch(x.contiguous(), weight)
        try:
            out = run(x, weight)
        except TritonError as error:
            logger.warning("the kernel for RMSNorms does not run here (%s); the original forward does", error)
            run = _no_norm
    remember((form, eps), (x, weight), run)
    return out


def _no_norm(x, weight):
    """The answer where there is no kernel."""
    return NotImplemented


def act_mul_cuda(gate, up, activation):
    """`hf_fused_mlp.ops.act_mul` on a GPU, for tensors that fit together."""
    return _elementwise(act_mul, activation, gate, up).view(gate.shape)


def act_mul_backward_cuda(grad, gate, up, activation):
    """The gradients of `hf_fused_mlp.ops.act_mul` on a GPU, for tensors that fit together."""
    return tuple(grad.view(gate.shape) for grad in _elementwise(act_mul_backward, activation, grad, gate, up))


def _elementwise(make, activation, *tensors):
    rows = tuple(_rows(tensor) for tensor in tensors)
    out = answer((make, activation), rows)
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
