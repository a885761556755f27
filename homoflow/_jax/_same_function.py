"""Functions that are written again, letter by letter, and compiled once."""

import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

#: What a function may refer to without being looked into: these do not change.
FIXED_PACKAGES = frozenset(
    {"builtins", "equinox", "functools", "jax", "math", "numpy", "operator", "optax"}
)
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_MAX_SIZE = 256

_known: "OrderedDict[Hashable, Callable]" = OrderedDict()


class _UnknownError(Exception):
    """What a function refers to may change."""


class Only:
    """Something equal to itself alone; kept, so that nothing else gets its place."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Only) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def same_function(function: Callable) -> Callable:
    """The function, or an earlier one of which everything is the same.

    JAX compiles anew for every function object, and a lambda in a loop or in a cell of a
    notebook is a new one each time. Two functions are the same if their code is, and all
    that they refer to: numbers, strings, and what JAX, NumPy, Optax and the like have.
    Anything else (arrays, objects, functions of one's own) might change, so that such a
    function is only itself.
    """
    if type(function) is not types.FunctionType:
        return function
    try:
        key = _content(function)
        hash(key)
    except (_UnknownError, TypeError, ValueError):
        return function
    same = _known.setdefault(key, function)
    _known.move_to_end(key)
    if len(_known) > _MAX_SIZE:
        _known.popitem(last=False)
    return same


def _content(function: types.FunctionType) -> Hashable:
    if function.__dict__:
        raise _UnknownError
    code = function.__code__
    cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
    defaults = function.__defaults__, tuple((function.__kwdefaults__ or {}).items())
    names = tuple(sorted(set(_global_names(code))))
    found = tuple(_global(function, name) for name in names)
    return _value((code, cells, defaults, names, found))


def _code_content(code: types.CodeType) -> Hashable:
    """What code does, wherever it is written."""
    return (
        code.co_name,
        code.co_code,
        _value(code.co_consts),
        (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars),
        (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount),
        (code.co_flags, getattr(code, "co_exceptiontable", b"")),
    )


def _global_names(code: types.CodeType) -> Iterator[str]:
    """All names that code, and code in it, may look up; attributes are among them."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def _global(function: types.FunctionType, name: str) -> Any:
    """What a name stands for, if it is a global one; attributes are of what is fixed."""
    builtins = sys.modules["builtins"].__dict__
    return function.__globals__.get(name, builtins.get(name))


def _value(value: Any) -> Hashable:
    """What is compared: by value if it cannot change, by identity if it does not."""
    if isinstance(value, _SCALARS):
        return type(value), repr(value)
    if isinstance(value, tuple):
        return tuple(map(_value, value))
    if isinstance(value, types.CodeType):
        return _code_content(value)
    kinds = types.FunctionType, types.BuiltinFunctionType, type
    name = None
    if isinstance(value, types.ModuleType):
        name = value.__name__
    elif isinstance(value, kinds):
        name = value.__module__
    if (name or "").partition(".")[0] in FIXED_PACKAGES:
        return Only(value)
    raise _UnknownError
