"""RMSNorms in one launch, for the eager decoding that waits for Python more than for the GPU.

An RMSNorm of Transformers is about eight operations, each launched by itself. Compiled code needs nothing of this, and
where gradients are wanted the original forward runs too. What a class computes is read from its forward: once the
names of intermediate results are gone it has to be, word for word, one of `FORMS` or a spelling of it.
"""

import ast
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType
from typing import Any, ClassVar
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from hf_fused_mlp import ops
from hf_fused_mlp.children import OWN_FORWARD, has_own_forward
from hf_fused_mlp.memory import answer
from hf_fused_mlp.originals import rsqrt_is_own, why_functions_are_not_own
from hf_fused_mlp.recognition import is_usual
from hf_fused_mlp.source import Unreadable, meaning_of, source_of
from hf_fused_mlp.swap import Fused, fuse


def _rounded(self, x: Tensor) -> Tensor:
    """Llama's: rounded to the dtype of `x` before the weight multiplies."""
    wide = x.to(torch.float32)
    return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def _weighed(self, x: Tensor) -> Tensor:
    """OLMo2's: weighed in fp32."""
    wide = x.to(torch.float32)
    return (self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))).to(x.dtype)


def _weighed_wide(self, x: Tensor) -> Tensor:
    """Helium's: the same, since fp32 times a narrower weight is fp32."""
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
    return (self.weight.to(torch.float32) * normed).to(x.dtype)


def _offset(self, x: Tensor) -> Tensor:
    """Gemma's: weighed in fp32 by one and the weight."""
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
    return (normed * (1.0 + self.weight.to(torch.float32))).to(x.dtype)


# what the kernel's constant FORM may be, as classes of Transformers write it; the oracle of tests
FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {"rounded": _rounded, "weighed": _weighed, "offset": _offset}
SPELLINGS = (*FORMS.items(), ("weighed", _weighed_wide))


@dataclass(frozen=True)
class NormSpec:
    """What an RMSNorm class computes.

    Args:
        form: key of `FORMS`.
        eps: name of the attribute that is its epsilon.
        helpers: names of the methods that its forward calls, and what they were when it was read.
    """

    form: str
    eps: str
    helpers: tuple[tuple[str, Callable], ...] = ()


class FusedRMSNorm(Fused):
    """An RMSNorm whose forward is one launch where nothing but the result is wanted, or else the original."""

    fused_spec: ClassVar[NormSpec]
    _helper_code: ClassVar[tuple[CodeType, ...]]

    def __init_subclass__(cls, **kwargs):
        if spec := vars(cls).get("fused_spec"):
            type.__setattr__(cls, "_helper_code", tuple(function.__code__ for _, function in spec.helpers))

    def forward(self, *args, **kwargs):
        # read once, since another thread may unfuse the module meanwhile; compiled code is spared guards of the class
        traced = torch.compiler.is_compiling()
        cls: Any = self if traced else type(self)
        # who wraps a module's forward may call it after the module was unfused
        if not (isinstance(self, FusedRMSNorm) if traced else issubclass(cls, FusedRMSNorm)):
            return type(self).forward(self, *args, **kwargs)
        if len(args) == 1 and not kwargs and not traced:
            out = _launched(self, cls, args[0])
            if out is not None:
                return out
        return cls.original_class.forward(self, *args, **kwargs)  # not `super()`, which compiled code checks anew

    def reason(self) -> str | None:
        """Why the next call would run another forward whatever it is given, or None."""
        if has_own_forward(self) or _operands(self, type(self)) is None:
            return (
                "its forward, its weight or its epsilon was replaced since it was fused, so the original forward runs"
            )
        return None if rsqrt_is_own() else why_functions_are_not_own()


def _launched(norm: FusedRMSNorm, cls: type[FusedRMSNorm], x: Any) -> Tensor | None:
    """The kernel's answer, or None where it cannot stand for the original forward."""
    if not ops.only_results(x) or not rsqrt_is_own() or (operands := _operands(norm, cls)) is None:
        return None
    weight, eps = operands
    form = cls.fused_spec.form
    out = answer((form, eps), (x, weight))
    if out is None and ops.HAS_TRITON and ops.runs_now(x):
        return ops.on_gpu().rms_norm(x, weight, eps, form)
    return None if out is NotImplemented else out


