"""The children of an MLP: which may be read in place of being called, and why another may not.

The class alone does not tell. Quantizers keep `nn.Linear` and change what is inside; adapters, hooks and parallelism
put something around it.
"""

from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor

from hf_fused_mlp.originals import LINEAR, own_forwards, runs_own_forward

_PLAIN_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))

# while torch.export traces, fake tensors stand for the parameters
_PARAMETERS = frozenset((nn.Parameter, FakeTensor))

# why a module whose forward is not its class's is left alone
OWN_FORWARD = (
    "its forward was replaced on the instance, as some patches do; fuse before the patch, or pass exclude=[...]"
)


@torch.compiler.assume_constant_result
def _hf_fused_mlp_class_path(cls: type) -> str:
    """Module path and qualified name."""
    return f"{cls.__module__}.{cls.__qualname__}"


# compiled code would check the class's name before each call; as a constant it is kept among the globals of whatever
# module was compiled, under the function's name, which therefore is unlike any other
class_path = _hf_fused_mlp_class_path


_LINEARS = {"torch.nn.modules.linear.Linear", "transformers.models.falcon.modeling_falcon.FalconLinear"}


def _is_linear(cls: type[nn.Module]) -> bool:
    """Whether a class, by itself, multiplies with its weight and adds its bias."""
    return cls is LINEAR or class_path(cls) in _LINEARS


def is_plain(linear: nn.Module) -> bool:
    """Whether a projection's weights may be read in place of calling it."""
    cls = type(linear)
    if not _is_linear(cls):
        return False
    parameters = linear._parameters
    weight = parameters.get("weight")
    return (
        type(weight) in _PARAMETERS
        and weight.dtype in _PLAIN_DTYPES
        and weight.layout is torch.strided
        and weight.dim() == 2
        and not weight.is_meta
        and _has_plain_bias(parameters, weight)
        and len(parameters) == 2
        and not is_hooked(linear)
    )


def _has_plain_bias(parameters: Mapping[str, torch.Tensor | None], weight: torch.Tensor) -> bool:
    bias: Any = parameters.get("bias", False)  # a buffer, say, is not found here
    return bias is None or (type(bias) in _PARAMETERS and bias.shape == weight.shape[:1])


def plain_parameters(linear: nn.Module | None) -> Mapping[str, torch.Tensor | None] | None:
    """Weight and bias of a projection that `is_plain`, or None."""
    return linear._parameters if linear is not None and is_plain(linear) else None


def is_bare(module: nn.Module | None) -> bool:
    """Whether there is a module, and not `is_hooked`."""
    return module is not None and not is_hooked(module)


def parameters_at_a_glance(linear: nn.Module | None) -> Mapping[str, torch.Tensor | None] | None:
    """Weight and bias where, without gradients, `is_plain` holds, except for dtypes, devices and shapes; else None.

    Whether the forward of `nn.Linear` is its own is asked once a call, by `originals.are_own_at_a_glance`.

    It is asked at every call of an MLP in eager mode, so it touches as little as it can: those PyTorch compares, with
    the tensors of an earlier call.
    """
    if type(linear) is not LINEAR:
        return None
    own = linear.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or "_hf_hook" in own:
        return None
    parameters = own["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias", False)
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided or len(parameters) != 2:
        return None
    return parameters if bias is None or type(bias) is nn.Parameter else None


def is_left_alone(module: nn.Module | None) -> bool:
    """Whether, without gradients, a call of `module` certainly runs the forward that its class came with."""
    cls: Any = type(module)
    if (code := own_forwards.get(cls)) is None or getattr(cls.forward, "__code__", None) is not code:
        return False
    own = module.__dict__  # what follows is also in `parameters_at_a_glance`, where a call would cost as much
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or "_hf_hook" in own)


def is_column_shard(linear: nn.Module) -> bool:
    """Whether a call without gradients multiplies with this process's rows of the weight, and does nothing else.

    That is what tensor parallelism in Transformers makes of gate and up: weights that are a `DTensor`, and a forward
    on the instance that runs the class's own on the local tensors.
    """
    own = linear.__dict__.get("forward")
    if torch.compiler.is_compiling() or type(own) is not FunctionType or own.__closure__ is None:
        return False
    around = {name: cell.cell_contents for name, cell in zip(own.__code__.co_freevars, own.__closure__, strict=True)}
    style, original = around.get("self"), around.get("original_forward")
    return (
        class_path(type(style)) == "transformers.distributed.tensor_parallel.ColwiseParallel"
        and own.__module__ == type(style).__module__
        and style.use_local_output
        and (str(style.input_layouts), str(style.output_layouts)) == ("R", "S(-1)")
        and LINEAR is not None
        and getattr(original, "__func__", None) is LINEAR.forward
        and runs_own_forward(LINEAR)
        and original.__self__ is linear
        and type(linear) is LINEAR
        and linear._parameters.keys() == {"weight", "bias"}
        and all(p is None or _is_float_shard(p) for p in linear._parameters.values())
        and not _has_hooks(linear)
    )


