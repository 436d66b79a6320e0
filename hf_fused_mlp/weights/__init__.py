"""How a layer's weights are stored, and whether kernels can read them without calling the layer.

`formats` reads the matrix of a layer; `packing` puts gate and up next to each other in memory.
"""

from hf_fused_mlp.weights.packing import as_one, is_packed, pack, unpack, why_not_packed

__all__ = ["as_one", "is_packed", "pack", "unpack", "why_not_packed"]
