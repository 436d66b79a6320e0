"""From tensors to launches on a GPU: the plan is looked up, never measured, and its two launches run.

Imports Triton, so nothing imports this before the first call on a GPU.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from triton.errors import TritonError

from hf_fused_mlp.kernels import run_plan
from hf_fused_mlp.kernels.elementwise import act_mul, act_mul_backward
from hf_fused_mlp.reference import mlp_ref
from hf_fused_mlp.tuning.cache import remembered, shipped_plan, user_plan
from hf_fused_mlp.tuning.heuristics import heuristic_plan
from hf_fused_mlp.types import GPU, UNFUSED, Plan, ProblemKey, next_power_of_two
from hf_fused_mlp.weights import is_packed

logger = logging.getLogger("hf_fused_mlp")

# asked in turn; the first that knows the problem answers, and the last knows every problem
SOURCES: list[Callable[[ProblemKey], Plan | None]] = [user_plan, shipped_plan, heuristic_plan]


def plan_for(m: int, gate: Tensor | None, up: Tensor, down: Tensor | None, bias: bool, activation: str) -> Plan:
    """The plan for `m` tokens (at least 1) and these contiguous weights of one dtype and device.

    It is asked at every call, so what is remembered goes by attributes that are cheap to read. They tell apart
    everything that `problem_key` does: the logarithm of its `m`, and its `one_block` from the addresses.
    """
    first = up if gate is None else gate
    start, last = first.data_ptr(), up if down is None else down
    attributes = (
        (m - 1).bit_length(),
        up.shape,
        down is not None and down.shape,
        gate is None,
        activation,
        up.dtype,
        bias,
        (start | last.data_ptr()) % 16 == 0 and (gate is None or up.data_ptr() - start == gate.nbytes),
        up.get_device(),
    )
    plan = remembered.get(attributes)
    if plan is None:
        plan = remembered[attributes] = find_plan(problem_key(m, gate, up, down, activation, bias))
    return plan


def find_plan(key: ProblemKey) -> Plan:
    """The plan of the first source that knows `key`."""
    return next(filter(None, (source(key) for source in SOURCES)))


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


def mlp_cuda(x, gate, up, down, gate_bias, up_bias, down_bias, activation):
    """`hf_fused_mlp.ops.mlp` on a GPU, for operands that fit together."""
    tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    operands = gate, up, down, gate_bias, up_bias, down_bias
    for operand in operands:
        if operand is not None and not operand.is_contiguous():
            return mlp_ref(x, *operands, activation)
    if tokens.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], (up if down is None else down).shape[0]))

    bias = not (gate_bias is None and up_bias is None and down_bias is None)
    plan = plan_for(tokens.shape[0], gate, up, down, bias, activation)
    try:
        if x.get_device() == torch._C._cuda_getDevice():
            out = run_plan(plan, tokens, *operands, activation)
        else:  # kernels launch on the current device
            with torch.cuda.device(x.device):
                out = run_plan(plan, tokens, *operands, activation)
    except TritonError as error:  # out of resources, for one
        # a plan that ships may have been measured with a Triton that needed less, or compiled more
        logger.warning("%s does not run here (%s) and is not used; find one with `hf-fused-mlp tune`", plan, error)
        remembered.update({attributes: UNFUSED for attributes, known in list(remembered.items()) if known is plan})
        out = mlp_ref(tokens, *operands, activation)
    return out if tokens is x else out.view(*x.shape[:-1], out.shape[1])


def act_mul_cuda(gate, up, activation):
    """`hf_fused_mlp.ops.act_mul` on a GPU, for tensors that fit together."""
    with torch.cuda.device_of(gate):
        return act_mul(_rows(gate), _rows(up), activation).view(gate.shape)


def act_mul_backward_cuda(grad, gate, up, activation):
    """The gradients of `hf_fused_mlp.ops.act_mul` on a GPU, for tensors that fit together."""
    with torch.cuda.device_of(gate):
        grads = act_mul_backward(_rows(grad), _rows(gate), _rows(up), activation)
    return tuple(grad.view(gate.shape) for grad in grads)


def _rows(tensor: Tensor) -> Tensor:
    """`tensor` as `[M, I]`, contiguous in the last dimension."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
