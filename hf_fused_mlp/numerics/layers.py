"""Compares each fused module to a float64 copy of its original, on the tokens that the model passes to it."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from hf_fused_mlp import modes
from hf_fused_mlp.launch_cache import left_alone
from hf_fused_mlp.numerics.fp8 import (
    dequantized,
    fp8_by_reference,
    fp8_experts_output,
    fp8_layers,
    is_fp8_experts,
)
from hf_fused_mlp.numerics.report import LayerNumerics, severity
from hf_fused_mlp.swap import Fused, original_form
from hf_fused_mlp.validation import Errors, excess, mismatch, rms

SMALL_CALLS = (1, 16)  # token counts, for which other kernels run than for a whole text


def judge_calls(name: str, module: Fused, twin: nn.Module, layers: dict[str, LayerNumerics]) -> Callable:
    """A forward hook that judges each call of the module `name` and keeps the worst one in `layers`.

    `twin` provides the original forward and the weights. It is the module itself, or that of another model, whose
    weights have to be bit-identical, because a small change of a weight would look like rounding.
    """
    changed = _changed_weights(twin, module)

    def hook(module, args, kwargs, output):
        if (inputs := module.call_inputs(args, kwargs)) is None:
            return
        if inputs[0].dim() == 1:
            inputs, output = tuple(tensor[None] for tensor in inputs), output[None]
        if inputs[0].numel():
            found = _judge(name, module, twin, inputs, output)
            if changed:
                found = replace(found, failure=f"{found.failure}; {changed}" if found.failure else changed)
            layers[name] = max(layers.get(name, found), found, key=severity)

    return hook


def _judge(name: str, module: Fused, twin: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> LayerNumerics:
    """Judges `output`, which `module` returned for `inputs`, each `[..., N]`, and outputs for a few of the tokens."""
    path, remark = _path(module, inputs[0])
    answer = module.by_operator if path == "operator" else module.forward
    tokens = inputs[0].shape[:-1].numel()
    calls = [(tokens, inputs, output)]
    # of a module that is left alone, eager calls run the original forward, and compiled code runs the operator
    if path == "operator" or (path == "fused" and id(module) in left_alone):
        calls.append((tokens, inputs, module.by_operator(*inputs)))
    if path != "original forward":
        few = tuple(map(_first_tokens, inputs))
        calls += [(m, few, _in_parts(answer, m, few)) for m in SMALL_CALLS]
    layer = LayerNumerics(name, module.original_class.__name__, path, remark, tokens, "float64", None, None, None)
    try:
        oracle, precision = _oracle(module, twin, inputs)
    except Exception as error:  # a quantizer or adapter may raise anything
        return replace(layer, oracle="none", failure=f"cannot be judged: {type(error).__name__}: {error}")
    layer = replace(layer, oracle=precision)
    judged, quantized = [], is_fp8_experts(twin) or bool(fp8_layers(twin))
    for m, given, got in calls:
        eager = _in_parts(partial(_original, twin), m, given)
        judged.append(replace(layer, tokens=m, **_verdict(got, eager, oracle, quantized)))
    return max(judged, key=severity)


def _first_tokens(tensor: Tensor) -> Tensor:
    """A few of the tokens of one input `[..., N]`, with as many dimensions."""
    return tensor.flatten(0, -2)[: max(SMALL_CALLS)].view(*(1,) * (tensor.dim() - 2), -1, tensor.shape[-1])


def _in_parts(answer: Callable[..., Tensor], m: int, inputs: tuple[Tensor, ...]) -> Tensor:
    """The outputs for `inputs`, computed for `m` tokens at a time."""
    parts = zip(*(tensor.split(m, -2) for tensor in inputs), strict=True)
    return torch.cat([answer(*part) for part in parts], -2)


def _changed_weights(twin: nn.Module, module: Fused) -> str | None:
    """Names the first parameter of `module` that differs from `twin`'s, or None; compares only parameters of both."""
    theirs = {} if twin is module else dict(twin.named_parameters())
    for name, parameter in module.named_parameters():
        other = theirs.get(name)
        if not type(parameter) is type(other) is nn.Parameter or parameter.is_meta or other.is_meta:
            continue
        if count := (parameter != other.to(parameter.device)).count_nonzero().item():
            return f"{name} differs from the reference's in {count} of {parameter.numel()} numbers"
    return None


