"""Reads what a forward returns from its source, as an expression of its input.

A straight-line forward is evaluated on symbols: `self.up(x)` becomes `Call("up", INPUT)`. Anything but the steps below
(a clamp, another attribute of self, a branch other than a cast to a weight's dtype) makes the forward unreadable.
Time and memory are bounded: `source_of` refuses long sources, and `Step` refuses long expressions.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from hf_fused_mlp.reading.source import Unreadable, meaning_of, source_of

# functions that some forwards call in place of an activation module; they take the input only
FUNCTIONS: dict[Callable, str] = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu", torch.relu: "relu"}

LONGEST_TEXT = 60  # of an expression in a message
MOST_STEPS = 100  # of an expression; an MLP with every known cast and dropout has about twenty


@dataclass(frozen=True)
class Step:
    """A node of an expression. `size` counts a shared part once for each use, as a walk over the expression does.

    Raises:
        Unreadable: the expression has more than `MOST_STEPS` nodes.
    """

    size: int = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        size = 1 + sum(part.size for part in vars(self).values() if isinstance(part, Step))
        if size > MOST_STEPS:
            raise Unreadable
        object.__setattr__(self, "size", size)


@dataclass(frozen=True)
class Input(Step):
    """The only argument of the forward."""


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
    """A call of one of `FUNCTIONS`, by the activation that it computes."""

    activation: str
    of: Step


@dataclass(frozen=True)
class Product(Step):
    """`<left> * <right>`."""

    left: Any
    right: Any


@dataclass(frozen=True)
class Half(Step):
    """Half `index` of `<of>.chunk(2, dim=-1)`."""

    index: int
    of: Step


@dataclass(frozen=True)
class Chunks(Step):
    """`<of>.chunk(2, dim=-1)`, both halves."""

    of: Step


INPUT = Input()

# node types allowed in the condition of a cast; it is not evaluated, since both branches give the same
LOOKS = (
    *(ast.Call, ast.Name, ast.Attribute, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Constant, ast.Tuple),
    *(ast.cmpop, ast.boolop, ast.unaryop, ast.expr_context),
)


@dataclass(frozen=True)
class Reading:
    """What a forward returns (None: unreadable), its code, and the meaning of its global names.

    `unread` is the text that could not be read, if there is one, cut to `LONGEST_TEXT` characters.
    """

    equation: Step | None
    code: CodeType
    meanings: dict[tuple[str, Callable], bool]
    unread: str | None = None

    def holds_for(self, function: FunctionType) -> bool:
        """True if `function` would be read the same way now."""
        return function.__code__ is self.code and all(
            (meaning_of(function, name) is known) == was for (name, known), was in self.meanings.items()
        )


# weak keys: a class whose forward was read can still be garbage-collected
_readings: WeakKeyDictionary[FunctionType, Reading] = WeakKeyDictionary()


def equation_of(function: FunctionType) -> Step | None:
    """What a forward returns, as an expression of `INPUT`; None if it is unreadable."""
    reading = _readings.get(function)
    if reading is None or not reading.holds_for(function):
        reading = _readings[function] = _read(function)
    return reading.equation


def reading_of(function: Any) -> Reading | None:
    """The kept reading of a forward, or None if it was never read."""
    return _readings.get(function) if type(function) is FunctionType else None


def _read(function: FunctionType) -> Reading:
    reader = _Reader(function)
    equation = unread = None
    try:
        equation = reader.result()
    except Unreadable as error:
        text = " ".join(ast.unparse(error.args[0]).split()) if error.args else None
        unread = text if text is None or len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 3]}..."
    except Exception:  # no source, for example; a forward that cannot be read is left alone
        pass
    return Reading(equation, function.__code__, reader.meanings, unread)


def is_usual(cls: type[nn.Module]) -> bool:
    """True if calling an instance runs `cls.forward`, and attributes are where `nn.Module` keeps them."""
    usual = cls.__getattr__ is nn.Module.__getattr__ and cls.__getattribute__ is object.__getattribute__
    return usual and cls.__call__ is nn.Module.__call__ and type(cls.forward) is FunctionType


def in_a_row(names: tuple[str, ...]) -> Step | None:
    """Calls of the named modules one after another; None if there are too many for an MLP."""
    equation: Step = INPUT
    if len(names) >= MOST_STEPS:
        return None
    for name in names:
        equation = Call(name, equation)
    return equation


def calls_in(equation: object) -> Iterator[Call]:
    """Every module call in `equation`."""
    match equation:
        case Product(left, right):
            yield from calls_in(left)
            yield from calls_in(right)
        case Call(_, of) | Cast(_, of) | Function(_, of) | Half(_, of) | Chunks(of) | Dropout(of):
            if isinstance(equation, Call):
                yield equation
            yield from calls_in(of)


class _Reader:
    """Evaluates the statements of one function on symbols, and notes the global names it relied on in `meanings`."""

    def __init__(self, function: FunctionType):
        self.function = function
        self.values: dict[str, Step] = {}
        self.calls: set[Call] = set()
        self.meanings: dict[tuple[str, Callable], bool] = {}

    def result(self) -> Step:
        source = source_of(self.function)
        self.self_name, *names = (argument.arg for argument in source.args.args)
        if not names or len(names) - len(source.args.defaults) > 1:
            raise Unreadable  # it needs another argument
        self.values[names[0]] = INPUT
        for statement in source.body:
            match statement:
                case ast.Expr(ast.Constant()):  # a docstring
                    pass
                case ast.Return(value) if value is not None:
                    result = self.evaluate(value)
                    if self.calls <= set(calls_in(result)):
                        return result
                    raise Unreadable  # a call whose result is unused may have side effects
                case ast.Assign([ast.Name(name)], value):
                    self.values[name] = self.evaluate(value)
                case ast.Assign([ast.Tuple([ast.Name(first), ast.Name(second)])], value):
                    self.values |= {first: self.half(value, 0), second: self.half(value, 1)}
                case ast.If(test, [ast.Assign([ast.Name(name)], value)], []) if self.only_looks(test):
                    self.values[name] = self.cast(name, value, statement)  # either branch: a cast does nothing else
                case _:
                    raise Unreadable(statement)
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
        raise Unreadable(node)

    def half(self, node: ast.expr, index: Any) -> Half:
        match self.evaluate(node):
            case Chunks(of):
                return Half(index, of)
        raise Unreadable(node)

    def cast(self, name: str, value: ast.expr, statement: ast.If) -> Cast:
        """``<name>.to(self.<child>.weight.dtype)``."""
        match value:
            case ast.Call(
                ast.Attribute(ast.Name(cast), "to"),
                [ast.Attribute(ast.Attribute(ast.Attribute(ast.Name(owner), child), "weight"), "dtype")],
                [],
            ) if cast == name and name in self.values and owner == self.self_name:
                return Cast(child, self.values[name])
        raise Unreadable(statement)

    def only_looks(self, test: ast.expr) -> bool:
        """True if a condition only compares attributes and constants, and calls nothing but `isinstance`."""
        calls = [node for node in ast.walk(test) if isinstance(node, ast.Call)]
        return all(isinstance(node, LOOKS) for node in ast.walk(test)) and all(
            self.means(call.func, isinstance) and not call.keywords for call in calls
        )

    def off_in_evaluation(self, given: dict[str | None, ast.expr]) -> bool:
        """True if a dropout with these keyword arguments does nothing once `self.training` is False."""
        match given:
            case {"training": ast.Attribute(ast.Name(owner), "training"), **others} if owner == self.self_name:
                match others:
                    case {"p": ast.Constant() | ast.Attribute(ast.Name())}:
                        return len(others) == 1
                return not others
        return False

    def means(self, node: ast.expr, known: Callable) -> bool:
        """True if `node` is a dotted name for `known` in the function's module. Noted in `meanings`."""
        attributes = []
        while isinstance(node, ast.Attribute):
            attributes.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id in self.function.__code__.co_varnames:
            return False
        name = ".".join((node.id, *reversed(attributes)))
        self.meanings[name, known] = does = meaning_of(self.function, name) is known
        return does
