"""The storage formats of a projection: its matrix as a value, or the reason why the layer must be called.

A format is a function in `READERS`. The class alone does not tell: quantizers keep `nn.Linear` and change what is
inside; adapters, hooks and parallelism wrap the layer.
"""

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from hf_fused_mlp.calls import class_path, has_hooks, has_own_forward, is_hooked, only_aligns
from hf_fused_mlp.originals import LINEAR, runs_own_forward
from hf_fused_mlp.types import Matrix

FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
# while torch.export traces, fake tensors stand for the parameters
_PARAMETERS = frozenset((nn.Parameter, FakeTensor))
_LINEARS = {"torch.nn.modules.linear.Linear", "transformers.models.falcon.modeling_falcon.FalconLinear"}
_OTHER_NAMES = {path.rpartition(".")[2] for path in _LINEARS} - {"Linear"}


def read(linear: nn.Module | None) -> Matrix | None:
    """The matrix of a projection in any format; None if the layer must be called, or there is none. Traced."""
    if linear is not None:
        for reader in READERS:
            if (matrix := reader(linear)) is not None:
                return matrix
    return None


def glance(linear: nn.Module | None) -> tuple[Tensor, None, Tensor | None] | Matrix | None:
    """Fast form of `read` for eager calls without gradients. None may also mean "use `read`".

    Skips dtypes, devices and shapes, which the launch cache compares, and the forward of `nn.Linear`, which
    `originals.are_own_at_a_glance` checks once a call. Returns a bare tuple: a `Matrix` takes longer to make.
    """
    if type(linear) is not LINEAR:
        return None
    own = linear.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return None
    if "forward" in own or "_hf_hook" in own:
        if "_hf_hook" not in own:
            return _glance_at_shard(linear, own["forward"])
        if has_own_forward(linear) or not only_aligns(linear):
            return None
    parameters = own["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias", False)
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided or len(parameters) != 2:
        return None
    return (weight, None, bias) if bias is None or type(bias) is nn.Parameter else None


def is_linear(cls: type[nn.Module]) -> bool:
    """True if a class multiplies with its weight and adds its bias, and so may be read if nothing is changed in it."""
    return cls is LINEAR or class_path(cls) in _LINEARS


def may_be_read(linear: nn.Module | None) -> bool:
    """Fast pre-check of `read`: False if the layer certainly must be called."""
    cls: Any = type(linear)
    return cls is LINEAR or (cls.__name__ in _OTHER_NAMES and is_linear(cls))


def read_plain(linear: nn.Module) -> Matrix | None:
    """Format 1: an `nn.Linear` with a float weight, and nothing around or beside it."""
    cls = type(linear)
    if not is_linear(cls):
        return None
    parameters = linear._parameters
    weight: Any = parameters.get("weight")
    is_plain = (
        type(weight) in _PARAMETERS
        and weight.dtype in FLOATS
        and weight.layout is torch.strided
        and weight.dim() == 2
        and not weight.is_meta
        and _has_plain_bias(parameters, weight)
        and len(parameters) == 2
        and not is_hooked(linear)
    )
    return Matrix(weight, None, parameters["bias"]) if is_plain else None


def _has_plain_bias(parameters: Mapping[str, Tensor | None], weight: Tensor) -> bool:
    bias: Any = parameters.get("bias", False)  # False if it is a buffer, for example
    return bias is None or (type(bias) in _PARAMETERS and bias.shape == weight.shape[:1])


def read_column_shard(linear: nn.Module) -> Matrix | None:
    """Format 2: this process's rows of a tensor-parallel weight, if a call multiplies with them and does nothing else.

    Only where no gradient is needed. Transformers puts a forward on the instance that runs the class's own forward on
    the local tensors of the `DTensor` parameters.
    """
    own = linear.__dict__.get("forward")
    if torch.compiler.is_compiling() or type(own) is not FunctionType or own.__closure__ is None:
        return None
    around = {name: cell.cell_contents for name, cell in zip(own.__code__.co_freevars, own.__closure__, strict=True)}
    style, original = around.get("self"), around.get("original_forward")
    parameters = linear._parameters
    is_shard = (
        class_path(type(style)) == "transformers.distributed.tensor_parallel.ColwiseParallel"
        and own.__module__ == type(style).__module__
        and style.use_local_output
        and (str(style.input_layouts), str(style.output_layouts)) == ("R", "S(-1)")
        and LINEAR is not None
        and getattr(original, "__func__", None) is LINEAR.forward
        and runs_own_forward(LINEAR)
        and original.__self__ is linear
        and type(linear) is LINEAR
        and parameters.keys() == {"weight", "bias"}
        and all(parameter is None or _is_float_shard(parameter) for parameter in parameters.values())
        and not has_hooks(linear)
    )
    if not is_shard:
        return None
    weight, bias = (getattr(parameters[name], "_local_tensor", None) for name in ("weight", "bias"))
    return Matrix(weight, None, bias)  # type: ignore[arg-type]


