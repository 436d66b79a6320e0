"""Replaces the class of a module by a generated one, and restores it.

A fused `LlamaMLP` has the class `LlamaMLP(FusedGatedMLP, LlamaMLP)`. It keeps the original's name, so that lookups by
class name still find it. The module stays the same object, with the same children, hooks and attributes; fusing adds
none. Unfusing restores the class.
"""

import copyreg
import functools
import inspect
import operator
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hf_fused_mlp.threads import LOCK, free_when_unread


class Runs(NamedTuple):
    """What will run in place of our kernels, with the reason. If both are None, only the kernels run."""

    original: str | None = None  # why the whole original forward would run
    called: str | None = None  # why some layers would be called, and the rest fused


class Fused(nn.Module if TYPE_CHECKING else object):  # type: ignore[misc]
    """The base of all fused modules. A subclass that defines a forward is mixed in before the original class."""

    fused_spec: ClassVar[Any]
    original_class: ClassVar[type[nn.Module]]
    original_forward: ClassVar[Callable]
    original_code: ClassVar[CodeType | None]
    # everything that the spec was read from: the forward, its code, and the values of `_also_read`
    was_read: ClassVar[tuple]
    # the name of the forward's first argument, if it may be passed by name
    input_name: ClassVar[str | None]
    # whether only kernels run whose sums do not depend on the token count
    batch_invariant: ClassVar[bool] = False
    _made_of: ClassVar[tuple]

    def __init_subclass__(cls, **kwargs):
        # the original's is not called: it may register subclasses by name, or require arguments
        pass

    def runs(self, device: torch.device | None = None, elements: int | None = None) -> Runs:
        """What a call would run in place of our kernels. A single call may still differ, for example under autocast.

        Args:
            device: of the tokens; default: that of the weights.
            elements: number of elements of the tokens' tensor; default: many.
        """
        raise NotImplementedError

    def call_inputs(self, args: tuple, kwargs: dict) -> tuple[Tensor, ...] | None:
        """The tensors of an ordinary call, tokens first; None for an unusual call."""
        raise NotImplementedError

    def by_operator(self, *inputs: Tensor) -> Tensor:
        """The output of our operator, which runs on any device."""
        raise NotImplementedError

    def original_output(self, *inputs: Tensor) -> Tensor:
        """The output of the original forward."""
        return self.original_class.forward(self, *inputs)

    @staticmethod
    def exact_output(exact: nn.Module, *inputs: Tensor) -> Tensor:
        """The output of a float64 copy of a module of the original class; its code may be another."""
        return type(exact).forward(exact, *inputs)

    @staticmethod
    def read_again(module: nn.Module) -> Any:
        """Reads the spec of a module of the original class again. Equals `fused_spec` unless the code has changed."""
        raise NotImplementedError

    @staticmethod
    def _also_read(original: Any) -> tuple:
        """What a spec depends on besides the forward of the class. Each function is followed by its code."""
        return ()

    @classmethod
    def fused_recipe(cls) -> tuple[type["Fused"], Any]:
        """The mixin and the spec with which `fuse` made this module."""
        return cls._made_of[0], cls._made_of[2]

    def repack(self) -> None:
        """Packs again after the parameters were copied or moved."""

    def why_not_packed(self) -> str | None:
        """Why weights that the kernels read together are not packed, or None."""
        return None

    def _pack(self) -> list[Tensor]:
        """Packs weights and returns tensors on their old memory, like `weights.pack`."""
        return []

    def _unpack(self) -> list[Tensor]:
        """Undoes `_pack`."""
        return []

    def _get_name(self) -> str:
        return f"Fused{type(self).__name__}"

    def __reduce_ex__(self, protocol):
        # copy and pickle the module with the original class; `_restore` generates its class again
        cls = type(self)  # read once: another thread may unfuse the module meanwhile
        if not issubclass(cls, Fused):
            return cls.__reduce_ex__(self, protocol)
        reduced = super(Fused, cls).__reduce_ex__(self, protocol)
        if isinstance(reduced, str):
            return reduced
        mixin, original, spec = cls._made_of
        make, arguments, *state = (original if part is cls else part for part in reduced)
        arguments = tuple(original if argument is cls else argument for argument in arguments)
        complete = not state or state[0] is None
        return (_restore, (mixin, original, spec, make, arguments, complete), *state)


class _FusedType(type):
    """The type of generated classes. Each represents its original in `isinstance`, assignments and pickles."""

    def __instancecheck__(cls, instance: object) -> bool:
        # code that looks a class up by name expects every module of that class, fused or not
        return isinstance(instance, vars(cls).get("original_class", ())) or super().__instancecheck__(instance)

    def __setattr__(cls, name: str, value: Any) -> None:
        # a patch of `type(module)` is meant for every module of that class
        setattr(cls.original_class, name, value) if "_made_of" in vars(cls) else super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        delattr(cls.original_class, name) if "_made_of" in vars(cls) else super().__delattr__(name)


class _FusedABCMeta(_FusedType, ABCMeta):
    pass


_METACLASSES: dict[type, type] = {type: _FusedType, ABCMeta: _FusedABCMeta}


def _reduce_class(cls: Any) -> str | tuple:
    made_of = vars(cls).get("_made_of")
    return cls.__qualname__ if made_of is None else (fused_class, made_of)


for _metaclass in _METACLASSES.values():
    copyreg.pickle(_metaclass, _reduce_class)  # type: ignore[arg-type]


