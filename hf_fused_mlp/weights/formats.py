"""The storage formats of a projection: its matrix as a value, or the reason why the layer must be called.

A format is a row of `FORMATS`. The class alone does not tell: quantizers keep `nn.Linear` and change what is
inside; adapters, hooks and parallelism wrap the layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from hf_fused_mlp.calls import class_path, has_hooks, has_own_forward, is_hooked, is_wrapped, only_aligns
from hf_fused_mlp.originals import LINEAR, addmm_is_own, runs_own_forward
from hf_fused_mlp.types import FLOATS, SCALE_BLOCK, Matrix, has_block_scales
from hf_fused_mlp.weights.blocks import are_blocks, why_not_blocks

# while torch.export traces, fake tensors stand for the parameters
_PARAMETERS = frozenset((nn.Parameter, FakeTensor))
_NN_LINEAR = "torch.nn.modules.linear.Linear"
_LINEARS = {_NN_LINEAR, "transformers.models.falcon.modeling_falcon.FalconLinear"}
_FP8_LINEAR = "transformers.integrations.finegrained_fp8.FP8Linear"
_CONV1D = "transformers.pytorch_utils.Conv1D"


@dataclass(frozen=True)
class Format:
    """A storage format, one row of `FORMATS`.

    Args:
        classes: the layers that may be read, as `package.module.Class`.
        read: the matrix of such a layer, whose call multiplies with it, adds its bias and does nothing else; None if
            the call may do more, as hooks do. Traced by compiled code.
        why_not: why `read` returns None, with the remedy; None if the format is not the cause.
        glance: fast form of `read` for eager calls without gradients, as `glance` is for `nn.Linear`.
    """

    classes: frozenset[str]
    read: Callable[[nn.Module], Matrix | None]
    why_not: Callable[[nn.Module], str | None] = lambda linear: None
    glance: Callable[[nn.Module], Matrix | None] | None = None


def described(linear: nn.Module | None) -> Matrix | None:
    """The matrix of a projection in any format, also on meta or with a scale; None if it must be called."""
    if linear is not None:
        for reader in _READERS:
            if (matrix := reader(linear)) is not None:
                return matrix
    return None


def read(linear: nn.Module | None) -> Matrix | None:
    """The matrix of a projection for the kernels; None if the layer must be called, or there is none. Traced."""
    matrix = described(linear)
    return matrix if matrix is not None and _is_for_kernels(matrix) else None


def _is_for_kernels(matrix: Matrix) -> bool:
    data, scale, _ = matrix
    return not data.is_meta and (scale is None or has_block_scales(data, scale))


def glance(linear: nn.Module | None) -> tuple[Tensor, None, Tensor | None] | Matrix | None:
    """Fast form of `read` for eager calls without gradients. None may also mean "use `read`".

    Skips dtypes, devices and shapes, which the launch cache compares, and the forward of `nn.Linear`, which
    `originals.are_own_at_a_glance` checks once per call. Returns a bare tuple: a `Matrix` takes longer to make.
    """
    if type(linear) is not LINEAR:
        row = None if linear is None else _other_format(type(linear))
        matrix = None if row is None or row.glance is None else row.glance(linear)  # type: ignore[arg-type]
        return matrix if matrix is not None and _is_for_kernels(matrix) else None
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


def may_be_read(linear: nn.Module | None) -> bool:
    """Fast pre-check of `read`: False if the layer certainly must be called."""
    cls: Any = type(linear)
    return cls is LINEAR or _other_format(cls) is not None


def _other_format(cls: type) -> Format | None:
    """The first format of a class other than `nn.Linear`. A name costs less than a path, and most have no format."""
    rows = _OTHERS.get(cls.__name__)
    return None if rows is None else rows.get(class_path(cls))


def read_plain(linear: nn.Module) -> Matrix | None:
    """Format 1: an `nn.Linear` with a float weight, and nothing around or beside it."""
    cls = type(linear)
    if cls is not LINEAR and class_path(cls) not in _LINEARS:
        return None
    parameters = linear._parameters
    weight: Any = parameters.get("weight")
    is_plain = (
        type(weight) in _PARAMETERS
        and weight.dtype in FLOATS
        and weight.layout is torch.strided
        and weight.dim() == 2
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
    """The values that `read_column_shard` found in the closure of a forward, none of which refers to the layer."""
    contents = [cell.cell_contents for cell in forward.__closure__ or ()]
    originals = [getattr(content, "__func__", None) for content in contents]
    styles = [content for content in contents if hasattr(content, "use_local_output")]
    return originals + [(style.use_local_output, style.input_layouts, style.output_layouts) for style in styles]


def is_fp8_linear(linear: nn.Module) -> bool:
    """True for Transformers' `FP8Linear`, fused or not: a fused form has its class's name."""
    return class_path(type(linear)) == _FP8_LINEAR


def read_fp8(linear: nn.Module) -> Matrix | None:
    """Format 3: FP8 with a scale for each block. A call quantizes its input too, which the kernels need not do."""
    if not is_fp8_linear(linear) or is_wrapped(linear) or not runs_own_forward(_original_class(linear)):
        return None
    if torch.compiler.is_compiling():
        _ = linear.forward  # guards against a forward that is put on the instance later
    return fp8_matrix(linear)


def _original_class(linear: nn.Module) -> type[nn.Module]:
    cls: Any = type(linear)
    return getattr(cls, "original_class", cls)


def fp8_matrix(linear: nn.Module) -> Matrix | None:
    """The matrix of an `FP8Linear`, regardless of hooks; None if it has other scales, or holds anything else.

    Transformers keeps weights whose sizes are not whole blocks in floats, and multiplies with these.
    """
    own = linear.__dict__
    parameters, block_size = own["_parameters"], own["block_size"]
    weight, scale = parameters.get("weight"), parameters.get("weight_scale_inv")
    if type(weight) in _PARAMETERS and weight.dtype in FLOATS and weight.layout is torch.strided:
        return Matrix(weight, None, parameters["bias"]) if _has_plain_bias(parameters, weight) else None
    is_block_scaled = (
        type(weight) in _PARAMETERS
        and type(scale) in _PARAMETERS
        and weight.layout is scale.layout is torch.strided
        and weight.dim() == 2
        and has_block_scales(weight, scale)
        and are_blocks(block_size)
        and parameters.get("activation_scale", False) is None
        and _has_plain_bias(parameters, weight)
        and len(parameters) == 4
    )
    return Matrix(weight, scale, parameters["bias"]) if is_block_scaled else None


def _glance_at_fp8(linear: nn.Module) -> Matrix | None:
    own: Any = linear.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or "_hf_hook" in own:
        return read_fp8(linear)
    return fp8_matrix(linear) if runs_own_forward(_original_class(linear)) else None


def why_not_fp8(linear: nn.Module) -> str | None:
    """Why `fp8_matrix` is None or without data, with the remedy; None if the format is not the cause."""
    parameters: Any = linear._parameters
    weight, scale = parameters.get("weight"), parameters.get("weight_scale_inv")
    is_static = parameters.get("activation_scale") is not None
    if reason := why_not_blocks(weight, scale, linear.__dict__["block_size"], is_static):
        return reason
    if weight is not None and weight.is_meta:
        return "has its weight on meta (offloaded, or not loaded yet); load with a device_map that keeps it in memory"
    if fp8_matrix(linear) is None:
        return "holds something else than an FP8 weight, its scales and a bias; load it without sharding"
    return None


def read_conv1d(linear: nn.Module) -> Matrix | None:
    """Format 4: Transformers' `Conv1D`, whose weight is `[K, N]`: a view of it, so that nothing is moved."""
    if class_path(type(linear)) != _CONV1D or is_hooked(linear) or not addmm_is_own():
        return None
    parameters = linear._parameters
    weight: Any = parameters.get("weight")
    bias: Any = parameters.get("bias")
    is_plain = (
        type(weight) in _PARAMETERS
        and type(bias) in _PARAMETERS
        and weight.dtype in FLOATS
        and weight.layout is torch.strided
        and weight.dim() == 2
        and bias.shape == weight.shape[1:] == (linear.nf,)
        and len(parameters) == 2
    )
    return Matrix(weight.t(), None, bias) if is_plain else None