def _is_float_shard(parameter: nn.Parameter) -> bool:
    local = getattr(parameter, "_local_tensor", None)
    placed = [str(placement) for placement in getattr(parameter, "placements", ())]
    return placed == ["S(0)"] and type(local) is Tensor and local.dtype in FLOATS and not local.is_meta


# shards that were read, by the forward on the instance: weight and bias, and the facts that the reading rests on
_shards: WeakKeyDictionary[FunctionType, tuple[list[ReferenceType], list]] = WeakKeyDictionary()


def _glance_at_shard(linear: nn.Module, forward: Any) -> tuple[Tensor, None, Tensor | None] | None:
    """Fast form of `read_column_shard`: repeats it only if something that it rests on was replaced since."""
    parameters: Any = linear._parameters
    if type(forward) is not FunctionType or parameters.keys() != {"weight", "bias"}:
        return None
    held = [tensor for tensor in parameters.values() if tensor is not None]
    references, facts = _shards.get(forward, ([], []))
    are_same = len(references) == len(held) and all(one() is other for one, other in zip(references, held))  # noqa: B905
    if not are_same or facts != _facts(forward):
        if read_column_shard(linear) is None:
            return None
        _shards[forward] = [ref(tensor) for tensor in held], _facts(forward)
    weight, bias = parameters["weight"], parameters["bias"]
    return weight._local_tensor, None, None if bias is None else bias._local_tensor


def _facts(forward: FunctionType) -> list:
    """What `read_column_shard` found in the closure of a forward, without anything that refers to the layer."""
    contents = [cell.cell_contents for cell in forward.__closure__ or ()]
    originals = [getattr(content, "__func__", None) for content in contents]
    styles = [content for content in contents if hasattr(content, "use_local_output")]
    return originals + [(style.use_local_output, style.input_layouts, style.output_layouts) for style in styles]


READERS: tuple[Callable[[nn.Module], Matrix | None], ...] = (read_plain, read_column_shard)


def is_partial(linear: nn.Module) -> bool:
    """True if `read` gives this process's rows only, so that nothing after the activation may be read."""
    return hasattr(linear._parameters.get("weight"), "_local_tensor")


def halves(matrix: tuple, first: int, second: int) -> tuple[tuple, tuple]:
    """The two matrices, as bare tuples, that a packed projection holds, in the order of the given indices."""
    data, _, bias = matrix
    both = data.chunk(2)
    if bias is None:
        return (both[first], None, None), (both[second], None, None)
    biases = bias.chunk(2)
    return (both[first], None, biases[first]), (both[second], None, biases[second])


def is_loaded(projection: nn.Module) -> bool:
    """True if a call will find weights: they are in memory, or a hook (accelerate's, DeepSpeed's) fetches them."""
    fetched = "_hf_hook" in projection.__dict__ or bool(projection._forward_pre_hooks)
    return fetched or not any(tensor.is_meta or tensor.numel() == 0 for tensor in projection.parameters())


def why_called(linear: nn.Module) -> str:
    """Why a projection must be called, with the remedy, if `read_plain` gives None."""
    if not is_linear(type(linear)):
        return (
            f"is {class_path(type(linear))}, expected nn.Linear; load without quantization_config, "
            "merge or unload the adapter, or pass exclude=[...]"
        )
    weight: Any = linear._parameters.get("weight")
    if type(weight) not in _PARAMETERS:
        return (
            f"holds a {type(weight).__name__} as weight, expected nn.Parameter; load without quantization or sharding"
        )
    if weight.is_meta:
        return "has its weight on meta (offloaded, or not loaded yet); load with a device_map that keeps it in memory"
    if weight.dtype not in FLOATS:
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
