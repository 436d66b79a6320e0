"""Fused MLP kernels for Hugging Face Transformers.

import hf_fused_mlp

model = AutoModelForCausalLM.from_pretrained(path, use_fused_mlp=True)  # at load
hf_fused_mlp.fuse_model(model)  # or on a live model
hf_fused_mlp.unfuse_model(model)  # and back, bit for bit
hf_fused_mlp.audit(model)  # where its time goes, and what fusing gains

Importing the package imports neither PyTorch nor Transformers: a public name is imported when it is first used, and
`use_fused_mlp` is installed as soon as Transformers is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_fused_mlp.integrations.transformers import install, uninstall
from hf_fused_mlp.logs import configure
from hf_fused_mlp.version import __version__

if TYPE_CHECKING:
    from hf_fused_mlp.fuse import fuse_model, fusion_report, unfuse_model
    from hf_fused_mlp.numerics import validate
    from hf_fused_mlp.numerics.report import NumericsReport
    from hf_fused_mlp.options import FusionError
    from hf_fused_mlp.profiling.audit import audit
    from hf_fused_mlp.profiling.report import AuditReport
    from hf_fused_mlp.reading.mlp import MLPKind, MLPSpec, register_mlp
    from hf_fused_mlp.report import FusionReport

__all__ = [
    "AuditReport",
    "FusionError",
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

# no name here may equal the name of a submodule: importing the submodule would replace it
_MODULES = {
    "AuditReport": "hf_fused_mlp.profiling.report",
    "FusionError": "hf_fused_mlp.options",
    "FusionReport": "hf_fused_mlp.report",
    "MLPKind": "hf_fused_mlp.reading.mlp",
    "MLPSpec": "hf_fused_mlp.reading.mlp",
    "NumericsReport": "hf_fused_mlp.numerics.report",
    "audit": "hf_fused_mlp.profiling.audit",
    "fuse_model": "hf_fused_mlp.fuse",
    "fusion_report": "hf_fused_mlp.fuse",
    "register_mlp": "hf_fused_mlp.reading.mlp",
    "unfuse_model": "hf_fused_mlp.fuse",
    "validate": "hf_fused_mlp.numerics",
}

configure()
install()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
