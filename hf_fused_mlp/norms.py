"""RMSNorms in one launch, for the eager decoding that waits for Python more than for the GPU.

An RMSNorm of Transformers is about eight operations, each launched by itself. Compiled code needs nothing of this, and
where gradients are wanted the original forward runs too. What a class computes is read from its forward: once the
names of intermediate results are gone it has to be, word for word, one of `FORMS`.
"""

import ast
import copy
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_fused_mlp import ops
from hf_fused_mlp.children import has_own_forward
from hf_fused_mlp.recognition import Unreadable, is_source_of
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


# what the kernel's constant FORM may be, as classes of Transformers write it
FORMS: dict[str, tuple[Callable[[Any, Tensor], Tensor], ...]] = {
    "rounded": (_rounded,),
    "weighed": (_weighed, _weighed_wide),
    "offset": (_offset,),
}


@dataclass(frozen=True)
class NormSpec:
    """What an RMSNorm class computes: a key of `FORMS`, and the name of the attribute that is its epsilon."""

    form: str
    eps: str


class FusedRMSNorm(Fused):
    """An RMSNorm whose forward is one launch where nothing but the result is wanted, or else the original."""

    fused_spec: ClassVar[NormSpec]

    def forward(self, *args, **kwargs):
        # who wraps a module's forward may call it after the module was unfused
        if not isinstance(self, FusedRMSNorm):
            return type(self).forward(self, *args, **kwargs)
        if len(args) == 1 and not kwargs and (out := self._launched(args[0])) is not None:
            return out
        return super().forward(*args, **kwargs)

    def _launched(self, x: Any) -> Tensor | None:
        """The kernel's answer, or None where it cannot stand for the original forward."""
        if not ops.HAS_TRITON or not ops.runs_now(x):
            return None
        spec, own = self.fused_spec, self.__dict__
        weight, eps = own["_parameters"].get("weight"), own.get(spec.eps)
        if (
            self.original_class.forward is not self.original_forward
            or type(weight) is not nn.Parameter
            or type(eps) is not float
        ):
            return None
        return ops.on_gpu().rms_norm(x, weight, eps, spec.form)


def find_norm(module: nn.Module) -> NormSpec | None:
    """What `module` computes, or None if that is no RMSNorm or cannot be told."""
    cls: Any = type(module)
    usual = cls.__getattr__ is nn.Module.__getattr__ and cls.__getattribute__ is object.__getattribute__
    if not usual or cls.__call__ is not nn.Module.__call__ or type(cls.forward) is not FunctionType:
        return None
    return _spec_of(cls, cls.forward)


def looks_like_norm(module: nn.Module) -> bool:
    """Whether a report should list this module as a norm left alone. Never decides what is fused."""
    return type(module).__name__.endswith("RMSNorm")


def norm_reject_reason(module: nn.Module, spec: NormSpec) -> str | None:
    """Why `module` cannot be fused as `spec` says, with the remedy, or None if it can."""
    if has_own_forward(module):
        return (
            "its forward was replaced on the instance, as some patches do; fuse before the patch, or pass "
            "exclude=[...]"
        )
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
        text, eps = _read(cls, forward)
    except Exception:  # no source, among others; what is not understood is left alone
        return None
    form = _TEXTS.get(text)
    return None if form is None or eps is None else NormSpec(form, eps)


_EPSILON = re.compile(r"(?<=\+ self\.)(?!weight\b)\w+")


def _read(cls: type | None, forward: Callable) -> tuple[str, str | None]:
    """What `forward` returns as one expression of `self` and `x`, its epsilon named so, and that one's own name."""
    text = ast.unparse(_Inliner(cls).returned(forward, [ast.Name("x")]))
    found = _EPSILON.search(text)
    return _EPSILON.sub("eps", text), found and found[0]


class _Inliner(ast.NodeTransformer):
    """Puts expressions in the place of names and of calls of the class's own methods, and evens out synonyms."""

    def __init__(self, cls: type | None):
        self.cls = cls
        self.values: dict[str, ast.expr] = {}

    def returned(self, function: Any, arguments: list[ast.expr]) -> ast.expr:
        """What a call of `function`, a method, gives."""
        source: Any = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        names = [argument.arg for argument in source.args.args]
        if not is_source_of(function, source) or function.__globals__.get("torch") is not torch:
            raise Unreadable
        outer, self.values = self.values, dict(zip(names, [ast.Name("self"), *arguments], strict=True))
        for statement in source.body:
            match statement:
                case ast.Expr(ast.Constant()):  # a docstring
                    pass
                case ast.Assign([ast.Name(name)], value):
                    self.values[name] = self.visit(value)
                case ast.Return(value) if value is not None:
                    result = self.visit(value)
                    self.values = outer
                    return result
                case _:
                    raise Unreadable
        raise Unreadable

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id not in self.values and node.id != "torch":
            raise Unreadable
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
                return self.returned(inspect.getattr_static(self.cls, name), arguments)
            case ast.Call(ast.Attribute(of, "float"), [], []):
                return ast.Call(ast.Attribute(of, "to"), [ast.parse("torch.float32", mode="eval").body], [])
            case ast.Call(ast.Attribute(of, "type_as"), [like], []):
                return ast.Call(ast.Attribute(of, "to"), [ast.Attribute(like, "dtype")], [])
        return node


_TEXTS = {_read(None, function)[0]: form for form, functions in FORMS.items() for function in functions}