def is_partial(linear: nn.Module) -> bool:
    """True if `read` gives this process's rows only, so that nothing after the activation may be read."""
    return hasattr(linear._parameters.get("weight"), "_local_tensor")


def can_be_halved(matrix: tuple) -> bool:
    """False if the two halves of a packed projection share scales, or a bias has no half for each."""
    data, scale, bias = matrix
    return (scale is None or data.shape[0] % (2 * SCALE_BLOCK) == 0) and (bias is None or bias.shape == data.shape[:1])


def halves(matrix: tuple, first: int, second: int) -> tuple[tuple, tuple]:
    """The two matrices of a packed projection as bare tuples, in the order of the given indices."""
    data, scale, bias = matrix
    both = data.chunk(2)
    scales = (None, None) if scale is None else scale.chunk(2)
    biases = (None, None) if bias is None else bias.chunk(2)
    return (both[first], scales[first], biases[first]), (both[second], scales[second], biases[second])


def is_loaded(projection: nn.Module) -> bool:
    """True if a call will find weights: they are in memory, or a hook (accelerate's, DeepSpeed's) fetches them."""
    fetched = "_hf_hook" in projection.__dict__ or bool(projection._forward_pre_hooks)
    return fetched or not any(tensor.is_meta or tensor.numel() == 0 for tensor in projection.parameters())


