"""What a function reads beside its arguments, to be compared before it is trusted again."""

import builtins
import dataclasses
import dis
import enum
import functools
import hashlib
import inspect
import types
from collections.abc import Hashable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from ._same_function import FIXED_PACKAGES, Only

#: Packages whose functions and classes do not change while Python runs.
_FIXED = FIXED_PACKAGES | {
    "collections", "dataclasses", "diffrax", "homoflow", "itertools", "jaxlib",
    "jaxtyping", "lineax", "optimistix", "typing",
}  # fmt: skip
_SCALARS = (bool, int, float, complex, str, bytes, type(None), range, slice, np.dtype)
#: Of fixed packages what gives another answer each time, or one from outside of Python.
_CHANGING_BUILTINS = (
    "open", "input", "eval", "exec", "compile", "globals", "locals", "vars", "dir", "id",
    "__import__",
)  # fmt: skip
_CHANGING_NUMPY = (
    "random", "load", "loadtxt", "genfromtxt", "fromfile", "fromregex", "memmap",
)  # fmt: skip
_CHANGING = tuple(
    getattr(package, name)
    for package, names in (
        (builtins, _CHANGING_BUILTINS),
        (np, _CHANGING_NUMPY),
        (jnp, ("load", "fromfile")),
        (eqx, ("tree_deserialise_leaves",)),
    )
    for name in names
)
#: What a class has of itself or by its metaclass, beside what its author wrote.
_OF_PYTHON = (
    "__abstractmethods__", "__annotations__", "__dataclass_fields__",
    "__dataclass_params__", "__dict__", "__doc__", "__firstlineno__", "__module__",
    "__orig_bases__", "__parameters__", "__static_attributes__", "__weakref__", "_abc_impl",
)  # fmt: skip
#: The flag of classes that were made while Python runs, by a statement `class`.
_IS_OF_PYTHON = 1 << 9
_JITTED = type(jax.jit(abs))
#: More than this is not compared: tracing again costs no more.
_MAX_PARTS = 20_000
_LOADS_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_LOADS_CELL = {"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"}
_LOADS_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD"}
_CHANGES_GLOBALS = {"STORE_GLOBAL", "DELETE_GLOBAL"}


class _UnknownError(Exception):
    """What a function reads cannot be compared."""


class _Names(NamedTuple):
    """What code looks up: names with the attributes taken of them, `("jnp", "sin")`.

    - `paths`: from a global name or a variable of an enclosing function.
    - `imports`: modules that are imported while the code runs.
    """

    paths: frozenset[tuple[str, ...]]
    imports: frozenset[str]


def dependencies_of(value: Any) -> Hashable | None:
    """All that a function (or what it is made of) reads, as something to compare.

    Two that are equal compute the same of the same arguments. It has the function's code,
    its defaults, the variables that it closes over, and the global names that it looks
    up, with those of the functions and classes of one's own that it calls: numbers and
    NumPy's arrays by their values, JAX's arrays, which do not change, as the objects that
    they are. `None` if something cannot be compared: an object with a state of its own,
    a file, a clock, random numbers that are not JAX's.
    """
    try:
        return _Reader().read(value)
    except (_UnknownError, RecursionError):
        return None


def jax_settings() -> Hashable:
    """All settings of JAX as they are here and now, of `with` blocks too."""
    names = sorted(jax.config.values)  # pyright: ignore[reportAttributeAccessIssue]
    return tuple((name, getattr(jax.config, name, None)) for name in names)


