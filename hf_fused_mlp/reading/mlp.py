"""Finds which MLP a module computes, from its forward or from the registered spec of exactly its class.

Dropout and identity modules of an instance are removed, because kernels run in evaluation mode only. The rest must be
one of the equations of `MLPKind`, with projections and a known activation in their places.
"""

import weakref
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from hf_fused_mlp.activations import ACTIVATIONS
from hf_fused_mlp.originals import IDENTITIES, path_of
from hf_fused_mlp.reading.activations import find_activation
from hf_fused_mlp.reading.expression import (
    Call,
    Cast,
    Dropout,
    Function,
    Half,
    Input,
    Product,
    Step,
    calls_in,
    equation_of,
    in_a_row,
    is_usual,
)

SEQUENTIAL_FORWARD = nn.Sequential.forward  # PyTorch's original, in case a patch replaces it


class MLPKind(str, Enum):
    """The equations of Transformers' MLPs; gated and packed compute the same one."""

    GATED = "gated"  # down(act(gate(x)) * up(x)), two projections for gate and up
    PACKED = "packed"  # the same, with gate and up the two halves of one projection
    PLAIN = "plain"  # down(act(up(x)))
    HALF = "half"  # act(up(x)), as in BERT, where down belongs to another module


@dataclass(frozen=True)
class MLPSpec:
    """What an MLP class computes, by the names of its attributes.

    Args:
        kind: the equation.
        up, down: names of the `nn.Linear` projections. In a packed MLP, `up` holds the rows of gate, then those of up.
            Half an MLP has no `down`.
        activation: name of the activation module; None if the forward calls a function.
        gate: name of the gate projection, for a gated MLP only.
        function: key of `ACTIVATIONS` for the function that the forward calls, if there is no activation module.
        dropouts: names of the dropout and identity modules in the forward; they do nothing in evaluation mode.
        up_first: a packed MLP holds the rows of up before those of gate.
        sequence: for an `nn.Sequential`, the names of all children in order.
        other_steps: the forward casts, drops out without a module, or cannot be read. Then only the kernels or the
            whole original forward may run, not its projections one by one.
        unread: the forward cannot be read, so it may call children that are not named here. While such a child has
            hooks, the original forward runs. Set for what was registered.

    Raises:
        ValueError: `gate` missing for a gated MLP, or given for another kind; `down` given for half an MLP, or missing
            for another kind; both or neither of `activation` and `function` given; unknown `function`.
    """

    kind: MLPKind
    up: str
    down: str | None = None
    activation: str | None = None
    gate: str | None = None
    function: str | None = None
    dropouts: tuple[str, ...] = ()
    up_first: bool = False
    sequence: tuple[str, ...] = ()
    other_steps: bool = False
    unread: bool = False

    def __post_init__(self):
        object.__setattr__(self, "kind", MLPKind(self.kind))
        if (self.kind is MLPKind.GATED) != (self.gate is not None):
            expected = "the gate projection's name" if self.kind is MLPKind.GATED else "None"
            raise ValueError(f"MLPSpec(kind={self.kind.value!r}, gate={self.gate!r}): gate must be {expected}")
        if (self.kind is MLPKind.HALF) != (self.down is None):
            expected = "None" if self.kind is MLPKind.HALF else "the down projection's name"
            raise ValueError(f"MLPSpec(kind={self.kind.value!r}, down={self.down!r}): down must be {expected}")
        if (self.activation is None) == (self.function is None):
            given = f"activation={self.activation!r}, function={self.function!r}"
            raise ValueError(f"MLPSpec({given}): name the activation's module, or the function, not both")
        if self.function is not None and self.function not in ACTIVATIONS:
            raise ValueError(f"MLPSpec(function={self.function!r}): expected one of {', '.join(ACTIVATIONS)}")

    # cached, since every call of a module reads them
    @cached_property
    def first(self) -> tuple[str, ...]:
        """Names of the projections before the activation, gate first if there is one."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @cached_property
    def projections(self) -> tuple[str, ...]:
        """Names of all projections, in the order of the equation."""
        return self.first if self.down is None else (*self.first, self.down)

    @cached_property
    def children(self) -> tuple[str, ...]:
        """Names of all children that the forward calls."""
        return (*self.projections, *self.dropouts) + (() if self.activation is None else (self.activation,))

    @cached_property
    def halves(self) -> tuple[int, int] | None:
        """Which half of a packed projection's output is gate and which is up; None for other kinds."""
        if self.kind is not MLPKind.PACKED:
            return None
        return (1, 0) if self.up_first else (0, 1)


# classes given to `register_mlp`, and the forward that each had then
MLP_SPECS: MutableMapping[type[nn.Module], tuple[MLPSpec, Callable[[], Any]]] = WeakKeyDictionary()


