"""Reading what a class computes from its forward, so that MLPs of classes nobody listed are known too.

A forward of straight lines is evaluated on symbols: `self.up(x)` becomes `Call("up", INPUT)`. Whatever is not one of
the few steps below (a clamp, another attribute of self, a branch but for a cast to a weight's dtype) ends the reading,
and the class stays unknown. On an instance, calls of dropout modules fall away, since the kernels run in evaluation
mode only, and what is left has to be one of three equations, with projections and a known activation in their places.
Time and memory are bounded: `source_of` refuses long texts, and `Step` long expressions.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from hf_fused_mlp.activations import find_activation
from hf_fused_mlp.originals import IDENTITIES
from hf_fused_mlp.source import Unreadable, meaning_of, source_of
from hf_fused_mlp.types import MLPKind, MLPSpec

# functions that forwards call where others have a module; without arguments beside the input
FUNCTIONS: dict[Callable, str] = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu", torch.relu: "relu"}

MOST_STEPS = 100  # of an expression; an MLP with every cast and dropout there is has about twenty


@dataclass(frozen=True)
class Step:
    """A node of an expression. What is used twice counts twice in `size`, as it does for whoever walks the expression.

    Raises:
        Unreadable: the expression has more than `MOST_STEPS`.
    """

    size: int = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        size = 1 + sum(part.size for part in vars(self).values() if isinstance(part, Step))
        if size > MOST_STEPS:
            raise Unreadable
        object.__setattr__(self, "size", size)


@dataclass(frozen=True)
class Input(Step):
    """The forward's one argument."""


@dataclass(frozen=True)
class Call(Step):
    """`self.<name>(<of>)`."""

    name: str
    of: Step


@dataclass(frozen=True)
class Cast(Step):
    """`<of>.to(self.<name>.weight.dtype)`."""

    name: str
    of: Step


@dataclass(frozen=True)
class Dropout(Step):
    """`F.dropout(<of>, training=self.training)`."""

    of: Step


@dataclass(frozen=True)
class Function(Step):
    """A function of `FUNCTIONS`, by the activation that it computes."""

    activation: str
    of: Step


@dataclass(frozen=True)
class Product(Step):
    left: Any
    right: Any


@dataclass(frozen=True)
class Half(Step):
    """One of `<of>.chunk(2, dim=-1)`."""

    index: int
    of: Step


@dataclass(frozen=True)
class Chunks(Step):
    """``<of>.chunk(2, dim=-1)``, as a whole."""

    of: Step


INPUT = Input()
SEQUENTIAL_FORWARD = nn.Sequential.forward  # as it came, should a patch replace it


# what a condition may consist of that is not evaluated, since either branch gives the same
LOOKS = (
    *(ast.Call, ast.Name, ast.Attribute, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Constant, ast.Tuple),
    *(ast.cmpop, ast.boolop, ast.unaryop, ast.expr_context),
)


@dataclass(frozen=True)
class _Reading:
    """What a forward returns, or None, and what that rests on: its code, and whether names meant some function."""

    equation: Step | None
    code: CodeType
    meanings: dict[tuple[str, Callable], bool]

    def holds_for(self, function: FunctionType) -> bool:
        return function.__code__ is self.code and all(
            (meaning_of(function, name) is known) == was for (name, known), was in self.meanings.items()
        )


# a class that was looked at can be collected like any other
_readings: WeakKeyDictionary[FunctionType, _Reading] = WeakKeyDictionary()


def equation_of(function: FunctionType) -> Step | None:
    """What a forward returns, as an expression of `Input`, or None if it does anything that is not known here."""
    reading = _readings.get(function)
    if reading is None or not reading.holds_for(function):
        reading = _readings[function] = _read(function)
    return reading.equation


def reading_of(function: Any) -> _Reading | None:
    """What was read of a forward, if it was."""
    return _readings.get(function) if type(function) is FunctionType else None


def _read(function: FunctionType) -> _Reading:
    reader = _Reader(function)
    try:
        equation = reader.result()
    except Exception:  # no source, among others; what is not understood is left alone
        equation = None
    return _Reading(equation, function.__code__, reader.meanings)


def recognise(module: nn.Module) -> MLPSpec | None:
    """What `module` computes, by the names of its children, or None if that is no MLP or cannot be told."""
    cls: Any = type(module)
    if not is_usual(cls):
        return None
    sequence: tuple[str, ...] = ()
    equation: Step | None
    if cls.forward is SEQUENTIAL_FORWARD and getattr(cls, "__iter__", None) is nn.Sequential.__iter__:
        sequence = tuple(module._modules)
        equation = _in_a_row(sequence)
    else:
        equation = equation_of(cls.forward)
    if equation is None:
        return None
    removed: list[Call | Cast | Dropout] = []
    equation = _simplified(equation, module, removed)
    spec = _match(equation, module, tuple(step.name for step in removed if isinstance(step, Call)))
    # all projections share a dtype; a cast to that of another module could be one
    if spec is None or not {step.name for step in removed if isinstance(step, Cast)} <= set(spec.projections):
        return None
    return replace(spec, sequence=sequence, other_steps=any(not isinstance(step, Call) for step in removed))