class _Reader:
    """One pass through everything that can be reached."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._kept: list[Any] = []  # An object that is gone would give away its number.

    def read(self, value: Any) -> Hashable:
        if isinstance(value, jax.core.Tracer):
            raise _UnknownError
        if type(value) in _SCALARS or isinstance(value, np.dtype):
            return type(value), repr(value)  # So that nan is nan, and 0.0 is not -0.0.
        if id(value) in self._places:
            return "again", self._places[id(value)]
        if len(self._kept) >= _MAX_PARTS:
            raise _UnknownError
        self._places[id(value)] = len(self._kept)
        self._kept.append(value)
        return self._read_new(value)

    def _read_new(self, value: Any) -> Hashable:
        if isinstance(value, np.ndarray | np.generic):
            return _of_numpy(value)
        if isinstance(value, jax.Array | inspect.Signature) or value is Ellipsis:
            return Only(value)
        if type(value) in (tuple, list):
            return type(value), *map(self.read, value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self.read(type(value)), *map(self.read, value)
        if type(value) is dict or isinstance(value, types.MappingProxyType):
            return dict, *((self.read(k), self.read(v)) for k, v in value.items())
        if type(value) in (set, frozenset) and all(type(v) in _SCALARS for v in value):
            return type(value), frozenset(map(self.read, value))
        if isinstance(value, types.FunctionType):
            return self._of_function(value)
        if isinstance(value, type):
            return self._of_class(value)
        if isinstance(value, types.MethodType):
            return (
                types.MethodType,
                self.read(value.__func__),
                self.read(value.__self__),
            )
        if isinstance(value, functools.partial):
            parts = value.func, value.args, value.keywords, vars(value)
            return functools.partial, *map(self.read, parts)
        if isinstance(value, property):
            return property, *map(self.read, (value.fget, value.fset))
        if isinstance(value, staticmethod | classmethod):
            return type(value), self.read(value.__func__)
        if type(value) is types.SimpleNamespace or _is_plain_dataclass(value):
            return self.read(type(value)), self.read(vars(value))
        if _is_fixed(_module_of(value)):
            return _unless_changing(value)
        if isinstance(value, _JITTED):
            return Only(value), self.read(getattr(value, "__wrapped__"))  # noqa: B009
        raise _UnknownError

    def _of_function(self, function: types.FunctionType) -> Hashable:
        cells = _cells(function)
        own = [
            function.__code__,
            self.read(cells),
            self.read(function.__defaults__),
            self.read(function.__kwdefaults__),
            self.read(function.__dict__),
        ]
        if _is_fixed(function.__module__):
            return *own, _unless_changing(function)
        names = _names_of(function.__code__)
        for module in sorted(names.imports):
            if not _is_fixed(module) or module.partition(".")[0] == "numpy":
                raise _UnknownError
        scope = {**builtins.__dict__, **function.__globals__, **cells}
        return *own, *(self._at_path(scope, path) for path in sorted(names.paths))

    def _at_path(self, scope: dict[str, Any], path: tuple[str, ...]) -> Hashable:
        """What stands at `module.….name`; of an object that is no module the whole."""
        name, *attributes = path
        if name not in scope:
            return path, "missing"
        value = scope[name]
        for attribute in attributes:
            if not isinstance(value, types.ModuleType):
                break
            _unless_changing(value)
            if not hasattr(value, attribute):
                return path, "missing"
            value = getattr(value, attribute)
        if isinstance(value, types.ModuleType):  # Anything may be taken of it.
            raise _UnknownError
        return path, self.read(value)

    def _of_class(self, value: type) -> Hashable:
        if _is_fixed(value.__module__):
            return _unless_changing(value)
        if issubclass(value, enum.Enum):
            raise _UnknownError
        parts = [
            (name, self.read(part))
            for base in value.__mro__
            if not _is_fixed(base.__module__)
            for name, part in vars(base).items()
            if name not in _OF_PYTHON
        ]
        return Only(value), *parts


def _of_numpy(array: np.ndarray | np.generic) -> Hashable:
    if array.dtype.hasobject:
        raise _UnknownError
    data = np.ascontiguousarray(array)
    digest = hashlib.sha256(data.tobytes()).hexdigest()
    return type(array), repr(array.dtype.descr), array.shape, digest


def _cells(function: types.FunctionType) -> dict[str, Any]:
    """The variables of enclosing functions that a function uses."""
    names = function.__code__.co_freevars
    try:
        values = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError as error:  # One has no value yet.
        raise _UnknownError from error
    return dict(zip(names, values, strict=True))


@functools.lru_cache(1024)
def _names_of(code: types.CodeType) -> _Names:
    """What code looks up, with all code inside of it."""
    paths, imports = set(), set()
    path: tuple[str, ...] = ()
    for step in dis.get_instructions(code):
        if step.opname == "EXTENDED_ARG":
            continue
        if step.opname in _CHANGES_GLOBALS:
            raise _UnknownError
        if path and step.opname in _LOADS_ATTRIBUTE:
            path = (*path, str(step.argval))
            continue
        paths.add(path)
        is_name = step.opname in _LOADS_GLOBAL | _LOADS_CELL
        path = (str(step.argval),) if is_name else ()
        if step.opname == "IMPORT_NAME":
            imports.add(str(step.argval))
    paths.add(path)
    inner = [_names_of(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return _Names(
        frozenset(paths.union(*(names.paths for names in inner)) - {()}),
        frozenset(imports.union(*(names.imports for names in inner))),
    )


def _is_fixed(module: Any) -> bool:
    # Python's own modules in C begin with a line.
    return str(module).partition(".")[0].removeprefix("_") in _FIXED


def _module_of(value: Any) -> str:
    """Where a function that is not Python's own kind is from; `""` for other objects."""
    if isinstance(value, types.BuiltinFunctionType):
        owner = value.__self__  # A method of an object goes by what that holds.
        return owner.__name__ if isinstance(owner, types.ModuleType) else ""
    if isinstance(value, np.ufunc | type(np.linspace)):
        return "numpy"
    return str(getattr(value, "__dict__", {}).get("__module__", ""))


def _unless_changing(value: Any) -> Only:
    if any(value is known for known in _CHANGING):
        raise _UnknownError
    return Only(value)


def _is_plain_dataclass(value: Any) -> bool:
    """Whether all that an object holds is in its `__dict__`."""
    bases = type(value).__mro__[:-1]
    return (
        dataclasses.is_dataclass(value)
        and hasattr(value, "__dict__")
        and all(base.__flags__ & _IS_OF_PYTHON for base in bases)
        and not any(vars(base).get("__slots__") for base in bases)
    )