def register_mlp(cls: type[nn.Module], spec: MLPSpec) -> None:
    """Makes `cls`, and no subclass of it, fusable from now on; a later call for the same class replaces the spec.

    Raises:
        TypeError: `cls` is not an `nn.Module` class, or `spec` not an `MLPSpec`.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_mlp: {cls!r} is not an nn.Module class; pass the class, not an instance or a name")
    if not isinstance(spec, MLPSpec):
        raise TypeError(f"register_mlp({cls.__name__}): {spec!r} is not an MLPSpec")
    MLP_SPECS[cls] = spec, _weak(cls.forward)


def _weak(forward: Callable) -> Callable[[], Any]:
    """A function that returns `forward` while someone else keeps it alive; a forward may refer to its class."""
    try:
        return weakref.ref(forward)
    except TypeError:  # a builtin, for example, which refers to no class
        return lambda: forward


def registered_spec(cls: type[nn.Module]) -> MLPSpec | None:
    """The spec registered for exactly this class, or None."""
    return MLP_SPECS.get(cls, (None,))[0]


def was_patched_since(cls: type[nn.Module]) -> bool:
    """True if `cls` was registered and has another forward since."""
    return cls in MLP_SPECS and cls.forward is not MLP_SPECS[cls][1]()


def patched_reason(cls: type[nn.Module]) -> str:
    """Why a class whose forward is no longer the one that its spec describes is skipped."""
    return (
        f"the forward of {cls.__name__} was replaced by {path_of(cls.forward)}; undo the patch, or, if it computes "
        f"the same, call register_mlp({cls.__name__}, MLPSpec(...))"
    )


def find_spec(module: nn.Module) -> MLPSpec | None:
    """What `module` computes, from the registered spec of its class or from its forward; None if unknown."""
    registered, read = registered_spec(type(module)), recognise(module)
    if registered is None:
        return read
    # a registered spec says what the kernels compute, not what else the forward does in training
    steps = read is None or read.other_steps or registered.other_steps
    return replace(registered, other_steps=steps, unread=read is None)


def recognise(module: nn.Module) -> MLPSpec | None:
    """What `module` computes according to its forward; None if it is not an MLP or cannot be read."""
    cls: Any = type(module)
    if not is_usual(cls):
        return None
    sequence: tuple[str, ...] = ()
    equation: Step | None
    if cls.forward is SEQUENTIAL_FORWARD and getattr(cls, "__iter__", None) is nn.Sequential.__iter__:
        sequence = tuple(module._modules)
        equation = in_a_row(sequence)
    else:
        equation = equation_of(cls.forward)
    if equation is None:
        return None
    removed: list[Call | Cast | Dropout] = []
    equation = _simplified(equation, module, removed)
    spec = _match(equation, module, tuple(step.name for step in removed if isinstance(step, Call)))
    # all projections share a dtype, so a cast to that of a projection does nothing; another cast might
    if spec is None or not {step.name for step in removed if isinstance(step, Cast)} <= set(spec.projections):
        return None
    return replace(spec, sequence=sequence, other_steps=any(not isinstance(step, Call) for step in removed))


def is_known(cls: Any) -> bool:
    """True if the class is registered or its forward can be read."""
    return registered_spec(cls) is not None or (is_usual(cls) and equation_of(cls.forward) is not None)


def unknown_child(module: nn.Module) -> str | None:
    """The name of the one child in a readable forward that has no weights and is no known activation, or None."""
    cls: Any = type(module)
    equation = equation_of(cls.forward) if is_usual(cls) else None
    children = {call.name: _child(module, call.name) for call in calls_in(equation)}
    bare = {name: child for name, child in children.items() if child is not None and not list(child.parameters())}
    unknown = [name for name, child in bare.items() if type(child) not in IDENTITIES and not find_activation(child)]
    return unknown[0] if len(unknown) == 1 else None


def _child(module: nn.Module, name: str) -> nn.Module | None:
    """The submodule that `self.<name>` refers to, or None if it refers to something else."""
    hidden = name in module.__dict__ or any(name in base.__dict__ for base in type(module).__mro__)
    return None if hidden else module._modules.get(name)


def _simplified(equation: Any, module: nn.Module, removed: list[Call | Cast | Dropout]) -> Step:
    """`equation` without the steps that do nothing in evaluation mode; those are appended to `removed`."""
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
    """The spec of the MLP that `equation` computes on `module`, or None."""
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
    # in an nn.Sequential, a projection and an activation may be part of anything
    if (activation := _activation(equation, module)) and type(module).forward is not SEQUENTIAL_FORWARD:
        match equation.of:
            case Call(up_name, Input()):
                return _spec(MLPKind.HALF, {"up": up_name}, activation, module, dropped)
    return None


def _activation(step: object, module: nn.Module) -> dict[str, str] | None:
    """The fields of a spec that name the activation applied by `step`, or None if it applies no known one."""
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
    """True if a child multiplies with a matrix: it has a 2-D weight, or is an `nn.Linear`."""
    matrix = getattr(getattr(child, "weight", None), "ndim", 0) == 2 and not isinstance(child, nn.Embedding)
    return matrix or isinstance(child, nn.Linear)  # whose weight a quantizer may have replaced
