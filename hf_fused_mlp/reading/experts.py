"""Finds the equation of routed experts, whose forward has to be a known loop, with Transformers' mark or without."""

import ast
import sys
from collections.abc import Callable
from math import inf
from types import CodeType, FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import nn

from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.calls import is_bare, runs_class_forward
from hf_fused_mlp.originals import is_own
from hf_fused_mlp.reading.activations import activation_at_a_glance, find_activation
from hf_fused_mlp.reading.expert_loops import GATES, LOOPS, OPTIONAL, Gate, Loop
from hf_fused_mlp.reading.expression import is_usual
from hf_fused_mlp.reading.source import Unreadable, meaning_of, source_of
from hf_fused_mlp.types import ExpertsForm

_MODULE = "transformers.integrations.moe"
_FP8_MODULE, _FP8_LINEAR = "transformers.integrations.finegrained_fp8", "FP8Experts.linear"
_FLAGS = "has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm"
_STACKS = "gate_up_proj", "up_proj", "down_proj"
# parameters and a child, which an attribute of the class would hide
_HELD = "act_fn", *(f"{name}{suffix}" for suffix in ("", "_bias", "_scale_inv") for name in _STACKS)
_SPELLINGS = {"nn.functional": "F", "torch.nn.functional": "F"}
_MEANINGS = {"torch": torch, "nn": nn, "F": F}
_NUMBERS = float, int
# what `_apply_gate` multiplies gate by inside of its sigmoid
_SILU, _QUICK_GELU = 1.0, 1.702


