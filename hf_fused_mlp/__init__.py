"""Fused MLP kernels for Hugging Face Transformers.

import hf_fused_mlp

model = AutoModelForCausalLM.from_pretrained(path, use_fused_mlp=True)  # at load
hf_fused_mlp.fuse_model(model)  # or on a live model
hf_fused_mlp.unfuse_model(model)  # and back, bit for bit
hf_fused_mlp.audit(model)  # where its time goes, and what fusing does about it
"""

from typing import Any

from hf_fused_mlp.fuse import fuse_model, fusion_report, unfuse_model
from hf_fused_mlp.integrations.transformers import install, uninstall, warn_if_untested
from hf_fused_mlp.numerics import validate
from hf_fused_mlp.numerics.report import NumericsReport
from hf_fused_mlp.reading.mlp import MLPKind, MLPSpec, register_mlp
from hf_fused_mlp.report import FusionReport
from hf_fused_mlp.version import __version__

__all__ = [
    "FusionReport",
    "MLPKind",
    "MLPSpec",
    "NumericsReport",
    "__version__",
    "audit",
    "fuse_model",
    "fusion_report",
    "install",
    "register_mlp",
    "unfuse_model",
    "uninstall",
    "validate",
]

install()
warn_if_untested()


def __getattr__(name: str) -> Any:
    # the profiler and the page's templates are loaded when they are first asked for
    if name == "audit":
        from hf_fused_mlp.profiling.audit import audit

        return audit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