def is_known(cls: Any) -> bool:
    """Whether the forward of a class can be read."""
    return is_usual(cls) and equation_of(cls.forward) is not None


def unknown_child(module: nn.Module) -> str | None:
    """The name of the only child without weights in a forward that can be read, if it is no known activation."""
    cls: Any = type(module)
    equation = equation_of(cls.forward) if is_usual(cls) else None
    children = {call.name: _child(module, call.name) for call in _calls(equation)}
    bare = {name: child for name, child in children.items() if child is not None and not list(child.parameters())}
    unknown = [name for name, child in bare.items() if type(child) not in IDENTITIES and not find_activation(child)]
    return unknown[0] if len(unknown) == 1 else None


def _in_a_row(names: tuple[str, ...]) -> Step | None:
    """Calls of modules one after another, or None where they are too many for an MLP."""
    equation: Step = INPUT
    if len(names) >= MOST_STEPS:
        return None
    for name in names:
        equation = Call(name, equation)
    return equation


def is_usual(cls: type[nn.Module]) -> bool:
    """Whether a call runs the forward that the class has, and attributes are where modules keep them."""
    usual = cls.__getattr__ is nn.Module.__getattr__ and cls.__getattribute__ is object.__getattribute__
    return usual and cls.__call__ is nn.Module.__call__ and type(cls.forward) is FunctionType


def _child(module: nn.Module, name: str) -> nn.Module | None:
    """The submodule that `self.<name>` means, if it means one."""
    hidden = name in module.__dict__ or any(name in base.__dict__ for base in type(module).__mro__)
    return None if hidden else module._modules.get(name)


def _simplified(equation: Any, module: nn.Module, removed: list[Call | Cast | Dropout]) -> Step:
    """`equation` without the steps that do nothing to `module` in evaluation mode; they are added to `removed`."""
    match equation:
        case Product(left, right):
            return Product(*(_simplified(side, module, removed) for side in (left, right)))
        case Cast(_, of) | Dropout(of):
            removed.append(equation)
            return _simplified(of, module, removed)
        case Call(name, of) if type(_child(module, name)) in IDENTITIES:
            inner = _simplified(of, module, removed)
            removed.append(equation)
            return inner
        case Call(_, of) | Function(_, of) | Half(_, of):
            return replace(equation, of=_simplified(of, module, removed))
    return equation


def _match(equation: Any, module: nn.Module, dropped: tuple[str, ...]) -> MLPSpec | None:
    match equation:
        case Call(down, Product(left, right)):
            for gate, up in ((left, right), (right, left)):
                activation = _activation(gate, module)
                match activation and gate.of, up:
                    case Call(gate_name, Input()), Call(up_name, Input()):
                        names = {"gate": gate_name, "up": up_name, "down": down}
                        return _spec(MLPKind.GATED, names, activation, module, dropped)
                    case Half(index, Call(up_name, Input()) as packed), Half(other, same) if (
                        same == packed and index + other == 1
                    ):
                        names = {"up": up_name, "down": down}
                        return _spec(MLPKind.PACKED, names, activation, module, dropped, up_first=index == 1)
        case Call(down, (Call() | Function()) as gate):
            activation = _activation(gate, module)
            match activation and gate.of:
                case Call(up_name, Input()):
                    return _spec(MLPKind.PLAIN, {"up": up_name, "down": down}, activation, module, dropped)
    # in a row of modules two such steps may be anything's
    if (activation := _activation(equation, module)) and type(module).forward is not SEQUENTIAL_FORWARD:
        match equation.of:
            case Call(up_name, Input()):
                return _spec(MLPKind.HALF, {"up": up_name}, activation, module, dropped)
    return None


def _activation(step: object, module: nn.Module) -> dict[str, str] | None:
    """How a spec names the activation that `step` applies, or None if it applies none that is known."""
    match step:
        case Function(name, _):
            return {"function": name}
        case Call(name, _) if find_activation(_child(module, name)) is not None:
            return {"activation": name}
    return None


def _spec(kind, names, activation, module, dropped, **extra) -> MLPSpec | None:
    projections = [_child(module, name) for name in names.values()]
    if len(set(names.values())) < len(names) or not all(isinstance(child, nn.Module) for child in projections):
        return None
    if not all(map(_is_projection, projections)):
        return None
    return MLPSpec(kind, **names, **activation, dropouts=dropped, **extra)


def _is_projection(child: nn.Module) -> bool:
    """Whether a child may stand for a matrix; what has no weight, or one of another shape, is something else."""
    matrix = getattr(getattr(child, "weight", None), "ndim", 0) == 2 and not isinstance(child, nn.Embedding)
    return matrix or isinstance(child, nn.Linear)  # a quantizer may have taken its weight away


