"""Packing: gate and up next to each other in memory, so that kernels can read both as one `[2 * I, H]` block.

The parameters keep their identity, shape and strides, and each has a separate storage, so optimizers, `state_dict` and
every way of saving see no shared storage. A weight is moved only if nothing else uses its memory. Views of a flat
buffer, shared memory and tied weights stay where they are.
"""

import ctypes
import math
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef, shared_cache

# PyTorch allocates GPU memory in multiples of this many bytes
_GRANULARITY = 512

# by address of each weight that `pack` moved: its storage, and that of its neighbour
_packed: dict[int, tuple[StorageWeakRef, StorageWeakRef]] = {}


def is_packed(gate: Tensor, up: Tensor) -> bool:
    """True if `up` (`[I, H]`) begins where `gate` (`[I, H]`) ends, so that both can be read as one `[2 * I, H]`."""
    return (
        gate.dtype == up.dtype
        and gate.device == up.device
        and not gate.is_meta
        and gate.is_contiguous()
        and up.is_contiguous()
        and gate.data_ptr() + gate.nbytes == up.data_ptr()
    )


def as_one(gate: Tensor, up: Tensor) -> Tensor:
    """Two packed tensors (`[I, H]`) as one `[2 * I, H]` over their memory. It must not outlive them."""
    return borrowed(gate, gate.shape[0] + up.shape[0])


def borrowed(tensor: Tensor, rows: int | None = None) -> Tensor:
    """A tensor over the memory of contiguous `tensor` `[N, K]` that does not keep it alive, and must not outlive it.

    Args:
        rows: for more than those of `tensor`, which must follow it in memory.
    """
    shape = tensor.shape if rows is None else (rows, *tensor.shape[1:])
    bytes_ = math.prod(shape) * tensor.itemsize
    if tensor.is_cuda:
        # a view would keep its storage alive, and reach no further than that
        memory = type("Memory", (), {})()
        memory.__cuda_array_interface__ = {
            "shape": (bytes_,),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }
        flat = torch.as_tensor(memory, device=tensor.device)
    else:
        flat = torch.frombuffer((ctypes.c_uint8 * bytes_).from_address(tensor.data_ptr()), dtype=torch.uint8)
    return flat.view(tensor.dtype).view(shape)


def pack(gate: nn.Parameter, up: nn.Parameter) -> list[Tensor]:
    """Copies both weights (`[I, H]`) to adjacent memory and points the two parameters there.

    Does nothing if they are packed already, if `why_not_packable` has a reason, or if the device has no memory for a
    temporary copy of both.

    Returns:
        Tensors on the old memory of the weights. The caller drops them once nobody reads them.
    """
    if not _is_real(gate, up) or is_packed(gate, up) or why_not_packable(gate, up) is not None:
        return []
    # the caller's modes must not affect the weights
    with torch.inference_mode(gate.is_inference()), torch.no_grad(), torch.cuda.device_of(gate):
        try:
            halves = _side_by_side(gate)
        except torch.OutOfMemoryError:
            return []
        replaced = [gate.data, up.data]
        for half, weight in zip(halves, replaced, strict=True):
            half.copy_(weight)
        gate.data, up.data = halves
    _note_packed(*halves)
    return replaced


def unpack(weights: Iterable[nn.Parameter]) -> list[Tensor]:
    """Undoes `pack` for weights that share a block of memory. Other weights stay where they are.

    Returns:
        Like `pack`.
    """
    replaced = []
    for weight in weights:
        # on a GPU each weight usually has a separate allocation, packed or not
        if _is_real(weight) and _was_packed(weight) and not weight.untyped_storage().resizable() and _is_alone(weight):
            with torch.inference_mode(weight.is_inference()), torch.no_grad():
                replaced.append(weight.data)
                weight.data = weight.data.clone()
    return replaced


def why_not_packable(gate: Tensor, up: Tensor) -> str | None:
    """Why the two weights must not be moved, or None if `pack` may move them."""
    if gate.dtype != up.dtype or gate.device != up.device or gate.shape != up.shape:
        return "gate and up differ in dtype, device or shape"
    for name, weight in (("gate", gate), ("up", up)):
        if not _owns_memory(weight) or gate is up:
            return f"{name} shares its memory (a flat buffer, a tied weight, another process), so it is not moved"
        if _was_packed(weight) and _partner_is_there(weight):
            return f"{name} is tied, and packed with the weight of another MLP"
    return None


