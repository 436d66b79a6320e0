"""Finds which RMSNorm a module computes, from its forward.

The forward's canonical text must be, word for word, that of one of `FORMS` or another spelling of it.
"""

import ast
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from hf_fused_mlp.reading.expression import is_usual
from hf_fused_mlp.reading.source import Unreadable, meaning_of, source_of


def _rounded(self, x: Tensor) -> Tensor:
    """Llama: rounded to the dtype of `x` before multiplying with the weight."""
    wide = x.to(torch.float32)
    return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def _weighed(self, x: Tensor) -> Tensor:
    """OLMo2: multiplied with the weight in fp32."""
    wide = x.to(torch.float32)
    return (self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))).to(x.dtype)


def _weighed_wide(self, x: Tensor) -> Tensor:
    """Helium: the same, since fp32 times a narrower weight is fp32."""
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
    return (self.weight.to(torch.float32) * normed).to(x.dtype)


def _offset(self, x: Tensor) -> Tensor:
    """Gemma: multiplied with one plus the weight in fp32."""
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
    return (normed * (1.0 + self.weight.to(torch.float32))).to(x.dtype)


# the values of the kernel's constant FORM, as classes of Transformers write them; also the oracle of tests
FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {"rounded": _rounded, "weighed": _weighed, "offset": _offset}
SPELLINGS = (*FORMS.items(), ("weighed", _weighed_wide))


@dataclass(frozen=True)
class NormSpec:
    """What an RMSNorm class computes.

    Args:
        form: key of `FORMS`.
        eps: name of the attribute that holds its epsilon.
        helpers: the methods that its forward calls, each with its function when the forward was read.
    """

    form: str
    eps: str
    helpers: tuple[tuple[str, Callable], ...] = ()


def find_norm(module: nn.Module) -> NormSpec | None:
    """What `module` computes, or None if it is not an RMSNorm or cannot be read."""
    cls: Any = type(module)
    if not is_usual(cls):
        return None
    spec = _spec_of(cls)
    # a class may have a descriptor where the module seems to have a weight
    on_classes = {name for base in cls.__mro__ if base is not nn.Module for name in vars(base)}
    return None if spec is None or on_classes & {"weight", spec.eps} else spec


@dataclass(frozen=True)
class _Method:
    """A method that was read, by its name in the class. Weak, so that the class is not kept alive."""

    name: str
    function: ReferenceType
    code: CodeType
    means_torch: bool  # its global name `torch` is PyTorch

    def is_still_of(self, cls: type) -> bool:
        function = self.function()
        return (
            function is not None
            and inspect.getattr_static(cls, self.name, None) is function
            and function.__code__ is self.code
            and (meaning_of(function, "torch") is torch) == self.means_torch
        )


@dataclass(frozen=True)
class _Reading:
    """What the forward of a class computes (form None: unreadable), and the methods that it depends on."""

    form: str | None
    eps: str
    methods: tuple[_Method, ...]

    def spec(self) -> NormSpec | None:
        if self.form is None:
            return None
        helpers: Any = ((method.name, method.function()) for method in self.methods if method.name != "forward")
        return NormSpec(self.form, self.eps, tuple(helpers))


# weak keys: a class that was read can still be garbage-collected
_readings: WeakKeyDictionary[type, _Reading] = WeakKeyDictionary()


def _spec_of(cls: type[nn.Module]) -> NormSpec | None:
    """The spec of the forward of `cls`, read again if a method changed since; None if unreadable."""
    reading = _readings.get(cls)
    if reading is None or not all(method.is_still_of(cls) for method in reading.methods):
        reading = _readings[cls] = _read(cls)
    return reading.spec()


def _read(cls: Any) -> _Reading:
    reader = _Inliner(cls)
    try:
        text = reader.method("forward", ["x"])
        (eps,) = set(re.findall(r"\+ self\.(?!weight\b)(\w+)", text))
        form = _forms_by_text()[text.replace(f"+ self.{eps})", "+ self.eps)")]
    except Exception:  # no source, for example; a forward that cannot be read is left alone
        form, eps = None, ""
    methods = (
        _Method(name, ref(function), function.__code__, meaning_of(function, "torch") is torch)
        for name, function in reader.methods.items()
    )
    return _Reading(form, eps, tuple(methods))