class ExpertsSpec(NamedTuple):
    """What a module of routed experts computes, and the attributes on which that depends.

    Args:
        form: the form, without the values of `limit` and `alpha`.
        up, down, up_bias, down_bias, up_scale, down_scale: names of parameters; scales count if weights are in FP8.
        flags: attributes of the instance with the values that were read; if one changes, the equation does.
        limit, alpha: names of attributes that hold numbers, which are read in each call, or None.
        act_fn: whether the activation is the attribute `act_fn`, which is looked at again in each call.
        in_fp32: whether the loop computes in fp32 regardless of the dtype of its weights, as our kernels do not.
        clamps_last: whether gate is clamped after its activation; no kernel does that, so the limit must be infinite.
    """

    form: ExpertsForm
    up: str
    down: str
    up_bias: str | None
    down_bias: str | None
    flags: tuple[tuple[str, bool | None], ...]
    limit: str | None
    alpha: str | None
    act_fn: bool
    in_fp32: bool
    clamps_last: bool
    up_scale: str | None
    down_scale: str | None

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of all parameters but scales."""
        return tuple(filter(None, (self.up, self.down, self.up_bias, self.down_bias)))


def find_experts(module: nn.Module) -> ExpertsSpec | str | None:
    """What `module` computes, or why that is unknown; None if its class has neither the decorator nor a known loop."""
    own = module.__dict__
    flags = tuple((name, _flag(own.get(name))) for name in _FLAGS)
    without = tuple(name for name in OPTIONAL if own.get(name) is None)
    spec = hf_fused_mlp_experts_spec(type(module), flags, without, activation_of(module))
    if not isinstance(spec, ExpertsSpec):
        return spec
    if has_own_gate(module):
        return f"{type(module).__name__} has a gate on the instance, which cannot be read"
    # compiled code has no text for what it knows as a symbol, and looks at the numbers later
    if spec.limit is not None and not torch.compiler.is_compiling() and form_of(module, spec) is None:
        return _number_reason(module, spec)
    return spec


def _flag(value: Any) -> Any:
    return value if value is None or type(value) is bool else "neither"


def has_own_gate(module: nn.Module) -> bool:
    """True if `_apply_gate` of the instance is not that of its class."""
    if "_apply_gate" in module.__dict__:
        return True
    if torch.compiler.is_compiling():
        getattr(module, "_apply_gate", None)  # guards against one that is put there later
    return False


def form_of(module: nn.Module, spec: ExpertsSpec) -> ExpertsForm | None:
    """`spec.form` with the limit and the factor of the instance; None if no kernel computes that."""
    form = spec.form
    if spec.limit is None:
        return form
    own = module.__dict__
    limit, activation = own.get(spec.limit), form.activation
    if type(limit) not in _NUMBERS or not limit > 0 or (spec.clamps_last and limit != inf):
        return None
    if spec.alpha is not None:
        alpha = own.get(spec.alpha)
        # compiled code may know the number as a symbol, which can be compared but not looked up
        if type(alpha) not in _NUMBERS:
            return None
        activation = "silu" if alpha == _SILU else "quick_gelu" if alpha == _QUICK_GELU else ""
        if not activation:
            return None
    return ExpertsForm(form.layout, form.gated, activation, 0.0 if limit == inf else float(limit), form.up_offset)


def _number_reason(module: nn.Module, spec: ExpertsSpec) -> str:
    own, name = module.__dict__, type(module).__name__
    limit, alpha = own.get(str(spec.limit)), own.get(str(spec.alpha))
    if type(limit) not in _NUMBERS or not limit > 0:
        return f"the limit of {name} is {limit!r}, expected a number above 0"
    if spec.clamps_last and limit != inf:
        return f"{name} clamps the output of its activation, which no kernel does"
    return f"alpha of {name} is {alpha!r}, expected {_SILU} or {_QUICK_GELU}"


class _Kept(NamedTuple):
    """The specs of a forward; its code and that of its loop tell whether they still hold. Refers to no class."""

    code: CodeType
    loop: ref[Any]
    loop_code: CodeType
    # by gate and what else decides: the gate's code and the spec
    specs: dict[tuple, tuple[CodeType | None, ExpertsSpec | str]]


# compiled code keeps the answer among the globals of the compiled module, under this name, so it must be unique
@torch.compiler.assume_constant_result
def hf_fused_mlp_experts_spec(
    cls: Any, flags: tuple, without: tuple, activation: str | None
) -> ExpertsSpec | str | None:
    """The same, of a class whose instance has these flags and this activation, whatever its numbers.

    Args:
        without: those of `OPTIONAL` that the instance has not.
    """
    forward, gate = cls.forward, getattr(cls, "_apply_gate", None)
    if type(forward) is not FunctionType:
        return None
    kept = _specs.get(forward)
    if kept is None or kept.code is not forward.__code__ or kept.loop_code is not getattr(kept.loop(), "__code__", 0):
        loop = original_of(forward)
        if loop is None and _loops_of(forward):
            loop = forward  # a class without the decorator
        if type(loop) is not FunctionType:
            return None
        kept = _specs[forward] = _Kept(forward.__code__, ref(loop), loop.__code__, {})
    gate, code = (gate, gate.__code__) if type(gate) is FunctionType else (None, None)
    hidden = next((name for name in _HELD if hasattr(cls, name)), None)
    multiplies = multiplies_by_scales(cls)
    same = keeps_names(kept.loop()) and keeps_names(gate)
    key = gate and ref(gate), hidden, flags, without, activation, multiplies, is_usual(cls), same
    gate_code, spec = kept.specs.get(key, (None, None))
    if spec is None or gate_code is not code:
        spec = _spec_of(cls, kept.loop(), gate, hidden, dict(flags), without, activation, multiplies)
        kept.specs[key] = code, spec
    return spec


def _loops_of(forward: Any) -> list[Loop]:
    """The known loops that `forward` is written like; several only if a flag decides between them."""
    if "one_hot" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return []  # as all of them say, and hardly anything else: most forwards need not be read
    return [loop for loop in LOOPS if _are_alike(loop.text, forward)]


def multiplies_by_scales(cls: Any) -> bool:
    """True if `cls` has the method `linear` of `FP8Experts`, which multiplies with a weight and its scales."""
    method = getattr(cls, "linear", None)
    return method is not None and is_own(method, _FP8_MODULE, _FP8_LINEAR)


def _spec_of(
    cls: Any,
    original: Any,
    apply_gate: Any,
    hidden: str | None,
    own: dict,
    without: tuple,
    activation: str | None,
    multiplies: bool,
) -> ExpertsSpec | str:
    if hidden is not None:
        return f"{cls.__name__} has {hidden!r} as an attribute of the class, which hides that of the instance"
    if own["has_post_expert_norm"]:  # unknown to earlier versions of Transformers
        return f"{cls.__name__} has a norm after each expert, which no kernel computes"
    loops = _loops_of(original)
    decorated = original is not cls.forward
    if loops and not is_usual(cls):
        return f"{cls.__name__} is called, or looks its attributes up, in a way of its own"
    if not loops or (loops[0].scaled and not multiplies):
        return f"{cls.__name__} has a forward that is not one of the known loops over experts"
    # without the decorator nothing but the forward counts; with it, functions that go by the flags run in its place
    flags = own["is_transposed"], own["has_bias"], own["has_gate"]
    marked = decorated or loops[0].scaled
    loop = next((loop for loop in loops if flags == (loop.transposed, loop.bias, loop.gated)), None)
    if loop is None:
        if marked:
            return f"{cls.__name__} has decorator flags that contradict its forward"
        loop = loops[0]
    gate: Gate | None = GATES[0]
    if loop.by_gate or (decorated and loop.gated):
        is_there = set(OPTIONAL).difference(without).isdisjoint
        gate = next((gate for gate in GATES if is_there(gate.without) and _are_alike(gate.text, apply_gate)), None)
    is_known = gate is not None and (loop.by_gate or gate is GATES[0])
    if gate is None or not is_known or (decorated and own["is_concatenated"] is not (not gate.interleaved)):
        return f"{cls.__name__} combines gate and up in a way that no kernel computes"
    act_fn = gate.alpha is None and gate.activation is None
    if act_fn and activation is None:
        return f"the activation of {cls.__name__} is not one of {', '.join(ACTIVATIONS)}"
    layout = "planes" if not loop.transposed else "interleaved" if gate.interleaved else "transposed"
    up = "gate_up_proj" if loop.gated else "up_proj"
    return ExpertsSpec(
        ExpertsForm(layout, loop.gated, (activation if act_fn else gate.activation) or "", 0.0, gate.up_offset),
        up,
        "down_proj",
        f"{up}_bias" if loop.bias else None,
        "down_proj_bias" if loop.bias else None,
        (*own.items(), *((name, None) for name in gate.without)),
        gate.limit,
        gate.alpha,
        act_fn,
        loop.in_fp32,
        gate.clamps_last,
        f"{up}_scale_inv" if loop.scaled else None,
        "down_proj_scale_inv" if loop.scaled else None,
    )


def activation_of(module: nn.Module) -> str | None:
    """The key in `ACTIVATIONS` of what `act_fn` computes, a module or a function; None if that is unknown."""
    own = module.__dict__
    child = None if "act_fn" in own else module._modules.get("act_fn")
    if child is not None:
        if not torch.compiler.is_compiling() and runs_class_forward(child):
            return activation_at_a_glance(child)
        return find_activation(child) if is_bare(child) else None
    function = own.get("act_fn")
    return next((row.name for row in ACTIVATIONS.values() if row.function is function), None)


def original_of(forward: Any) -> Callable | None:
    """The loop that Transformers' decorator wrapped; None for a forward that it did not make.

    `FP8Experts` is wrapped again for each module that a model gets of it.
    """
    loop = None
    while (cells := _cells_of(forward)).get("original_forward") is not None:
        forward = loop = cells["original_forward"]
    return loop


# compiled code keeps the answer among the globals of the compiled module, under this name, so it must be unique
@torch.compiler.assume_constant_result
def hf_fused_mlp_wraps(forward: Any, loop: Any) -> bool:
    """True if `forward` is that decorator's, around `loop`."""
    if type(forward) is not FunctionType or loop is None:
        return False
    code, wrapped = _wrapped.get(forward, (None, None))
    if code is not forward.__code__:
        found = original_of(forward)
        wrapped = None if found is None else ref(found)
        _wrapped[forward] = forward.__code__, wrapped
    return wrapped is not None and wrapped() is loop


