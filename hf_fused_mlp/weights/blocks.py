"""Checks FP8 weights. Kernels read those with one scale for each block of 128 x 128, and no others."""

from typing import Any

from torch import Tensor

from hf_fused_mlp.types import FP8, SCALE_BLOCK, has_block_scales


def are_blocks(block_size: Any) -> bool:
    """True if kernels read scales of this `block_size`."""
    return block_size is not None and tuple(block_size) == (SCALE_BLOCK, SCALE_BLOCK)


def why_not_blocks(weight: Tensor | None, scale: Tensor | None, block_size: Any, is_static: bool) -> str | None:
    """Why no kernel reads a weight or a stack of weights, with the remedy, or None. A missing tensor is not a reason.

    Args:
        block_size: of the layer, `[rows, columns]`; None if a whole weight has one scale.
        is_static: whether the layer quantizes its input by a stored scale.
    """
    if weight is not None and weight.dtype != FP8:
        return f"has a weight of {weight.dtype}, expected {FP8}; load the checkpoint as it was quantized"
    if not are_blocks(block_size):
        return (
            f"has a scale for each block of {block_size} weights, expected [128, 128]; "
            "load a checkpoint of such blocks, or pass exclude=[...]"
        )
    if is_static:
        return (
            "quantizes its input by a scale that the checkpoint gives, expected dynamic ones; "
            "load a checkpoint without them, or pass exclude=[...]"
        )
    if weight is not None and scale is not None and not has_block_scales(weight, scale):
        return (
            f"has scales {list(scale.shape)} of {scale.dtype} for a weight {list(weight.shape)}, expected one for "
            "each block of 128 x 128; load the checkpoint as it was quantized"
        )
    return None


def unusable_scales(scale: Tensor | None) -> str | None:
    """What is wrong with the values of `scale`, or None. Reading them waits for the GPU."""
    if scale is None or scale.is_meta:
        return None
    scale = scale.detach().float()
    if bad := int((~scale.isfinite() | (scale == 0)).sum()):
        return f"has {bad} of {scale.numel()} scales that are zero or not finite; load it again, or pass exclude=[...]"
    return None