def why_called(linear: nn.Module) -> str:
    """Why a projection must be called, with the remedy, if `read` gives None."""
    path = class_path(type(linear))
    rows = [row for row in FORMATS if path in row.classes]
    matrix = described(linear)
    if matrix is not None and matrix.scale is not None and not has_block_scales(matrix.data, matrix.scale):
        return f"is {path}, whose scales no kernel takes yet; load without quantization_config, or pass exclude=[...]"
    for row in rows:
        if reason := row.why_not(linear):
            return reason
    if rows and is_hooked(linear):
        return "has hooks or a replaced forward (accelerate's offload among them); remove them, or pass exclude=[...]"
    return (
        f"is {path}, expected nn.Linear; load without quantization_config, "
        "merge or unload the adapter, or pass exclude=[...]"
    )


def _why_not_conv1d(linear: nn.Module) -> str | None:
    return _why_not_plain(linear, transposed=True)


def _why_not_plain(linear: nn.Module, transposed: bool = False) -> str | None:
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
    rows = weight.t() if transposed else weight
    if weight.layout is not torch.strided or not _has_plain_bias(linear._parameters, rows):
        return "has a sparse weight, or a bias that is not an nn.Parameter of one value for each row; replace them"
    if extra := linear._parameters.keys() - {"weight", "bias"}:
        return f"carries {', '.join(extra)} besides weight and bias; load without quantization, or pass exclude=[...]"
    return None


FORMATS: tuple[Format, ...] = (
    Format(frozenset(_LINEARS), read_plain, _why_not_plain),
    Format(frozenset({_NN_LINEAR}), read_column_shard),
    Format(frozenset({_FP8_LINEAR}), read_fp8, why_not_fp8, _glance_at_fp8),
    Format(frozenset({_CONV1D}), read_conv1d, _why_not_conv1d, glance=read_conv1d),
)
_READERS = tuple(row.read for row in FORMATS)


def _by_name(formats: tuple[Format, ...]) -> dict[str, dict[str, Format]]:
    """The formats of classes other than `nn.Linear`, by the name of the class and then by its path."""
    rows: dict[str, dict[str, Format]] = {}
    for row in formats:
        for path in row.classes - {_NN_LINEAR}:
            rows.setdefault(path.rpartition(".")[2], {}).setdefault(path, row)
    return rows


_OTHERS = _by_name(FORMATS)