@torch.compiler.assume_constant_result
def hf_fused_mlp_keeps_names(function: Any) -> bool:
    """True if what a known loop or gate calls `torch`, `nn` and `F` is PyTorch's in the module of `function`, if any.

    Emulators of number formats put modules of their own there.
    """
    names = getattr(function, "__globals__", {})
    return (
        names.get("torch", torch) is torch
        and names.get("nn", nn) is nn
        and names.get("F", F) is F
        and nn.functional is F
    )


keeps_names = hf_fused_mlp_keeps_names


def interface_of(forward: Any) -> Any:
    """The registry in which such a forward looks up the implementation that the config names."""
    return _cells_of(forward).get("experts_interface")


def _cells_of(forward: Any) -> dict[str, Any]:
    """The variables of a forward that Transformers' decorator made, by name."""
    decorator = getattr(sys.modules.get(_MODULE), "use_experts_implementation", None)
    if type(forward) is not FunctionType or decorator is None or forward.__code__ not in _codes(decorator.__code__):
        return {}
    cells = zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells}


def _codes(code: CodeType) -> list[CodeType]:
    """The code of all functions inside of `code`."""
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return inner + [found for const in inner for found in _codes(const)]


# by forward; by function, with its code then
_specs: WeakKeyDictionary[Any, _Kept] = WeakKeyDictionary()
_texts: WeakKeyDictionary[Any, tuple[CodeType, str | None]] = WeakKeyDictionary()
_wrapped: WeakKeyDictionary[Any, tuple[CodeType, ref[Any] | None]] = WeakKeyDictionary()