def _path(module: Fused, x: Tensor) -> tuple[str, str | None]:
    """`LayerNumerics.path` and `remark` of a call with `x`."""
    original, called = module.runs(x.device, x.numel())
    if original is None:
        return ("fused", None) if called is None else ("partly fused", called)
    only_the_device = called is None and original == modes.no_kernels(x.device, x.dtype)
    return ("operator" if only_the_device else "original forward"), original


def _original(twin: nn.Module, *inputs: Tensor) -> Tensor:
    """The output of the original forward of `twin`, fused or not, for `inputs`."""
    place = next((p.device for p in twin.parameters() if not p.is_meta), inputs[0].device)
    moved = (tensor.to(place) for tensor in inputs)
    if is_fp8_experts(twin):
        return fp8_experts_output(twin, *moved)
    with fp8_by_reference(twin):
        return twin.original_output(*moved) if isinstance(twin, Fused) else twin.forward(*moved)


def _oracle(module: Fused, twin: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, str]:
    """The original forward in float64, `[M, O]`; if weights cannot be cast, in fp32 with unchanged projections."""
    if is_fp8_experts(twin):
        return fp8_experts_output(twin, *_cast(inputs, torch.float64), exact=True).flatten(0, -2), "float64"
    if fp8_layers(twin):
        with original_form([twin] if isinstance(twin, Fused) else []):
            twin = dequantized(twin)
    if reason := _why_not_cast(twin):
        return _original(twin, *_cast(inputs, torch.float32)).flatten(0, -2), f"float32 ({reason})"
    # MPS has no float64
    place = "cpu" if inputs[0].device.type == "mps" else inputs[0].device
    doubled = {id(p): nn.Parameter(p.to(place).double(), requires_grad=False) for p in twin.parameters()}
    with original_form([twin] if isinstance(twin, Fused) else []):
        exact = copy.deepcopy(twin, doubled).to(place).double()
    moved = (tensor.to(place) for tensor in inputs)
    return module.exact_output(exact, *_cast(moved, torch.float64)).flatten(0, -2), "float64"


def _cast(inputs: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`inputs`, with floats cast to `dtype` and integers unchanged."""
    return [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs]


def _why_not_cast(twin: nn.Module) -> str | None:
    for name, tensor in chain(twin.named_parameters(), twin.named_buffers()):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"{name} is a {type(tensor).__name__}"
        if tensor.is_meta or not tensor.is_floating_point() or tensor.itemsize < 2:
            return f"{name} is {'on meta' if tensor.is_meta else tensor.dtype}"
    return None


def _verdict(got: Tensor, eager: Tensor, oracle: Tensor, quantized: bool) -> dict[str, Any]:
    """The `original`, `fused` and `failure` of one call, each `[..., O]`; the oracle `[M, O]` may have more tokens."""
    got, eager = (answer.flatten(0, -2).to(oracle.device) for answer in (got, eager))
    oracle = oracle[: len(got)]
    if failure := mismatch(got, eager, oracle):
        return {"failure": failure}
    unit = rms(oracle, -1)
    if not unit.any():
        return {"failure": "all outputs are zero, which decides nothing"}
    unit = unit.where(unit > 0, 1)
    scaled = oracle / unit
    fused, original = Errors.of(got / unit, scaled), Errors.of(eager / unit, scaled)
    if not math.isfinite(original.largest):
        return {"failure": f"the original's own outputs are not finite in {eager.dtype}; load in another dtype"}
    half_a_place = torch.finfo(eager.dtype).eps / 2 * scaled.abs().max().item()
    allowed = replace(original, largest=max(original.largest, half_a_place))
    return {"original": original, "fused": fused, "failure": excess(fused, allowed, eager.dtype, quantized)}
