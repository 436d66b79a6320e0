"""Giving a module a generated class, and its own again.

A module is fused by giving it a class such as `FusedLlamaMLP(FusedGatedMLP, LlamaMLP)`: it stays the same object, with
the same children, hooks and attributes and none of ours, and is unfused by giving its class back.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn


class Fused(nn.Module if TYPE_CHECKING else object):  # type: ignore[misc]
    """What all fused modules share; a subclass with the forward is mixed in before the original class."""

    fused_spec: ClassVar[Any]
    original_class: ClassVar[type[nn.Module]]
    original_forward: ClassVar[Callable]
    input_name: ClassVar[str]
    _made_of: ClassVar[tuple]

    def repack(self) -> None:
        """Restores the packing that copying or moving the parameters undid."""

    def _unpack(self) -> None:
        """Gives every parameter memory of its own again."""

    def __reduce_ex__(self, protocol):
        # generated classes have no importable name: copies and pickles name what they are generated from
        return (_new, self._made_of, *super().__reduce_ex__(protocol)[2:])


@cache
def fused_class(mixin: type[Fused], original: type[nn.Module], spec: Any) -> type[Fused]:
    """The class `FusedName(mixin, Name)` for a class `Name`; the same one for every call."""
    attributes = {
        "fused_spec": spec,
        "original_class": original,
        "original_forward": staticmethod(original.forward),
        "input_name": list(inspect.signature(original.forward).parameters)[1],
        "_made_of": (mixin, original, spec),
        "__module__": mixin.__module__,
        "__doc__": original.__doc__,
    }
    return type(f"Fused{original.__name__}", (mixin, original), attributes)


def _new(mixin: type[Fused], original: type[nn.Module], spec: Any) -> Fused:
    cls = fused_class(mixin, original, spec)
    return cls.__new__(cls)


def fuse(module: nn.Module, mixin: type[Fused], spec: Any) -> None:
    """Turns `module` into its fused form, in place."""
    _give_class(module, fused_class(mixin, type(module), spec))
    try:
        module.repack()
    except BaseException:  # out of memory, or interrupted: both weights still hold the right values
        unfuse_module(module)
        raise


def was_changed(module: Fused) -> bool:
    """Whether another class was put on top of the generated one, as FSDP and parametrizations do."""
    return "_made_of" not in vars(type(module))


def unfuse_module(module: Fused) -> None:
    """The inverse of `fuse`, bit for bit, unless it `was_changed`."""
    module._unpack()
    _give_class(module, module.original_class)


@contextmanager
def original_form(modules: Iterable[Fused]) -> Iterator[None]:
    """Gives `modules` their original classes meanwhile; weights stay where they are, so nothing is copied."""
    classes = {module: type(module) for module in modules}
    try:
        for module in classes:
            _give_class(module, module.original_class)
        yield
    finally:
        for module, cls in classes.items():
            _give_class(module, cls)


def _give_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Changes the class, and with it the forward that accelerate keeps on the instance."""
    before = type(module).forward
    module.__class__ = cls
    # compiled code of torch 2.11 looks at a module again only when a dictionary of it has changed
    module.__dict__["_class_given"] = None
    del module.__dict__["_class_given"]
    for name in ("forward", "_old_forward"):
        bound = module.__dict__.get(name)
        if getattr(bound, "__func__", None) is before and bound.__self__ is module:
            module.__dict__[name] = cls.forward.__get__(module)
