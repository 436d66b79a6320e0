"""Finds the function of Transformers that runs a module of routed experts, which its config names."""

import sys
from types import FunctionType
from typing import Any

import torch
from torch import nn

# where functions are defined that our kernels may stand in for: Transformers' packages, and our own door
_TRANSFORMERS, _OURS = "transformers.", "hf_fused_mlp.integrations.transformers"
_EAGER = None, "eager"  # the class's own loop, unless something is registered under the name

_dict_of = object.__getattribute__  # a config's own `__getattribute__` takes longer than all the rest
_MISSING = object()
# for each name in the registry, the function that was found to be Transformers' own, or None
_accepted: dict[Any, Any] = dict.fromkeys(_EAGER)


def implementation_of(module: nn.Module) -> Any:
    """What the config of a module of routed experts names, "grouped_mm" for example; None if it names nothing."""
    return getattr(module.__dict__.get("config"), "_experts_implementation", None)


def runs_transformers_own(module: nn.Module, interface: Any) -> bool:
    """True if the original forward of `module` would run the class's loop or a function of Transformers or ours.

    Args:
        interface: the registry that the forward asks; None if it asks none.
    """
    if interface is None:
        return True
    config: Any = module.__dict__.get("config")
    if torch.compiler.is_compiling():
        name = config._experts_implementation  # as the original forward reads it
        return hf_fused_mlp_is_own(name, _registered(interface, name))
    if config is None:  # the original says so
        return False
    name = _dict_of(config, "__dict__").get("_experts_implementation_internal", _MISSING)
    if name is _MISSING:
        name = implementation_of(module)
    function = _registered(interface, name)
    return _accepted.get(name, _MISSING) is function or hf_fused_mlp_is_own(name, function)


def _registered(interface: Any, name: Any) -> Any:
    local = interface._local_mapping
    return local[name] if name in local else interface._global_mapping.get(name)


# compiled code keeps the answer among the globals of the compiled module, under this name, so it must be unique
@torch.compiler.assume_constant_result
def hf_fused_mlp_is_own(name: Any, function: Any) -> bool:
    """True if `function`, registered as `name`, is code that its package defines where it says."""
    if type(function) is not FunctionType:
        return function is None and name in _EAGER
    package = sys.modules.get(function.__module__)
    own = package is not None and vars(package).get(function.__name__) is function
    code_of = function.__globals__.get("__name__", "")
    if not own or not (code_of.startswith(_TRANSFORMERS) or code_of == _OURS):
        return False
    _accepted[name] = function
    return True
