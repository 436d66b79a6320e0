"""References for FP8 layers: Transformers' arithmetic and float64, without its kernels from the Hub."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fused_mlp.reading.experts import multiplies_by_scales, original_of
from hf_fused_mlp.reference import dequantize, fp8_linear_ref
from hf_fused_mlp.types import Matrix
from hf_fused_mlp.weights.formats import fp8_matrix, is_fp8_linear


def fp8_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The `FP8Linear`s in `module` whose scales are known, by name."""
    layers = {name: layer for name, layer in module.named_modules() if is_fp8_linear(layer)}
    matrices = {name: fp8_matrix(layer) for name, layer in layers.items()}
    return {name: layers[name] for name, matrix in matrices.items() if matrix is not None and matrix.scale is not None}


def is_fp8_experts(module: nn.Module) -> bool:
    """True for routed experts of an FP8 checkpoint, fused or not."""
    return multiplies_by_scales(type(module))


@contextmanager
def fp8_by_reference(module: nn.Module) -> Iterator[None]:
    """A context in which FP8 layers and experts in `module` compute the same with PyTorch's operations."""
    layers = [(layer, _forward) for layer in fp8_layers(module).values()]
    experts = [(part, fp8_experts_output) for part in module.modules() if is_fp8_experts(part)]
    with ExitStack() as stack:
        for part, forward in layers + experts:
            stack.enter_context(_on_the_instance(part, "forward", partial(forward, part)))
        yield


@contextmanager
def _on_the_instance(module: nn.Module, name: str, function: Callable) -> Iterator[None]:
    """A context in which `module` has another method on the instance."""
    own = module.__dict__
    before = own.get(name)
    own[name] = function
    try:
        yield
    finally:
        if before is None:
            own.pop(name, None)
        else:
            own[name] = before


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    matrix: Any = fp8_matrix(layer)
    return fp8_linear_ref(x, matrix)


def fp8_experts_output(experts: nn.Module, *inputs: Tensor, exact: bool = False) -> Tensor:
    """The output of the loop of `FP8Experts`, in Transformers' arithmetic or, if `exact`, in the dtype of `inputs`."""
    cls: Any = getattr(type(experts), "original_class", type(experts))
    with _on_the_instance(experts, "linear", _exact_product if exact else _product):
        return original_of(cls.forward)(experts, *inputs)  # type: ignore[misc]


def _product(x: Tensor, weight: Tensor, scale: Tensor, activation_scale: None) -> Tensor:
    return F.linear(x, weight) if weight.itemsize > 1 else fp8_linear_ref(x, Matrix(weight, scale, None))


def _exact_product(x: Tensor, weight: Tensor, scale: Tensor, activation_scale: None) -> Tensor:
    return F.linear(x, weight.to(x.dtype) if weight.itemsize > 1 else dequantize(weight, scale, x.dtype))


def dequantized(module: nn.Module) -> nn.Module:
    """A copy of `module` with dequantized `nn.Linear`s in float64 in place of its FP8 layers.

    Everything else is shared, not copied.
    """
    exact = copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
    for name, layer in fp8_layers(exact).items():
        data, scale, bias = fp8_matrix(layer)  # type: ignore[misc]
        linear = nn.Linear(data.shape[1], data.shape[0], bias=bias is not None, device="meta")
        weight = dequantize(data, scale, torch.float64)  # type: ignore[arg-type]
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = bias  # type: ignore[assignment]
        exact.set_submodule(name, linear)
    return exact
