"""RMSNorms in one launch, for the eager decoding that waits for Python more than for the GPU.

An RMSNorm of Transformers is about eight operations, each launched by itself. Compiled code needs nothing of this, and
where gradients are wanted the original forward runs too. What a class computes is read from its forward: once the
names of intermediate results are gone it has to be, word for word, one of `FORMS` or a spelling of it.
"""

import ast
import copy
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_fused_mlp import ops
from hf_fused_mlp.children import OWN_FORWARD, has_own_forward
from hf_fused_mlp.memory import answer
from hf_fused_mlp.originals import functions_are_own, why_functions_are_not_own
from hf_fused_mlp.recognition import Unreadable, is_usual, source_of
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

    def forward(self, *args, **kwargs):
        # read once, since another thread may unfuse the module meanwhile; compiled code is spared guards of the class
        if torch.compiler.is_compiling():
            cls, is_fused = self, isinstance(self, FusedRMSNorm)
        else:
            cls = type(self)
            is_fused = issubclass(cls, FusedRMSNorm)
        if not is_fused:  # who wraps a module's forward may call it after the module was unfused
            return type(self).forward(self, *args, **kwargs)
        if len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
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
        return why_functions_are_not_own()


def _launched(norm: FusedRMSNorm, cls: type[FusedRMSNorm], x: Any) -> Tensor | None:
    """The kernel's answer, or None where it cannot stand for the original forward."""
    if not ops.only_results(x) or not functions_are_own() or (operands := _operands(norm, cls)) is None:
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
    if original.forward is not cls.original_forward or type(weight) is not nn.Parameter or type(eps) is not float:
        return None
    for name, function in spec.helpers:
        if name in own or getattr(original, name, None) is not function:
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
    spec = _spec_of(cls, cls.forward)
    if spec is not None and any(inspect.getattr_static(cls, name) is not function for name, function in spec.helpers):
        spec = _spec_of.__wrapped__(cls, cls.forward)  # a helper was replaced since it was read
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


@cache
def _spec_of(cls: Any, forward: Callable) -> NormSpec | None:
    """What `forward`, that of `cls`, computes, or None."""
    try:
        text, eps, helpers = _read(cls, forward)
        return NormSpec(_forms_by_text()[text], eps, helpers)
    except Exception:  # no source, among others; what is not understood is left alone
        return None


@cache
def _forms_by_text() -> dict[str, str]:
    return {_read(None, function)[0]: form for form, function in SPELLINGS}


def _read(cls: type | None, forward: Callable) -> tuple[str, str, tuple[tuple[str, Callable], ...]]:
    """The text of what `forward` returns, the name of its epsilon, which is `eps` in the text, and its helpers.

    Of Llama's the text is ``(torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + self.eps) *
    x.to(torch.float32)).to(x.dtype) * self.weight``.
    """
    reader = _Inliner(cls)
    text = ast.unparse(reader.returned(forward, [ast.Name("x")]))
    (name,) = set(re.findall(r"\+ self\.(?!weight\b)(\w+)", text))
    return text.replace(f"+ self.{name}", "+ self.eps"), name, tuple(reader.helpers.items())


class _Inliner(ast.NodeTransformer):
    """Puts expressions in the place of names and of calls of the class's own methods, and evens out synonyms."""

    def __init__(self, cls: type | None):
        self.cls = cls
        self.helpers: dict[str, Callable] = {}
        self.values: dict[str, ast.expr] = {}
        self.unread: set[str] = set()

    def returned(self, function: Any, arguments: list[ast.expr]) -> ast.expr:
        """What a call of `function`, a method, gives."""
        source = source_of(function)
        if function.__globals__.get("torch") is not torch:
            raise Unreadable
        outer = self.values, self.unread
        names = [argument.arg for argument in source.args.args]
        self.values, self.unread = dict(zip(names, [ast.Name("self"), *arguments], strict=True)), set()
        for statement in source.body:
            match statement:
                case ast.Expr(ast.Constant()):  # a docstring
                    pass
                case ast.Assign([ast.Name(name)], value):
                    self.values[name] = self.visit(value)
                    if name in self.unread:
                        raise Unreadable
                    self.unread.add(name)
                case ast.Return(value) if value is not None:
                    result = self.visit(value)
                    if self.unread:  # what is not used may be there for what else it does
                        raise Unreadable
                    self.values, self.unread = outer
                    return result
                case _:
                    raise Unreadable
        raise Unreadable

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id not in self.values and node.id != "torch":
            raise Unreadable
        self.unread.discard(node.id)
        return copy.deepcopy(self.values.get(node.id, node))

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        node = self.generic_visit(node)  # type: ignore[assignment]
        if isinstance(node.op, ast.Mult):
            node.left, node.right = sorted((node.left, node.right), key=ast.unparse)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        node = self.generic_visit(node)  # type: ignore[assignment]
        match node:
            case ast.Call(ast.Attribute(ast.Name("self"), name), arguments, []):
                self.helpers[name] = inspect.getattr_static(self.cls, name)
                return self.returned(self.helpers[name], arguments)
            case ast.Call(ast.Attribute(of, "float"), [], []):
                return ast.Call(ast.Attribute(of, "to"), [ast.parse("torch.float32", mode="eval").body], [])
            case ast.Call(ast.Attribute(of, "type_as"), [like], []):
                return ast.Call(ast.Attribute(of, "to"), [ast.Attribute(like, "dtype")], [])
        return node
