"""The source of a function, if it is short, plain and certainly the text that the function was compiled from.

All readers of forwards start here, so that they refuse the same code. The text is bounded, and the readers bound their
results.
"""

import ast
import builtins
import dis
import inspect
import textwrap
from functools import reduce
from types import CodeType, FunctionType

# several times what the known forwards of Transformers have
MOST_BYTES = 4096  # of bytecode
MOST_CHARACTERS = 20_000  # of text, docstring and comments included


class Unreadable(Exception):
    """A forward contains something that its reader does not know: its argument, a node of the source, if one says."""


def source_of(function: FunctionType) -> ast.FunctionDef:
    """The definition that `function` was compiled from.

    Raises:
        OSError: there is no source.
        Unreadable: it is long, not that of a plain method (`self`, which stays what it is, and other arguments that
            may be given by position; no decorators, nothing from a scope around it), or not of this one.
    """
    if len(function.__code__.co_code) > MOST_BYTES or function.__closure__:
        raise Unreadable
    text = inspect.getsource(function)
    if len(text) > MOST_CHARACTERS:
        raise Unreadable
    source = ast.parse(textwrap.dedent(text)).body[0]
    if not isinstance(source, ast.FunctionDef) or not _is_plain(source) or not _is_source_of(function, source):
        raise Unreadable
    return source


def meaning_of(function: FunctionType, name: str) -> object:
    """The object that a dotted name refers to in the module of `function`, or None."""
    first, *attributes = name.split(".")
    try:
        return reduce(getattr, attributes, function.__globals__.get(first, getattr(builtins, first, None)))
    except Exception:  # lazily loading modules may raise anything
        return None


def _is_plain(source: ast.FunctionDef) -> bool:
    arguments = source.args
    special = arguments.posonlyargs or arguments.vararg or arguments.kwonlyargs or arguments.kwarg
    if special or source.decorator_list or not arguments.args:
        return False
    names = (node for node in ast.walk(source) if isinstance(node, ast.Name))
    return not any(name.id == arguments.args[0].arg and isinstance(name.ctx, ast.Store) for name in names)


def _is_source_of(function: FunctionType, source: ast.FunctionDef) -> bool:
    """True if `function` was compiled from `source`; the file may have changed since, or a wrapper point elsewhere."""
    compiled = compile(ast.Module([source], []), "", "exec").co_consts
    code = next(code for code in compiled if isinstance(code, CodeType) and code.co_name == source.name)
    signature = ("co_varnames", "co_argcount", "co_kwonlyargcount", "co_posonlyargcount")
    same = all(getattr(code, name) == getattr(function.__code__, name) for name in signature)
    return same and _steps(code) == _steps(function.__code__)


def _steps(code: CodeType) -> list[tuple[str, object]]:
    """The instructions of `code`, without those that depend on the module around it."""
    steps = []
    for step in dis.get_instructions(code):
        if step.opname not in ("PUSH_NULL", "EXTENDED_ARG"):
            target = step.opcode in dis.hasjrel or step.opcode in dis.hasjabs
            steps.append((step.opname.replace("LOAD_METHOD", "LOAD_ATTR"), None if target else step.argval))
    return steps
