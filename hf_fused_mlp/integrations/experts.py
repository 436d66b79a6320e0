"""The other way to fused experts: ``from_pretrained(..., experts_implementation="hf_fused_mlp")``.

Transformers calls the function that is registered under a model's `experts_implementation` in place of the forward of
its routed experts. Imported at the first of these calls.
"""

from typing import Any

from torch import Tensor, nn

from hf_fused_mlp.families.experts import fused_output
from hf_fused_mlp.logs import logger
from hf_fused_mlp.reading.experts import find_experts

NAME = "hf_fused_mlp"
_told: set[str] = set()


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The fused operator, or what Transformers runs by default where that cannot answer.

    Args:
        hidden_states: `[M, H]`.
        top_k_index, top_k_weights: `[M, k]`.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    spec = find_experts(self)
    out = None
    if isinstance(spec, str):
        _tell(f"{spec}; grouped_mm runs")
    elif spec is not None:
        out = fused_output(self, spec, hidden_states, top_k_index, top_k_weights)
    if out is None:
        out = ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    return out


def _tell(message: str) -> None:
    """Logs a warning once."""
    import torch

    if not torch.compiler.is_compiling() and message not in _told:
        _told.add(message)
        logger.warning(message)


def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """In place of the experts of FP8 checkpoints."""
    raise NotImplementedError(
        f"experts_implementation={NAME!r} has no kernels for FP8 experts; "
        'call model.set_experts_implementation("grouped_mm")'
    )