def _operands(norm: FusedRMSNorm, cls: type[FusedRMSNorm]) -> tuple[nn.Parameter, float] | None:
    """Weight and epsilon, or None if the module or its class is no longer what was read."""
    spec, own, original = cls.fused_spec, norm.__dict__, cls.original_class
    weight, eps = own["_parameters"].get("weight"), own.get(spec.eps)
    forward: Any = original.forward
    if forward is not cls.original_forward or getattr(forward, "__code__", None) is not cls.original_code:
        return None
    if type(weight) is not nn.Parameter or type(eps) is not float or forward.__globals__.get("torch") is not torch:
        return None
    for (name, function), code in zip(spec.helpers, cls._helper_code) if spec.helpers else ():  # noqa: B905
        if name in own or getattr(original, name, None) is not function or function.__code__ is not code:
            return None
    return weight, eps


# a class with such names of its own would lose them
_TAKEN = {
    name for cls in (Fused, FusedRMSNorm) for name in (*vars(cls), *cls.__annotations__) if not name.startswith("__")
} - {"forward"}


def find_norm(module: nn.Module) -> NormSpec | None:
    """What `module` computes, or None if that is no RMSNorm or cannot be told."""
    cls: Any = type(module)
    if not is_usual(cls):
        return None
    spec = _spec_of(cls)
    # a class may have a descriptor where the module seems to have a weight
    on_classes = {name for base in cls.__mro__ if base is not nn.Module for name in vars(base)}
    return None if spec is None or on_classes & {*_TAKEN, "weight", spec.eps} else spec


def looks_like_norm(module: nn.Module) -> bool:
    """Whether a report should list this module as a norm left alone. Never decides what is fused."""
    return type(module).__name__.endswith("RMSNorm")


def norm_reject_reason(module: nn.Module, spec: NormSpec) -> str | None:
    """Why `module` cannot be fused as `spec` says, with the remedy, or None if it can."""
    if has_own_forward(module) or any(name in module.__dict__ for name, _ in spec.helpers):
        return OWN_FORWARD
    if module._modules or module._buffers or module._parameters.keys() != {"weight"}:
        held = ", ".join((*module._modules, *module._buffers, *module._parameters)) or "nothing"
        return f"it holds {held}, expected a weight alone; pass exclude=[...] to leave this module as it is"
    return None


def fuse_norm(module: nn.Module, spec: NormSpec) -> None:
    """Turns `module`, which `norm_reject_reason` has passed, into its fused form, in place."""
    fuse(module, FusedRMSNorm, spec)


@dataclass(frozen=True)
class _Method:
    """A method that was read, by its name in the class, which is not kept alive."""

    name: str
    function: ReferenceType
    code: CodeType
    means_torch: bool  # by `torch`

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
    """What a class's forward computes, or None, and what that rests on."""

    form: str | None
    eps: str
    methods: tuple[_Method, ...]

    def spec(self) -> NormSpec | None:
        if self.form is None:
            return None
        helpers: Any = ((method.name, method.function()) for method in self.methods if method.name != "forward")
        return NormSpec(self.form, self.eps, tuple(helpers))


# a class that was looked at can be collected like any other: even its methods' globals may hold it
_readings: WeakKeyDictionary[type, _Reading] = WeakKeyDictionary()


def _spec_of(cls: type[nn.Module]) -> NormSpec | None:
    """What the forward of `cls` computes, or None."""
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
    except Exception:  # no source, among others; what is not understood is left alone
        form, eps = None, ""
    methods = (
        _Method(name, ref(function), function.__code__, meaning_of(function, "torch") is torch)
        for name, function in reader.methods.items()
    )
    return _Reading(form, eps, tuple(methods))


@cache
def _forms_by_text() -> dict[str, str]:
    """By the text that is read of a forward, the form that it computes.

    Of Llama's the text is ``((torch.rsqrt((x.to(torch.float32).pow(2).mean(-1, keepdim=True) + self.eps)) *
    x.to(torch.float32)).to(x.dtype) * self.weight)``.
    """
    return {_Inliner(None).returned(function, ["x"]): form for form, function in SPELLINGS}


class _Inliner:
    """Gives what a method returns as text, with the names of intermediate results and calls of the class's own methods
    replaced by what they stand for, and one spelling for synonyms.

    What is not in any of `FORMS`, and more calls or a longer text than an RMSNorm has, ends the reading.
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
        """What a call of a method of the class gives."""
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
        """What a call of `function` gives."""
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
                    if self.unread:  # what is not used may be there for what else it does
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
