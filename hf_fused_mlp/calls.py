"""Checks whether calling a module runs exactly the forward of its class, despite hooks, patches and accelerate.

The class alone does not tell, because adapters, hooks and parallelism wrap a layer and keep its class.
"""

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_fused_mlp.originals import own_forwards, runs_own_forward

# why a module whose forward was replaced on the instance is skipped
OWN_FORWARD = (
    "its forward was replaced on the instance, as some patches do; fuse before the patch, or pass exclude=[...]"
)


@torch.compiler.assume_constant_result
def _hf_fused_mlp_class_path(cls: type) -> str:
    """The module path and qualified name of a class, such as `torch.nn.modules.linear.Linear`."""
    return f"{cls.__module__}.{cls.__qualname__}"


# As a constant, the path costs compiled code no guard. torch.compile stores the constant under the function's name
# among the globals of the compiled module, so the name must be unique.
class_path = _hf_fused_mlp_class_path


def is_hooked(module: nn.Module) -> bool:
    """True if calling the module does anything other than run the forward that its class was defined with."""
    if is_wrapped(module):  # the cheap checks first
        return True
    if torch.compiler.is_compiling():
        _ = module.forward  # the guard for a forward that is put on the instance later
    return not runs_own_forward(type(module))


def is_wrapped(module: nn.Module) -> bool:
    """True if the instance has hooks or its own forward, so that a call does more than the forward of its class."""
    own = module.__dict__
    replaced = ("forward" in own or "_hf_hook" in own) and (
        has_own_forward(module) or ("_hf_hook" in own and not only_aligns(module))
    )
    return replaced or has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """True if a call runs hooks of PyTorch; backward hooks count only while gradients are enabled."""
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    # read only if needed, because compiled code guards everything that is read
    return torch.is_grad_enabled() and bool(module._backward_hooks or module._backward_pre_hooks)


def has_own_forward(module: nn.Module) -> bool:
    """True if the instance hides the forward of its class behind a different one.

    accelerate's hooks wrap the forward of the class and keep it in `_old_forward`. Removing a hook leaves it on the
    instance.
    """
    attributes = module.__dict__
    own = attributes.get("forward")
    if own is None:
        return False
    if "_hf_hook" in attributes and (torch.compiler.is_compiling() or _is_accelerates(own, module)):
        own = attributes.get("_old_forward")
    return getattr(own, "__func__", None) is not type(module).forward or own.__self__ is not module


def _is_accelerates(forward: Any, module: nn.Module) -> bool:
    """True if accelerate's hooks put this forward on an instance."""
    function = forward.func if type(forward) is partial and forward.args == (module,) else None
    return getattr(function, "__globals__", None) is vars(sys.modules.get("accelerate.hooks", sys))


def only_aligns(linear: nn.Module) -> bool:
    """True if accelerate's hook only moves inputs to the weight's device, as `device_map` does for every module."""
    hook, weight = linear.__dict__["_hf_hook"], linear._parameters.get("weight")
    return (
        class_path(type(hook)) == "accelerate.hooks.AlignDevicesHook"
        and not hook.offload
        and not hook.no_grad
        and hook.execution_device is not None
        and weight is not None
        and torch.device(hook.execution_device) == weight.device
    )


def is_bare(module: nn.Module | None) -> bool:
    """True if `module` exists and is not hooked."""
    return module is not None and not is_hooked(module)


def runs_class_forward(module: nn.Module | None) -> bool:
    """Fast form of `is_bare` for eager calls without gradients; False may also mean "look closer"."""
    cls: Any = type(module)
    if (code := own_forwards.get(cls)) is None or getattr(cls.forward, "__code__", None) is not code:
        return False
    if cls.__call__ is not nn.Module.__call__:
        return False
    own = module.__dict__  # weights.glance repeats this line: a call would cost as much as the line
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or "_hf_hook" in own)


def why_adapted(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Why the module of that name has other weights during a call than between calls, or None.

    PEFT's `target_parameters` parametrizes a module for each call only.

    Args:
        modules: all modules of the model, by name.
    """
    while name.rpartition(".")[2] == "base_layer":
        name = name.rpartition(".")[0]
        around: Any = modules[name]
        if (
            class_path(type(around)) == "peft.tuners.lora.layer.ParamWrapper"
            and not (around.disable_adapters or around.merged)
            and any(adapter in around.lora_A for adapter in around.active_adapters)
        ):
            return (
                f"PEFT adapts {around.parameter_name} in each call, so the original forward runs; merge, disable or "
                "unload the adapter"
            )
    return None


def device_of(module: nn.Module) -> torch.device:
    """The device on which the next call of `module` will run, judging by its hooks and parameters."""
    hook = module.__dict__.get("_hf_hook")  # accelerate's; offloaded weights are elsewhere until the call
    device = getattr(hook, "execution_device", None)
    if device is None:
        device = next((parameter.device for parameter in module.parameters()), "cpu")
    return torch.device(device)


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """The dtype of the first parameter of `module` that has floats; None if none has."""
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)
