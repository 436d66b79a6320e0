"""Packing: gate and up as the two halves of one block of memory, seen from outside as the parameters they always were.

The parameters keep their identity, and each half is a storage of its own: optimizers, tied weights, `state_dict` and
every way of saving, which look for tensors that share a storage, see nothing of it.
"""

import torch
from torch import Tensor, nn


def is_packed(gate: Tensor, up: Tensor) -> bool:
    """Whether `up` (`[I, H]`) begins where `gate` (`[I, H]`) ends, so that both can be read as one `[2 * I, H]`."""
    return (
        gate.dtype == up.dtype
        and gate.device == up.device
        and not gate.is_meta
        and gate.is_contiguous()
        and up.is_contiguous()
        and gate.data_ptr() + gate.nbytes == up.data_ptr()
    )


@torch.no_grad()
def pack(gate: nn.Parameter, up: nn.Parameter) -> None:
    """Copies both weights (`[I, H]`) into one new `[2 * I, H]` block and points them at its halves.

    Weights that are packed already stay where they are; so do those that cannot share a block (of two dtypes, devices
    or shapes, or on another device than a CPU or GPU) and those that the user has put into shared or pinned memory.

    Extra memory while it runs: the block, on the weights' own device.
    """
    if is_packed(gate, up) or not _can_share(gate, up):
        return
    block = torch.empty((2, *gate.shape), dtype=gate.dtype, device=gate.device)
    # one at a time: each old weight is freed before the next is copied
    with torch.cuda.device_of(gate):  # dlpack serves the current GPU only
        for parameter, half in ((gate, block[0]), (up, block[1])):
            half.copy_(parameter)
            # through dlpack, the half is a tensor with its own storage, which keeps the block alive
            parameter.data = torch.from_dlpack(half)


@torch.no_grad()
def unpack(gate: nn.Parameter, up: nn.Parameter) -> None:
    """The inverse of `pack`: gives each weight memory of its own, same bits."""
    if is_packed(gate, up):
        gate.data, up.data = gate.data.clone(), up.data.clone()


def _can_share(gate: Tensor, up: Tensor) -> bool:
    alike = gate.dtype == up.dtype and gate.device == up.device and gate.shape == up.shape
    kept = gate.device.type == "cpu" and any(weight.is_shared() or weight.is_pinned() for weight in (gate, up))
    return alike and gate.device.type in ("cpu", "cuda") and not kept