def _are_alike(function: Any, other: Any) -> bool:
    """True if both functions are written alike."""
    text = _text(function)
    return text is not None and text == _text(other)


def _text(function: Any) -> str | None:
    """The body of `function` with its local variables numbered; None if it cannot be read, or names mean otherwise."""
    if type(function) is not FunctionType:
        return None
    if not keeps_names(function):
        return None
    code, text = _texts.get(function, (None, None))
    if code is not function.__code__:
        text = _canonical(function)
        _texts[function] = function.__code__, text
    return text


def _canonical(function: FunctionType) -> str | None:
    try:
        source = source_of(function)
    except (OSError, TypeError, SyntaxError, Unreadable):
        return None
    local = {name: f"v{i}" for i, name in enumerate(function.__code__.co_varnames)}
    body = source.body[1:] if ast.get_docstring(source, clean=False) is not None else source.body
    try:
        text = "\n".join(ast.unparse(_Canonical(function, local).visit(statement)) for statement in body)
    except Unreadable:
        return None
    # earlier versions of Transformers left no class for the ids of other ranks
    return text.replace("v0.num_experts + 1", "v0.num_experts")


class _Canonical(ast.NodeTransformer):
    """Numbers local variables, spells `torch.nn.functional` as F, and refuses globals that mean something else."""

    def __init__(self, function: FunctionType, local: dict[str, str]):
        self.function, self.local = function, local

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        path = ast.unparse(node)
        if (short := _SPELLINGS.get(path)) is not None and path.partition(".")[0] not in self.local:
            if meaning_of(self.function, path) is not F:
                raise Unreadable
            return ast.Name(short, node.ctx)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.local:
            return ast.Name(self.local[node.id], node.ctx)
        if meaning_of(self.function, node.id) is not _MEANINGS.get(node.id, self):
            raise Unreadable
        return node
