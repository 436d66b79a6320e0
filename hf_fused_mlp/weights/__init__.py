"""How are a layer's weights stored, and may they be read without calling the layer?

`formats` reads the matrix of a layer, `packing` lays gate and up side by side in memory.
"""

from hf_fused_mlp.weights.packing import as_one, is_packed, pack, unpack, why_not_packed

__all__ = ["as_one", "is_packed", "pack", "unpack", "why_not_packed"]
