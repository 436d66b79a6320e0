"""Finding the equation of routed experts: classes whose forward is a known loop, marked by Transformers or not."""

import ast
import sys
from collections.abc import Callable
from math import inf
from types import CodeType, FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.calls import is_bare, runs_class_forward
from hf_fused_mlp.reading.activations import find_activation
from hf_fused_mlp.reading.expert_loops import GATES, LOOPS, Gate, Loop
from hf_fused_mlp.reading.source import Unreadable, meaning_of, source_of
from hf_fused_mlp.types import ExpertsForm

_MODULE = "transformers.integrations.moe"
_FLAGS = "has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm"
_NUMBERS = "limit", "swiglu_limit", "alpha", "swiglu_alpha"
_SPELLINGS = {"nn.functional": "F", "torch.nn.functional": "F"}
_MEANINGS = {"torch": torch, "nn": nn, "F": F}
# what `_apply_gate` multiplies gate by inside of its sigmoid
_BY_ALPHA = {1.0: "silu", 1.702: "quick_gelu"}


class ExpertsSpec(NamedTuple):
    """What a module of routed experts computes, and what of the module says so.

    Args:
        up, down, up_bias, down_bias: names of parameters.
        held: attributes of the instance with the values that were read; if one changes, the equation does.
        act_fn: whether the activation is the attribute `act_fn`, which is looked at again in each call.
    """

    form: ExpertsForm
    up: str
    down: str
    up_bias: str | None
    down_bias: str | None
    held: tuple[tuple[str, Any], ...]
    act_fn: bool


def find_experts(module: nn.Module) -> ExpertsSpec | str | None:
    """What `module` computes, or why that is not known; None if its class has no decorator and no known loop."""
    own = module.__dict__
    attributes = tuple((name, own.get(name)) for name in (*_FLAGS, *_NUMBERS))
    spec = hf_fused_mlp_experts_spec(type(module), attributes, activation_of(module))
    if spec is not None and "_apply_gate" in own:
        return f"{type(module).__name__} has a gate of its own on the instance, which is not read"
    return spec


# compiled code keeps the answer among the globals of the compiled module, under this name, so it must be unique
@torch.compiler.assume_constant_result
def hf_fused_mlp_experts_spec(cls: Any, attributes: tuple, activation: str | None) -> ExpertsSpec | str | None:
    """The same, of a class whose instance has these attributes and this activation."""
    forward = cls.forward
    if type(forward) is not FunctionType:
        return None
    if (kept := _specs.get(forward)) is None:
        if original_of(forward) is None and _loop_of(forward) is None:
            return None
        kept = _specs[forward] = {}
    key = gate_of(cls), attributes, activation
    if key not in kept:
        kept[key] = _spec_of(cls, dict(attributes), activation)
    return kept[key]


def gate_of(cls: type) -> Any:
    """The class's `_apply_gate`; None for a class without the decorator that has none."""
    return getattr(cls, "_apply_gate", None)


def _loop_of(forward: Any) -> Loop | None:
    """The known loop that `forward` is written like."""
    if "one_hot" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return None  # as all of them say, and hardly anything else: most forwards need not be read
    return next((loop for loop in LOOPS if _are_alike(loop.text, forward)), None)


def _spec_of(cls: Any, own: dict[str, Any], activation: str | None) -> ExpertsSpec | str:
    if own["has_post_expert_norm"]:  # unknown to earlier versions of Transformers
        return f"{cls.__name__} has a norm after each expert, which no kernel computes"
    original = original_of(cls.forward)
    loop = _loop_of(original or cls.forward)
    if loop is None or (original and any(own[name] is None for name in _FLAGS[:-1])):
        return f"{cls.__name__} does something in its forward that the known loops over experts do not"
    # without the decorator nothing but the forward counts; with it, functions that go by the flags run in its place
    flags = own["is_transposed"], own["has_bias"], own["has_gate"]
    if original and flags != (loop.transposed, loop.bias, loop.gated):
        return f"{cls.__name__} is marked as something else than its forward computes"
    gate: Gate | None = GATES[0]
    if loop.by_gate or (original and loop.gated):
        gate = next((gate for gate in GATES if _are_alike(gate.text, gate_of(cls))), None)
    if gate is None or not (loop.by_gate or gate is GATES[0]) or gate.interleaved == own["is_concatenated"]:
        return f"{cls.__name__} makes something of gate and up that no kernel computes"
    limit = own[gate.limit] if gate.limit else inf
    if not (type(limit) in (int, float) and limit > 0):
        return f"the limit of {cls.__name__} is {limit!r}, expected a number above 0"
    if gate.clamps_last and limit != inf:
        return f"{cls.__name__} clamps what its activation gives, which no kernel does"
    name = _BY_ALPHA.get(own[gate.alpha]) if gate.alpha else gate.activation or activation
    if name is None:
        return f"the activation of {cls.__name__} is not one of {', '.join(ACTIVATIONS)}"
    layout = "planes" if not loop.transposed else "interleaved" if gate.interleaved else "transposed"
    up = "gate_up_proj" if loop.gated else "up_proj"
    return ExpertsSpec(
        ExpertsForm(layout, loop.gated, name, 0.0 if limit == inf else float(limit), gate.up_offset),
        up,
        "down_proj",
        f"{up}_bias" if loop.bias else None,
        "down_proj_bias" if loop.bias else None,
        tuple((name, own[name]) for name in (*_FLAGS, gate.limit, gate.alpha) if name),
        gate.alpha is None and gate.activation is None,
    )


def activation_of(module: nn.Module) -> str | None:
    """The key in `ACTIVATIONS` of what `act_fn` computes, a module or a function; None if that is unknown."""
    child = module._modules.get("act_fn")
    if child is not None:
        usual = is_bare(child) if torch.compiler.is_compiling() else runs_class_forward(child) or is_bare(child)
        return find_activation(child) if usual else None
    function = module.__dict__.get("act_fn")
    return next((row.name for row in ACTIVATIONS.values() if row.function is function), None)


def original_of(forward: Any) -> Callable | None:
    """The loop that Transformers' decorator wrapped; None for a forward that it did not make."""
    decorator = getattr(sys.modules.get(_MODULE), "use_experts_implementation", None)
    if type(forward) is not FunctionType or decorator is None or forward.__code__ not in _codes(decorator.__code__):
        return None
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    return cells["original_forward"].cell_contents if "original_forward" in cells else None


def _codes(code: CodeType) -> list[CodeType]:
    """The code of all functions inside of `code`."""
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return inner + [found for const in inner for found in _codes(const)]


# by forward, and in it by what else decides; by function
_specs: WeakKeyDictionary[Any, dict[tuple, ExpertsSpec | str]] = WeakKeyDictionary()
_texts: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


def _are_alike(function: Any, other: Any) -> bool:
    """True if both functions are written alike."""
    text = _text(function)
    return text is not None and text == _text(other)


def _text(function: Any) -> str | None:
    """The body of `function` with its local variables numbered; None if it cannot be read, or names mean otherwise."""
    if type(function) is not FunctionType:
        return None
    if function not in _texts:
        _texts[function] = _canonical(function)
    return _texts[function]


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
        if (short := _SPELLINGS.get(ast.unparse(node))) is not None:
            if meaning_of(self.function, ast.unparse(node)) is not F:
                raise Unreadable
            return ast.Name(short, node.ctx)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.local:
            return ast.Name(self.local[node.id], node.ctx)
        if meaning_of(self.function, node.id) is not _MEANINGS.get(node.id, self):
            raise Unreadable
        return node