def why_not_packed(gate: Tensor, up: Tensor) -> str | None:
    """Why the two weights are not packed, with the remedy if there is one; None if they are."""
    if not _is_real(gate, up) or is_packed(gate, up):
        return None
    return (
        why_not_packable(gate, up) or "gate and up were replaced or moved after fusing; call fuse_model(model) again"
    )


def _is_real(*weights: Tensor) -> bool:
    """True if the weights have memory, and no mode of the caller replaces new memory by fake tensors."""
    ordinary = all(type(weight) in (Tensor, nn.Parameter) and not weight.is_meta for weight in weights)
    return ordinary and torch._C._len_torch_dispatch_stack() == 0


def _owns_memory(weight: Tensor) -> bool:
    """True if, as far as PyTorch knows, nothing else can read or write the memory of `weight`."""
    if weight.device.type not in ("cpu", "cuda") or not weight.is_contiguous() or not _is_alone(weight):
        return False
    storage = weight.untyped_storage()
    if not storage.resizable() and not _was_packed(weight):  # owned by NumPy, a file or another library
        return False
    return not (_is_sent(storage) if weight.is_cuda else storage.is_shared() or weight.is_pinned())


def _is_alone(weight: Tensor) -> bool:
    """True if no other tensor, including those saved by autograd, and no other variable holds its storage."""
    return _uses(weight) <= _USES


def _uses(weight: Tensor) -> tuple[int, int]:
    storage = weight.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


# of an unshared weight; the counts depend on the version of PyTorch
_USES = _uses(torch.empty(1))


def _is_sent(storage: torch.UntypedStorage) -> bool:
    """True if GPU memory was sent to another process by an inter-process handle of CUDA."""
    return any(
        sent.cdata == storage._cdata for sent in list(shared_cache.values()) if isinstance(sent, StorageWeakRef)
    )


def _side_by_side(like: Tensor) -> tuple[Tensor, Tensor]:
    """Two new tensors like `like` with separate storages. The second begins where the first ends."""
    if (halves := _two_allocations(like)) is not None:
        return halves
    block = torch.empty((2, like.nbytes), dtype=torch.uint8, device=like.device)
    # through dlpack each half gets a separate storage, which keeps the block alive but cannot be resized
    first, second = (torch.from_dlpack(half).view(like.dtype).view(like.shape) for half in block)
    return first, second


def _two_allocations(like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Two neighbouring allocations of PyTorch, or None if its allocator returns none.

    Allocating and freeing a block of twice the size makes room for both. Then blocks are allocated, filling other gaps
    first, until two are neighbours.
    """
    size, device = like.nbytes, like.device
    if device.type != "cuda" or size % _GRANULARITY:
        return None
    torch.empty(2 * size, dtype=torch.uint8, device=device)
    reserved, made = torch.cuda.memory_reserved(device), {}
    # stop if the allocator keeps no free blocks, or asks the driver for each
    while reserved and torch.cuda.memory_reserved(device) - reserved <= 1 << 21:
        half = torch.empty_like(like, memory_format=torch.contiguous_format)
        made[half.data_ptr()] = half
        for first, second in ((half.data_ptr() - size, half.data_ptr()), (half.data_ptr(), half.data_ptr() + size)):
            if first in made and second in made:
                return made[first], made[second]
    return None


def _note_packed(gate: Tensor, up: Tensor) -> None:
    for address in [address for address, (storage, _) in list(_packed.items()) if storage.expired()]:
        _packed.pop(address, None)
    gate_ref, up_ref = (StorageWeakRef(weight.untyped_storage()) for weight in (gate, up))
    _packed[gate.data_ptr()], _packed[up.data_ptr()] = (gate_ref, up_ref), (up_ref, gate_ref)


def _was_packed(weight: Tensor) -> bool:
    """True if `pack` put `weight` where it is."""
    storage = _packed.get(weight.data_ptr(), (None,))[0]
    return storage is not None and not storage.expired() and storage.cdata == weight.untyped_storage()._cdata


def _partner_is_there(weight: Tensor) -> bool:
    """True if the weight that was put next to `weight` is still there."""
    partner = torch.UntypedStorage._new_with_weak_ptr(_packed[weight.data_ptr()][1].cdata)
    return partner is not None and abs(partner.data_ptr() - weight.data_ptr()) == weight.nbytes
