"""Checks that the functions and forwards that the kernels replace are those that their packages define.

Profilers, debuggers and emulators of number formats replace `torch.nn.functional.linear` or the forward of a class,
perhaps before this package is imported, so we cannot trust what we see first. A function counts as its package's own
if its code belongs to the namespace of the module that should define it, because `functools.wraps` copies names but
not the namespace.
"""

import sys
from collections.abc import Callable
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def is_own(function: Any, module: str, qualname: str) -> bool:
    """True if `function` is what `module` defines as `qualname`: its Python code, or a builtin of that name."""
    if type(function) is BuiltinFunctionType:
        return function.__name__ == qualname
    if type(function) is not FunctionType or function.__globals__ is not vars(sys.modules.get(module, sys)):
        return False
    code = function.__code__
    return getattr(code, "co_qualname", qualname) == qualname and code.co_name == qualname.rpartition(".")[2]


# the functions that the kernels replace, by the variable below that holds PyTorch's original
_FUNCTIONS: dict[str, tuple[Any, str]] = {
    "_linear": (F, "linear"),
    "_silu": (F, "silu"),
    "_gelu": (F, "gelu"),
    "_relu": (F, "relu"),
    "_dropout": (F, "dropout"),
    "_torch_relu": (torch, "relu"),
    "_sigmoid": (torch, "sigmoid"),
    "_tanh": (torch, "tanh"),
    "_square": (torch, "square"),
    "_pow": (torch, "pow"),
    "_erf": (torch, "erf"),
    "_rsqrt": (torch, "rsqrt"),
    "_addmm": (torch, "addmm"),
    "_call": (nn.Module, "_wrapped_call_impl"),
    "_call_impl": (nn.Module, "_call_impl"),
}
_linear = _silu = _gelu = _relu = _dropout = _call = _call_impl = object()
_torch_relu = _sigmoid = _tanh = _square = _pow = _erf = _rsqrt = _addmm = object()


def functions_are_own() -> bool:
    """True if every function that the kernels replace is PyTorch's own. Compiled code traces this."""
    return (
        F.linear is _linear
        and F.silu is _silu
        and F.gelu is _gelu
        and F.relu is _relu
        and F.dropout is _dropout
        and torch.relu is _torch_relu
        and torch.sigmoid is _sigmoid
        and torch.tanh is _tanh
        and torch.square is _square
        and torch.pow is _pow
        and torch.erf is _erf
        and nn.Module.__call__ is _call
        and nn.Module._call_impl is _call_impl
    )


# for each activation, a check of the functions that its modules call; for other activations all functions are compared
_ACTIVATION_IS_OWN: dict[str, Callable[[], bool]] = {
    "gelu": lambda: F.gelu is _gelu and torch.erf is _erf,
    "gelu_tanh": lambda: F.gelu is _gelu and torch.tanh is _tanh and torch.pow is _pow,
    "quick_gelu": lambda: torch.sigmoid is _sigmoid,
    "relu": lambda: F.relu is _relu and torch.relu is _torch_relu,
    "relu2": lambda: F.relu is _relu and torch.square is _square,
    "identity": lambda: True,
}


def are_own_at_a_glance(activation: str) -> bool:
    """Fast form of `functions_are_own` for one MLP's activation, and of `runs_own_forward(nn.Linear)`."""
    return (
        F.linear is _linear
        and F.dropout is _dropout
        and _OF_MODULE["__call__"] is _call
        and _OF_MODULE["_call_impl"] is _call_impl
        and _OF_LINEAR["forward"] is _linear_forward
        and "__call__" not in _OF_LINEAR
        and _linear_forward.__code__ is _linear_code
        and (F.silu is _silu if activation == "silu" else _ACTIVATION_IS_OWN.get(activation, functions_are_own)())
    )


def rsqrt_is_own() -> bool:
    """The same check for `torch.rsqrt`, the only function that RMSNorms call."""
    return torch.rsqrt is _rsqrt