def _calls(equation: object) -> Iterator[Call]:
    """Every call in `equation`."""
    match equation:
        case Product(left, right):
            yield from _calls(left)
            yield from _calls(right)
        case Call(_, of) | Cast(_, of) | Function(_, of) | Half(_, of) | Chunks(of) | Dropout(of):
            if isinstance(equation, Call):
                yield equation
            yield from _calls(of)


class _Reader:
    """Evaluates the statements of one function on symbols."""

    def __init__(self, function: FunctionType):
        self.function = function
        self.values: dict[str, Step] = {}
        self.calls: set[Call] = set()
        self.meanings: dict[tuple[str, Callable], bool] = {}

    def result(self) -> Step:
        source = source_of(self.function)
        self.self_name, *names = (argument.arg for argument in source.args.args)
        if not names or len(names) - len(source.args.defaults) > 1:
            raise Unreadable  # it has to be called with something else
        self.values[names[0]] = INPUT
        for statement in source.body:
            match statement:
                case ast.Expr(ast.Constant()):  # a docstring
                    pass
                case ast.Return(value) if value is not None:
                    result = self.evaluate(value)
                    if self.calls <= set(_calls(result)):
                        return result
                    raise Unreadable  # a call whose result is not used may be there for what else it does
                case ast.Assign([ast.Name(name)], value):
                    self.values[name] = self.evaluate(value)
                case ast.Assign([ast.Tuple([ast.Name(first), ast.Name(second)])], value):
                    self.values |= {first: self.half(value, 0), second: self.half(value, 1)}
                case ast.If(test, [ast.Assign([ast.Name(name)], value)], []) if self.only_looks(test):
                    self.values[name] = self.cast(name, value)  # which may do nothing, and must
                case _:
                    raise Unreadable
        raise Unreadable

    def evaluate(self, node: ast.expr) -> Step:
        match node:
            case ast.Name(name) if name in self.values:
                return self.values[name]
            case ast.BinOp(left, ast.Mult(), right):
                return Product(self.evaluate(left), self.evaluate(right))
            case ast.Subscript(value, ast.Constant((0 | 1) as index)):
                return self.half(value, index)
            case ast.Call(ast.Attribute(value, "chunk"), [ast.Constant(2)], [ast.keyword("dim", dim)]):
                if ast.unparse(dim) == "-1":
                    return Chunks(self.evaluate(value))
            case ast.Call(ast.Attribute(ast.Name(owner), name), [argument], []) if owner == self.self_name:
                call = Call(name, self.evaluate(argument))
                self.calls.add(call)
                return call
            case ast.Call(function, [argument], keywords):
                given = {keyword.arg: keyword.value for keyword in keywords}
                if self.means(function, F.dropout) and self.off_in_evaluation(given):
                    return Dropout(self.evaluate(argument))
                for known, activation in FUNCTIONS.items():
                    if self.means(function, known) and not given:
                        return Function(activation, self.evaluate(argument))
        raise Unreadable

    def half(self, node: ast.expr, index: Any) -> Half:
        match self.evaluate(node):
            case Chunks(of):
                return Half(index, of)
        raise Unreadable

    def cast(self, name: str, value: ast.expr) -> Cast:
        """``<name>.to(self.<child>.weight.dtype)``."""
        match value:
            case ast.Call(
                ast.Attribute(ast.Name(cast), "to"),
                [ast.Attribute(ast.Attribute(ast.Attribute(ast.Name(owner), child), "weight"), "dtype")],
                [],
            ) if cast == name and name in self.values and owner == self.self_name:
                return Cast(child, self.values[name])
        raise Unreadable

    def only_looks(self, test: ast.expr) -> bool:
        """Whether a condition consists of attributes and constants that are compared, and of `isinstance`."""
        calls = [node for node in ast.walk(test) if isinstance(node, ast.Call)]
        return all(isinstance(node, LOOKS) for node in ast.walk(test)) and all(
            self.means(call.func, isinstance) and not call.keywords for call in calls
        )

    def off_in_evaluation(self, given: dict[str | None, ast.expr]) -> bool:
        """Whether a dropout with these keywords does nothing once `self.training` is False."""
        match given:
            case {"training": ast.Attribute(ast.Name(owner), "training"), **others} if owner == self.self_name:
                match others:
                    case {"p": ast.Constant() | ast.Attribute(ast.Name())}:
                        return len(others) == 1
                return not others
        return False

    def means(self, node: ast.expr, known: Callable) -> bool:
        """Whether `node` is a dotted name that means `known` in the function's module, which the reading rests on."""
        attributes = []
        while isinstance(node, ast.Attribute):
            attributes.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id in self.function.__code__.co_varnames:
            return False
        name = ".".join((node.id, *reversed(attributes)))
        self.meanings[name, known] = does = meaning_of(self.function, name) is known
        return does
