"""Why FP8 weights are not those that kernels read: one scale for each block of 128 x 128, and no other."""

from typing import Any

from torch import Tensor

from hf_fused_mlp.types import FP8, SCALE_BLOCK, has_block_scales


def are_blocks(block_size: Any) -> bool:
    """True if a layer's `block_size` is that of the scales that kernels read."""
    return block_size is not None and tuple(block_size) == (SCALE_BLOCK, SCALE_BLOCK)


def why_not_blocks(weight: Tensor | None, scale: Tensor | None, block_size: Any, is_static: bool) -> str | None:
    """Why no kernel reads a weight or a stack of them, with the remedy, or None; what is missing is no reason.

    Args:
        block_size: of the layer, `[rows, columns]`; None for one scale for a whole weight.
        is_static: whether the layer quantizes its input by a scale that is stored with it.
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
    """What is wrong with scales, which this reads and so waits for the GPU; None if they are fine."""
    if scale is None or scale.is_meta:
        return None
    scale = scale.detach().float()
    if bad := int((~scale.isfinite() | (scale == 0)).sum()):
        return f"has {bad} of {scale.numel()} scales that are zero or not finite; load it again, or pass exclude=[...]"
    return None
