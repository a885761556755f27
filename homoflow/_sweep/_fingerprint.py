"""What makes two sweeps the same, to the last bit."""

import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import platform
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np

from ._layout import layout_of, values_hash
from ._plan import Plan
from ._program import as_numbers

#: Packages whose versions can change the last digits of a run.
_PACKAGES = ("homoflow", "jax", "jaxlib", "diffrax", "equinox", "optax")
#: What a resumed sweep has to share with its store in any case.
_LAYOUT = ("layout", "values", "batch", "models")


def make_fingerprint(
    plan: Plan,
    run: Callable[..., Any],
    program: str | None,
    *,
    models: bool,
    retry: bool,
) -> dict[str, Any]:
    """Everything that decides about results; `program` is the compiled one's hash."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    found = {
        "layout": dataclasses.asdict(layout_of(plan)),
        "values": values_hash(plan),
        "batch": plan.batch,
        "models": models,
        "retry": retry,
        "function": _name_of(run),
        "program": _source_hash(run) if program is None else program,
        "versions": {**versions, "python": platform.python_version()},
        "backend": jax.default_backend(),
        "float64": bool(jax.config.jax_enable_x64),  # pyright: ignore[reportAttributeAccessIssue]
    }
    return json.loads(json.dumps(found))


def differences(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], bool]:
    """What differs, in words, and whether that is no more than `"force"` may pass over."""
    found, may_be_forced = [], True
    for key, value in new.items():
        if old.get(key) == value:
            continue
        may_be_forced = may_be_forced and key not in _LAYOUT
        found.append(_in_words(key, old.get(key), value))
    return found, may_be_forced


def _in_words(key: str, old: Any, new: Any) -> str:
    if key == "layout" and isinstance(old, dict):
        if old["axes"] == new["axes"]:
            return (
                f"chunks of {old['box']} settings along {old['inner']} there, {new['box']} "
                f"along {new['inner']} here (`chunk`, `vectorize`)"
            )
        return f"the settings are {_settings(old)} there, {_settings(new)} here"
    if key == "versions" and isinstance(old, dict):
        names = [n for n in new if old.get(n) != new[n]]
        return ", ".join(f"{n} {old.get(n)} there, {new[n]} here" for n in names)
    if key == "program":
        return (
            "`run` computes something else (its operations, or the data that it uses, "
            "are not the same)"
        )
    texts = {
        "values": "the values of some settings",
        "batch": "how many settings share a program (`chunk`, or the number of devices)",
        "function": "the name of `run`",
    }
    known = isinstance(old, str | int) and not texts.get(key)
    what = texts.get(key, f"`{key}`")
    return f"{what}: {old} there, {new} here" if known else f"{what} differ"


def _settings(layout: dict[str, Any]) -> str:
    columns = (c for axis in layout["axes"].values() for c in axis.items())
    return ", ".join(f"{name} {_shortened(values)}" for name, values in columns)


def _shortened(values: list[Any]) -> str:
    if len(values) <= 6:
        return str(values)
    return f"[{values[0]}, {values[1]}, …, {values[-1]}] ({len(values)})"


def _name_of(run: Callable[..., Any]) -> str:
    return getattr(run, "__qualname__", type(run).__qualname__)


def _source_hash(run: Callable[..., Any]) -> str:
    """A hash of a function's text and of the numbers and arrays that it closes over.

    For sweeps in which nothing is compiled as a whole. Functions that `run` calls are
    not looked into.
    """
    text = hashlib.sha256()
    function = inspect.unwrap(run)
    try:
        text.update(inspect.getsource(function).encode())
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        text.update(b"" if code is None else code.co_code)
    try:
        variables = inspect.getclosurevars(function)
        used = {**variables.nonlocals, **variables.globals}
    except (TypeError, ValueError):
        used = {}
    for name in sorted(used):
        for leaf in jax.tree.leaves(used[name], is_leaf=_is_iterator):
            if eqx.is_array_like(leaf):
                array = np.asarray(as_numbers(leaf) if eqx.is_array(leaf) else leaf)
                text.update(f"{name}{array.dtype}{array.shape}".encode())
                text.update(np.ascontiguousarray(array).tobytes())
    return text.hexdigest()[:32]


def _is_iterator(value: Any) -> bool:
    return isinstance(value, Iterator)