def addmm_is_own() -> bool:
    """The same check for `torch.addmm`, which `Conv1D` calls in place of `F.linear`. Compiled code traces this."""
    return torch.addmm is _addmm


def why_functions_are_not_own() -> str | None:
    """Says which function was replaced, or None. Also updates the variables that `functions_are_own` compares with."""
    reason = None
    for variable, (owner, name) in _FUNCTIONS.items():
        function = getattr(owner, name)
        module = "torch.nn.modules.module" if owner is nn.Module else owner.__name__
        qualname = f"Module.{name}" if owner is nn.Module else name
        if is_own(function, module, qualname):
            globals()[variable] = function
        elif reason is None:
            reason = f"{module}.{qualname} was replaced by {path_of(function)}; undo the patch"
    if reason is None and nn.Module.__call__ is not _call:
        reason = f"torch.nn.Module.__call__ was replaced by {path_of(nn.Module.__call__)}; undo the patch"
    return reason


def path_of(function: Any) -> str:
    """The module and name of the code of `function`; not the names of `function`, which `functools.wraps` copies."""
    code = getattr(function, "__code__", None)
    if code is None:
        return repr(function)
    module = getattr(function, "__globals__", {}).get("__name__", "?")
    return f"{module}.{getattr(code, 'co_qualname', code.co_name)}"


def is_patched(cls: type[nn.Module]) -> bool:
    """True if the forward of `cls` is not the one that its module defines, but code of another package."""
    forward: Any = cls.forward
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    if is_own(forward, owner.__module__, f"{owner.__qualname__}.forward"):
        return False
    # a decorator of the same package belongs to it
    package = getattr(forward, "__globals__", {}).get("__name__", "").partition(".")[0]
    return package != owner.__module__.partition(".")[0]


# the code of forwards that `runs_own_forward` accepted; the modules of these classes keep them alive anyway
own_forwards: dict[type[nn.Module], CodeType] = {}


# Compiled code keeps the result at tracing time among the globals of the compiled module, under the function's name,
# so the name must be unique.
@torch.compiler.assume_constant_result
def hf_fused_mlp_runs_own_forward(cls: type[nn.Module]) -> bool:
    """True if `cls` is the class that its module defines under its name, with the forward that is written there."""
    forward: Any = cls.forward
    if cls.__call__ is not nn.Module.__call__:
        return False
    if cls in own_forwards and own_forwards[cls] is getattr(forward, "__code__", None):
        return True
    if vars(sys.modules.get(cls.__module__, sys)).get(cls.__qualname__) is not cls:
        return False
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    if not is_own(forward, owner.__module__, f"{owner.__qualname__}.forward"):
        return False
    own_forwards[cls] = forward.__code__
    return True


runs_own_forward = hf_fused_mlp_runs_own_forward


def _own_class(module: str, name: str) -> type[nn.Module] | None:
    """PyTorch's class of that name, or None if another class took its place."""
    cls = getattr(sys.modules[module], name)
    return cls if cls.__module__ == module and runs_own_forward(cls) else None


why_functions_are_not_own()
# not looked up in `torch.nn`, where emulators of number formats put their own classes
LINEAR = _own_class("torch.nn.modules.linear", "Linear")
# dictionary lookups are faster than attribute lookups in classes
_OF_MODULE, _OF_LINEAR = vars(nn.Module), vars(LINEAR or nn.Linear)
_linear_forward: Any = LINEAR.forward if LINEAR else object()
_linear_code = getattr(_linear_forward, "__code__", None)
IDENTITIES = tuple(
    cls
    for cls in (_own_class("torch.nn.modules.dropout", "Dropout"), _own_class("torch.nn.modules.linear", "Identity"))
    if cls is not None
)
for _name in ("SiLU", "GELU", "ReLU"):
    _own_class("torch.nn.modules.activation", _name)
