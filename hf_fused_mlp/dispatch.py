"""From tensors to launches on a GPU: the plan is looked up, never measured, and its two launches run.

Imports Triton, so nothing imports this before the first call on a GPU.
"""

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from triton.errors import TritonError

from hf_fused_mlp.kernels import has_rows, prepare
from hf_fused_mlp.kernels.elementwise import Rows, act_mul, act_mul_backward
from hf_fused_mlp.reference import mlp_ref
from hf_fused_mlp.tuning.cache import remembered, shipped_plan, unusable, user_plan
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


def mlp_cuda(x, gate, up, down, gate_bias, up_bias, down_bias, activation):
    """`hf_fused_mlp.ops.mlp` on a GPU, for operands that fit together."""
    operands = gate, up, down, gate_bias, up_bias, down_bias
    attributes = _attributes(x, *operands, activation)
    run = remembered.get(attributes) or partial(_first_call, attributes, activation)
    if x.get_device() == torch.cuda.current_device():
        return run(x, *operands)
    with torch.cuda.device_of(x):  # kernels launch on the current device
        return run(x, *operands)


def _attributes(x, gate, up, down, gate_bias, up_bias, down_bias, activation) -> tuple:
    """All that the way to an answer depends on: it is kept by them, so they are cheap to read and to hash.

    They tell apart what `problem_key` and `prepare` do, and more; of the addresses, what `one_block` says.
    """
    first, last = up if gate is None else gate, up if down is None else down
    start = first.data_ptr()
    return (
        x.shape,
        x.stride(),
        x.dtype,
        x.get_device(),
        up.shape,
        down is not None and down.shape,
        gate is None,
        gate_bias if gate_bias is None else gate_bias.is_contiguous(),
        up_bias if up_bias is None else up_bias.is_contiguous(),
        down_bias if down_bias is None else down_bias.is_contiguous(),
        activation,
        (start | last.data_ptr()) % 16 == 0 and (gate is None or up.data_ptr() - start == gate.nbytes),
        up.is_contiguous() and (gate is None or gate.is_contiguous()) and (down is None or down.is_contiguous()),
    )


def _first_call(attributes, activation, x, gate, up, down, gate_bias, up_bias, down_bias):
    """Finds the way for calls of these attributes, which is remembered once it has led to an answer."""
    operands = gate, up, down, gate_bias, up_bias, down_bias
    if x.numel() == 0 or not all(tensor is None or tensor.is_contiguous() for tensor in operands):
        return mlp_ref(x, *operands, activation)
    if not has_rows(x):
        return mlp_cuda(x.contiguous(), *operands, activation)

    bias = not (gate_bias is None and up_bias is None and down_bias is None)
    plan = find_plan(problem_key(x.numel() // x.shape[-1], gate, up, down, activation, bias))
    run = prepare(plan, x, gate, up, down, activation)
    try:
        out = run(x, *operands)
    except TritonError as error:  # out of resources, for one
        # a plan that ships may have been measured with a Triton that needed less, or compiled more
        logger.warning("%s does not run here (%s) and is not used; find one with `hf-fused-mlp tune`", plan, error)
        unusable.add(plan)
        run = prepare(UNFUSED, x, gate, up, down, activation)
        out = run(x, *operands)
    _remember(attributes, run)
    return out


def _remember(attributes: tuple, run: Callable) -> Callable:
    """Keeps `run` for later calls, though not of endlessly many kinds."""
    if len(remembered) >= 4096:
        remembered.clear()
    remembered[attributes] = run
    return run


def act_mul_cuda(gate, up, activation):
    """`hf_fused_mlp.ops.act_mul` on a GPU, for tensors that fit together."""
    return _elementwise(act_mul, activation, gate, up).view(gate.shape)


def act_mul_backward_cuda(grad, gate, up, activation):
    """The gradients of `hf_fused_mlp.ops.act_mul` on a GPU, for tensors that fit together."""
    return tuple(grad.view(gate.shape) for grad in _elementwise(act_mul_backward, activation, grad, gate, up))


def _elementwise(make, activation, *tensors):
    rows = [_rows(tensor) for tensor in tensors]
    first, strides = rows[0], tuple(tensor.stride(0) for tensor in rows)
    attributes = make, activation, first.shape, strides, first.dtype, first.get_device()
    run = remembered.get(attributes)
    if run is None:
        run = _remember(attributes, make(Rows(*first.shape, strides, first.dtype, first.device), activation))
    with torch.cuda.device_of(first):
        return run(*rows)


def _rows(tensor: Tensor) -> Tensor:
    """`tensor` as `[M, I]`, contiguous in the last dimension."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
