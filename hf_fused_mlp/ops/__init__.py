"""The operators `torch.ops.hf_fused_mlp.*`, and the way from a call to its kernels."""

from hf_fused_mlp.ops.dense import gains_nothing, mlp, mlp_if_fits
from hf_fused_mlp.ops.experts import experts, experts_if_fits
from hf_fused_mlp.ops.library import on_gpu
from hf_fused_mlp.ops.product import act_mul

__all__ = ["act_mul", "experts", "experts_if_fits", "gains_nothing", "mlp", "mlp_if_fits", "on_gpu"]