def _is_float_shard(parameter: nn.Parameter) -> bool:
    local = getattr(parameter, "_local_tensor", None)
    placed = [str(placement) for placement in getattr(parameter, "placements", ())]
    return placed == ["S(0)"] and type(local) is torch.Tensor and local.dtype in _PLAIN_DTYPES and not local.is_meta


def local_tensors(linear: nn.Linear) -> Mapping[str, torch.Tensor | None]:
    """Weight and bias of a plain projection, or of a shard what this process has of them."""
    parameters = linear._parameters
    if type(parameters.get("weight")) is nn.Parameter:
        return parameters
    return {name: getattr(parameter, "_local_tensor", parameter) for name, parameter in parameters.items()}


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module does anything but run the forward that its class came with."""
    own, cls = module.__dict__, type(module)
    # what is usual is asked first, and without a call
    if ("forward" in own or "_hf_hook" in own) and (
        has_own_forward(module) or ("_hf_hook" in own and not _only_aligns(module))
    ):
        return True
    if torch.compiler.is_compiling():
        _ = module.forward  # so that compiled code notices when the instance is given another
    return not runs_own_forward(cls) or _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    # not asked in vain, since compiled code checks before each call that it still is what it was
    return torch.is_grad_enabled() and bool(module._backward_hooks or module._backward_pre_hooks)


def has_own_forward(module: nn.Module) -> bool:
    """Whether the instance shadows its class's forward with another.

    accelerate wraps the class's own, which it keeps, and leaves it behind when it lets go.
    """
    attributes = module.__dict__
    own = attributes.get("forward")
    if own is None:
        return False
    if "_hf_hook" in attributes:
        own = attributes.get("_old_forward")
    return getattr(own, "__func__", None) is not type(module).forward or own.__self__ is not module


def _only_aligns(linear: nn.Module) -> bool:
    """Whether accelerate's hook only moves inputs to where the weight is, as `device_map` has it for every module."""
    hook, weight = linear.__dict__["_hf_hook"], linear._parameters.get("weight")
    return (
        class_path(type(hook)) == "accelerate.hooks.AlignDevicesHook"
        and not hook.offload
        and not hook.no_grad
        and hook.execution_device is not None
        and weight is not None
        and torch.device(hook.execution_device) == weight.device
    )


def why_not_plain(linear: nn.Module) -> str:
    """The words for what `is_plain` has found."""
    if not _is_linear(type(linear)):
        return (
            f"is {class_path(type(linear))}, expected nn.Linear; load without quantization_config, "
            "merge or unload the adapter, or pass exclude=[...]"
        )
    weight = linear._parameters.get("weight")
    if type(weight) not in _PARAMETERS:
        return (
            f"holds a {type(weight).__name__} as weight, expected nn.Parameter; load without quantization or sharding"
        )
    if weight.is_meta:
        return "has its weight on meta (offloaded, or not loaded yet); load with a device_map that keeps it in memory"
    if weight.dtype not in _PLAIN_DTYPES:
        return (
            f"has a weight of {weight.dtype}, expected a float of at least two bytes; load without quantization_config"
        )
    if weight.dim() != 2:
        return (
            f"has a weight of shape {list(weight.shape)}, expected a matrix; if it is the placeholder of a weight "
            "that is elsewhere, as DeepSpeed ZeRO-3 leaves one, fuse before the weights are partitioned, or pass "
            "exclude=[...]"
        )
    if weight.layout is not torch.strided or not _has_plain_bias(linear._parameters, weight):
        return "has a sparse weight, or a bias that is not an nn.Parameter of one value for each row; replace them"
    if is_hooked(linear):
        return (
            "has hooks or a forward of its own (accelerate's offload among them); remove them, or pass exclude=[...]"
        )
    extra = linear._parameters.keys() - {"weight", "bias"}
    return f"carries {', '.join(extra)} besides weight and bias; load without quantization, or pass exclude=[...]"


def is_loaded(projection: nn.Module) -> bool:
    """Whether a call will find weights: they are in memory, or a hook (accelerate's, DeepSpeed's) fetches them."""
    fetched = "_hf_hook" in projection.__dict__ or bool(projection._forward_pre_hooks)
    return fetched or not any(tensor.is_meta or tensor.numel() == 0 for tensor in projection.parameters())


def device_of(module: nn.Module) -> torch.device:
    """Where the next call of `module` will run, as far as its parameters tell."""
    hook = module.__dict__.get("_hf_hook")  # accelerate's; the weights may be elsewhere until they are called
    device = getattr(hook, "execution_device", None)
    if device is None:
        device = next((parameter.device for parameter in module.parameters()), "cpu")
    return torch.device(device)