def fused_class(mixin: type[Fused], original: type[nn.Module], spec: Any) -> type[Fused]:
    """Returns the generated class `Name(mixin, Name)` for a class `Name`, always the same one while it is in use.

    Raises:
        TypeError: the original does not allow such a subclass.
    """
    made_of = mixin, original, spec
    with LOCK:
        code = getattr(original.forward, "__code__", None)
        was_read = original.forward, code, *mixin._also_read(original)
        for known in generated_classes(original):
            if known._made_of == made_of and all(map(operator.is_, known.was_read, was_read)):
                return known
        parameters = list(inspect.signature(original.forward).parameters.values())
        by_name = len(parameters) > 1 and parameters[1].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        attributes = {
            "fused_spec": spec,
            "original_class": original,
            "original_forward": staticmethod(original.forward),
            "original_code": code,
            "was_read": was_read,
            "input_name": parameters[1].name if by_name else None,
            "forward": _like(original.forward, mixin.forward),
            "_made_of": made_of,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
        }
        metaclass = _METACLASSES.get(type(original)) or type("_FusedType", (_FusedType, type(original)), {})
        # we do not call the metaclass, because it may register its classes by name
        return type.__new__(metaclass, original.__name__, (mixin, original), attributes)


def generated_classes(original: type) -> list[type[Fused]]:
    """The generated classes of this original that are in use."""
    return [cls for cls in original.__subclasses__() if "_made_of" in vars(cls)]


def _like(original: Callable, forward: Any) -> Callable:
    """A copy of `forward` with the signature, names and (for `inspect`) source of `original`."""
    copied = FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    return functools.update_wrapper(copied, original)


def _restore(
    mixin: type[Fused], original: type[nn.Module], spec: Any, make: Callable, arguments: tuple, complete: bool = False
) -> nn.Module:
    """Makes a copied or unpickled fused module, which is fused again as soon as it has its state."""
    module = make(*arguments)
    if type(module) is not original:
        return module
    if complete:
        _fuse_if_the_same(module, mixin, spec)
    else:
        # copying and unpickling look this up on the new object
        module.__dict__["__setstate__"] = functools.partial(_set_state, module, mixin, spec)
    return module


def _set_state(module: nn.Module, mixin: type[Fused], spec: Any, state: Any) -> None:
    del module.__dict__["__setstate__"]
    module.__setstate__(state)
    _fuse_if_the_same(module, mixin, spec)


def _fuse_if_the_same(module: nn.Module, mixin: type[Fused], spec: Any) -> None:
    """Fuses `module` if it still computes `spec`; its class may have been patched meanwhile."""
    if mixin.read_again(module) == spec:
        fuse(module, mixin, spec)


def why_not_swappable(module: nn.Module, mixin: type[Fused], spec: Any) -> str | None:
    """Why `module` cannot have a generated class, with the remedy; None if it can."""
    cls = type(module)
    theirs = {*module.__dict__, *module._modules, *module._parameters, *module._buffers, *_names_of(cls)}
    taken = theirs & _own_names(mixin)
    if taken:
        return f"its attribute {min(taken)!r} has a name that a fused module uses itself; pass exclude=[...]"
    try:
        fused_class(mixin, cls, spec)
    except Exception as error:  # from a metaclass, or because subclasses are not allowed
        return f"its class cannot have subclasses ({type(error).__name__}: {error}); pass exclude=[...]"
    return None


@functools.cache
def _own_names(mixin: type[Fused]) -> set[str]:
    """The names that a mixin adds to a class, except methods that call the original's."""
    annotated = {name for base in mixin.__mro__ for name in inspect.get_annotations(base)}
    names = {name for name in _names_of(mixin) | annotated if not name.startswith("__")}
    return names - {"forward", "_apply", "_get_name"}


def _names_of(cls: type) -> set[str]:
    """The names that `cls` and its bases define, without `nn.Module`."""
    return {name for base in cls.__mro__ if base not in nn.Module.__mro__ for name in vars(base)}


def fuse(module: nn.Module, mixin: type[Fused], spec: Any) -> None:
    """Fuses `module` in place."""
    _give_class(module, fused_class(mixin, type(module), spec))
    try:
        module.repack()
    except BaseException:  # interrupted; both weights still have the right values
        unfuse_module(module)
        raise


def was_changed(module: Fused) -> bool:
    """True if a class was derived from the generated one, as FSDP and parametrizations do."""
    return "_made_of" not in vars(type(module))


def unfuse_module(module: Fused) -> None:
    """Undoes `fuse`, bit for bit. Not for a module that `was_changed`."""
    replaced = module._unpack()
    _give_class(module, module.original_class)
    free_when_unread(replaced, module)


@contextmanager
def original_form(modules: Iterable[Fused]) -> Iterator[None]:
    """A context in which `modules` have their original classes. Weights stay packed, so nothing is copied."""
    with LOCK:
        classes = {module: type(module) for module in modules}
        try:
            for module in classes:
                _give_class(module, module.original_class)
            yield
        finally:
            for module, cls in classes.items():
                _give_class(module, cls)


def _give_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Changes the class of `module`, and the forward that accelerate keeps on the instance."""
    before = type(module).forward
    object.__setattr__(module, "__class__", cls)
    # code compiled by torch 2.11 notices a changed module only through its dictionaries
    module.__dict__["_class_given"] = None
    del module.__dict__["_class_given"]
    for name in ("forward", "_old_forward"):
        bound = module.__dict__.get(name)
        if getattr(bound, "__func__", None) is before and bound.__self__ is module:
            module.__dict__[name] = cls.forward.__get__(module)