@cache
def _forms_by_text() -> dict[str, str]:
    """The form for each canonical text of a forward.

    Llama's text is ``((torch.rsqrt((x.to(torch.float32).pow(2).mean(-1, keepdim=True) + self.eps)) *
    x.to(torch.float32)).to(x.dtype) * self.weight)``.
    """
    return {_Inliner(None).returned(function, ["x"]): form for form, function in SPELLINGS}


class _Inliner:
    """Writes what a method returns as canonical text: intermediate names and the class's own methods are replaced by
    what they stand for, and synonyms get one spelling.

    Raises `Unreadable` at anything that no form contains, and at more calls or a longer text than an RMSNorm has.
    """

    MOST_CALLS = 8
    LONGEST = 2000

    def __init__(self, cls: type | None):
        self.cls = cls
        self.methods: dict[str, FunctionType] = {}
        self.calls = 0
        self.values: dict[str, str] = {}
        self.unread: set[str] = set()

    def method(self, name: str, arguments: list[str]) -> str:
        """What calling the class's own method returns."""
        method = inspect.getattr_static(self.cls, name)
        self.calls += 1
        if not isinstance(method, FunctionType) or self.calls > self.MOST_CALLS:
            raise Unreadable
        self.methods[name] = method
        outer = self.values, self.unread
        result = self.returned(method, arguments)
        self.values, self.unread = outer
        return result

    def returned(self, function: Any, arguments: list[str]) -> str:
        """What calling `function` returns."""
        source = source_of(function)
        if meaning_of(function, "torch") is not torch:
            raise Unreadable
        names = [argument.arg for argument in source.args.args]
        self.values, self.unread = dict(zip(names, ["self", *arguments], strict=True)), set(names[1:])
        for statement in source.body:
            match statement:
                case ast.Expr(ast.Constant()):  # a docstring
                    pass
                case ast.Assign([ast.Name(name)], value):
                    text = self.text(value)
                    if name in self.unread:
                        raise Unreadable
                    self.values[name] = text
                    self.unread.add(name)
                case ast.Return(value) if value is not None:
                    text = self.text(value)
                    if self.unread:  # an unused result may have side effects
                        raise Unreadable
                    return text
                case _:
                    raise Unreadable
        raise Unreadable

    def text(self, node: ast.expr) -> str:
        text = self._text(node)
        if len(text) > self.LONGEST:
            raise Unreadable
        return text

    def _text(self, node: ast.expr) -> str:
        match node:
            case ast.Name(name) if name in self.values:
                self.unread.discard(name)
                return self.values[name]
            case ast.Name("torch"):
                return "torch"
            case ast.Constant(int() | float() as number):
                return repr(number)
            case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as number)):
                return f"-{number!r}"
            case ast.Attribute(of, name):
                return f"{self.text(of)}.{name}"
            case ast.BinOp(left, ast.Mult(), right):
                return f"({' * '.join(sorted((self.text(left), self.text(right))))})"
            case ast.BinOp(left, ast.Add(), right):
                return f"({self.text(left)} + {self.text(right)})"
            case ast.Call(ast.Attribute(of, name), arguments, keywords):
                return self.call(self.text(of), name, [self.text(argument) for argument in arguments], keywords)
        raise Unreadable

    def call(self, of: str, name: str, arguments: list[str], keywords: list[ast.keyword]) -> str:
        match of, name, arguments, keywords:
            case "self", _, _, []:
                return self.method(name, arguments)
            case _, "float", [], []:
                return f"{of}.to(torch.float32)"
            case _, "type_as", [like], []:
                return f"{of}.to({like}.dtype)"
        arguments += [f"{keyword.arg}={self.text(keyword.value)}" for keyword in keywords]
        return f"{of}.{name}({', '.join(arguments)})"
