"""Packing: gate and up as the two halves of one block of memory, seen from outside as the parameters they always were.

The parameters keep their identity, so optimizers, tied weights and state dicts see nothing of it.
"""

import torch
from torch import Tensor, nn


def is_packed(gate: Tensor, up: Tensor) -> bool:
    """Whether `up` (`[I, H]`) begins where `gate` (`[I, H]`) ends, so that both can be read as one `[2 * I, H]`."""
    return (
        gate.dtype == up.dtype
        and gate.device == up.device
        and gate.device.type != "meta"
        and gate.is_contiguous()
        and up.is_contiguous()
        and gate.data_ptr() + gate.nbytes == up.data_ptr()
    )


@torch.no_grad()
def pack(gate: nn.Parameter, up: nn.Parameter) -> None:
    """Copies both weights (`[I, H]`) into one new `[2 * I, H]` block and points them at its halves; packed ones stay.

    Extra memory while it runs: that block, on the weights' own device. Weights on meta have no memory and stay.
    """
    if gate.device.type == "meta" or is_packed(gate, up):
        return
    rows = gate.shape[0]
    block = torch.empty((rows + up.shape[0], gate.shape[1]), dtype=gate.dtype, device=gate.device)
    # one at a time: each old weight is freed before the next is copied
    for parameter, half in ((gate, block[:rows]), (up, block[rows:])):
        half.copy_(parameter)
        parameter.data = half


@torch.no_grad()
def unpack(gate: nn.Parameter, up: nn.Parameter) -> None:
    """The inverse of `pack`: gives each weight memory of its own, same bits."""
    for parameter in (gate, up):
        if parameter.untyped_storage().nbytes() != parameter.nbytes:
            parameter.data = parameter.data.clone()
