"""The other way to fuse experts: ``from_pretrained(..., experts_implementation="hf_fused_mlp")``.

Transformers calls the function that is registered under a model's `experts_implementation` in place of the forward of
its routed experts. Imported at the first of these calls.
"""

import sys
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_fused_mlp.families.experts import fused_output, why_not_kernels
from hf_fused_mlp.logs import logger
from hf_fused_mlp.reading.experts import ExpertsSpec, find_experts, multiplies_by_scales

_told: set[str] = set()
_defaults: WeakKeyDictionary[type, str] = WeakKeyDictionary()


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Runs the fused operator, or Transformers' default implementation if the operator cannot compute this call.

    Args:
        hidden_states: `[M, H]`.
        top_k_index, top_k_weights: `[M, k]`.
    """
    spec = find_experts(self)
    if isinstance(spec, ExpertsSpec):
        out = fused_output(self, spec, hidden_states, top_k_index, top_k_weights)
        if out is not None:
            return out
    name, in_fp8 = hf_fused_mlp_default_experts(type(self))
    if spec is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _tell(self, spec, name)
    if name == "eager":
        cls: Any = getattr(type(self), "original_class", type(self))
        return cls.forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)
    functions: Any
    if in_fp8:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS as functions
    else:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as functions
    return functions[name](self, hidden_states, top_k_index, top_k_weights)


def _tell(module: nn.Module, spec: ExpertsSpec | str, instead: str) -> None:
    """If no call of `module` runs kernels, logs once why."""
    reason = spec if isinstance(spec, str) else why_not_kernels(module, spec)
    if reason is not None and reason not in _told:
        _told.add(reason)
        logger.warning("%s; %s runs", reason, instead)


# compiled code keeps the result among the globals of the compiled module, under this name, so it must be unique
@torch.compiler.assume_constant_result
def hf_fused_mlp_default_experts(cls: type) -> tuple[str, bool]:
    """The implementation that Transformers runs for experts of `cls` by default, and whether it is one for FP8.

    Models define this, not their experts. We ask the first model class of the module that defines the experts.
    """
    from transformers.modeling_utils import PreTrainedModel

    if cls not in _defaults:
        around = vars(sys.modules.get(cls.__module__, sys)).values()
        classes = [c for c in around if isinstance(c, type) and c.__module__ == cls.__module__]
        models = [c for c in classes if issubclass(c, PreTrainedModel)]
        _defaults[cls] = _default_of(models[0]) if models else "grouped_mm"
    return _defaults[cls], multiplies_by_scales(cls)


def _default_of(model_class: Any) -> str:
    try:
        return model_class.get_correct_experts_implementation(object.__new__(model_class), None)
    except Exception:  # the model needs its config to answer
        return "grouped_mm"
