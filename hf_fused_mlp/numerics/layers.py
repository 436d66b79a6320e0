"""Each fused MLP against a float64 copy of its original, on the tokens that the model hands it."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from hf_fused_mlp import modes
from hf_fused_mlp.numerics.report import LayerNumerics, severity
from hf_fused_mlp.swap import Fused, original_form
from hf_fused_mlp.validation import Errors, excess, mismatch, rms

SMALL_CALLS = (1, 16)  # tokens; other kernels serve them than a whole text


def judge_calls(name: str, module: Fused, twin: nn.Module, layers: dict[str, LayerNumerics]) -> Callable:
    """A forward hook that judges each call of the module `name` into `layers`, where the worst call stays.

    `twin` is the module whose original forward and whose weights count: the module itself, or another model's, whose
    weights have to be the same to the bit, since one that rounding hides is no rounding.
    """
    changed = _changed_weights(twin, module)

    def hook(module, args, kwargs, output):
        if (inputs := module.call_inputs(args, kwargs)) is None:
            return
        (x,) = inputs
        if x.dim() == 1:
            x, output = x[None], output[None]
        if x.numel():
            found = _judge(name, module, twin, x, output)
            if changed:
                found = replace(found, failure=f"{found.failure}; {changed}" if found.failure else changed)
            layers[name] = max(layers.get(name, found), found, key=severity)

    return hook


def _judge(name: str, module: Fused, twin: nn.Module, x: Tensor, output: Tensor) -> LayerNumerics:
    """`output`, the answer of `module` to `x` `[..., H]`, and its answers to a few of the tokens."""
    path, remark = _path(module, x)
    answer = module.by_operator if path == "operator" else module.forward
    tokens = x.shape[:-1].numel()
    calls = [(tokens, x, output)]
    if path == "operator":
        calls.append((tokens, x, answer(x)))
    if path != "original forward":
        few = x.flatten(0, -2)[: max(SMALL_CALLS)].view(*(1,) * (x.dim() - 2), -1, x.shape[-1])
        calls += [(m, few, torch.cat([answer(part) for part in few.split(m, -2)], -2)) for m in SMALL_CALLS]
    layer = LayerNumerics(name, module.original_class.__name__, path, remark, tokens, "float64", None, None, None)
    try:
        oracle, precision = _oracle(twin, x)
    except Exception as error:  # of whatever a quantizer or adapter calls
        return replace(layer, oracle="none", failure=f"cannot be judged: {type(error).__name__}: {error}")
    layer = replace(layer, oracle=precision)
    judged = []
    for m, given, got in calls:
        eager = torch.cat([_original(twin, part) for part in given.split(m, -2)], -2)
        judged.append(replace(layer, tokens=m, **_verdict(got, eager, oracle)))
    return max(judged, key=severity)


def _changed_weights(twin: nn.Module, module: Fused) -> str | None:
    """The first parameter of `module` that is not what it is in `twin`; what only one of them has is not compared."""
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
    only_the_device = called is None and original == modes.no_kernels(x.device)
    return ("operator" if only_the_device else "original forward"), original


def _original(twin: nn.Module, x: Tensor) -> Tensor:
    """What the original forward of `twin`, fused or not, makes of `x`."""
    place = next((p.device for p in twin.parameters() if not p.is_meta), x.device)
    if isinstance(twin, Fused):
        return twin.original_output(x.to(place))
    return twin.forward(x.to(place))


def _oracle(twin: nn.Module, x: Tensor) -> tuple[Tensor, str]:
    """The original forward in float64, `[M, O]`; in fp32, projections as they are, where weights cannot be cast."""
    if reason := _why_not_cast(twin):
        return _original(twin, x.float()).flatten(0, -2), f"float32 ({reason})"
    # MPS has no float64
    place = "cpu" if x.device.type == "mps" else x.device
    doubled = {id(p): nn.Parameter(p.to(place).double(), requires_grad=False) for p in twin.parameters()}
    with original_form([twin] if isinstance(twin, Fused) else []):
        exact = copy.deepcopy(twin, doubled).to(place).double()
    return type(exact).forward(exact, x.to(place).double()).flatten(0, -2), "float64"


def _why_not_cast(twin: nn.Module) -> str | None:
    for name, tensor in chain(twin.named_parameters(), twin.named_buffers()):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"{name} is a {type(tensor).__name__}"
        if tensor.is_meta or not tensor.is_floating_point() or tensor.itemsize < 2:
            return f"{name} is {'on meta' if tensor.is_meta else tensor.dtype}"
    return None


def _verdict(got: Tensor, eager: Tensor, oracle: Tensor) -> dict[str, Any]:
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
    return {"original": original, "fused": fused, "failure": excess(fused, allowed, eager.dtype)}
