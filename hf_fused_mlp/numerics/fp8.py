"""What FP8 layers are compared with: Transformers' arithmetic and float64, both without its kernels from the Hub."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_fused_mlp.reference import dequantize, fp8_linear_ref
from hf_fused_mlp.weights.formats import fp8_matrix, is_fp8_linear


def fp8_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The `FP8Linear`s in `module` whose scales are known, by name."""
    layers = {name: layer for name, layer in module.named_modules() if is_fp8_linear(layer)}
    matrices = {name: fp8_matrix(layer) for name, layer in layers.items()}
    return {name: layers[name] for name, matrix in matrices.items() if matrix is not None and matrix.scale is not None}


@contextmanager
def fp8_by_reference(module: nn.Module) -> Iterator[None]:
    """Gives the `FP8Linear`s in `module`, meanwhile, a forward of PyTorch's operations that computes the same."""
    layers = list(fp8_layers(module).values())
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.__dict__["forward"] = partial(_forward, layer)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = forward


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    matrix: Any = fp8_matrix(layer)
    return fp8_linear_ref(x, matrix)


def dequantized(module: nn.Module) -> nn.Module:
    """A copy of `module` whose FP8 layers are `nn.Linear`s of the numbers that they stand for, in float64.

    All else is shared, not copied.
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
