"""Results as plain JSON and a list of arrays, and back."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._jax._enumerations import member_at, member_indices, member_names
from ._events import Events
from ._kink_layer import KinkLayer
from ._ledger import Account, BatchSplit, Ledger
from ._margin_certificate import MarginCertificate
from ._reason import Reason
from ._stationary_kind import StationaryKind
from ._stats import Stats
from ._status import RESULTS
from ._trajectory import Trajectory

#: Everything that a trajectory is made of, by name.
_CLASSES = {
    cls.__name__: cls
    for cls in (
        Trajectory, Stats, Events, KinkLayer, Ledger, Account, BatchSplit, Reason,
        MarginCertificate,
    )
}  # fmt: skip
#: Fields whose containers are a user's: a file cannot know them.
_WITHOUT: dict[type, tuple[str, ...]] = {MarginCertificate: ("model",)}
_ENUMERATIONS = {cls.__name__: cls for cls in (RESULTS, StationaryKind)}


class UnknownContent(TypeError):
    """Something that has no place in a file."""


def encode(value: Any, arrays: list[np.ndarray]) -> Any:
    """`value` as JSON, with its arrays appended to `arrays`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _encode_array(value, arrays)
    for name, enumeration in _ENUMERATIONS.items():
        if isinstance(value, enumeration):
            index = encode(member_indices(value), arrays)
            members = list(member_names(enumeration))
            return {"enumeration": name, "members": members, "index": index}
    if _CLASSES.get(type(value).__name__) is type(value):
        return encode_fields(value, arrays, _WITHOUT.get(type(value), ()))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        value = _fields(value)
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise UnknownContent(f"a dictionary with keys {list(value)}")
        return {"dict": {key: encode(part, arrays) for key, part in value.items()}}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [encode(part, arrays) for part in value]}
    raise UnknownContent(f"an object of type {type(value).__name__}")


def encode_fields(
    value: Any, arrays: list[np.ndarray], without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """One of homoflow's own objects, with `None` for the fields to go `without`."""
    fields = {
        name: encode(None if name in without else part, arrays)
        for name, part in _fields(value).items()
    }
    return {"class": type(value).__name__, "fields": fields}


def decode(code: Any, arrays: list[np.ndarray]) -> Any:
    """What was encoded; named tuples of a user's as dictionaries."""
    if not isinstance(code, dict):
        return code
    match code:
        case {"array": place, "dtype": dtype, "key": implementation}:
            data = _as_array(arrays[place], dtype)
            if implementation is None:
                return data
            return jax.random.wrap_key_data(data, impl=implementation)
        case {"enumeration": name, "members": members, "index": index}:
            enumeration = _ENUMERATIONS[name]
            places = [member_names(enumeration).index(member) for member in members]
            indices = np.asarray(places, np.int32)[arrays[index["array"]]]
            return member_at(jnp.asarray(indices), enumeration)
        case {"class": name, "fields": fields}:
            parts = {key: decode(part, arrays) for key, part in fields.items()}
            return _make(_CLASSES[name], parts)
        case {"dict": items}:
            return {key: decode(part, arrays) for key, part in items.items()}
        case {"list": items}:
            return [decode(part, arrays) for part in items]
        case {"tuple": items}:
            return tuple(decode(part, arrays) for part in items)
    raise ValueError(f"an entry of an unknown kind, {list(code)}")


def _fields(value: Any) -> dict[str, Any]:
    if isinstance(value, tuple):
        names = value._fields  # pyright: ignore[reportAttributeAccessIssue]
        return dict(zip(names, value, strict=True))
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _make(cls: type, parts: dict[str, Any]) -> Any:
    """An instance with these fields.

    A batch was not made by the constructor, which expects the axes of a single run.
    """
    if not issubclass(cls, eqx.Module):
        return cls(**parts)
    made = object.__new__(cls)
    for field in dataclasses.fields(cls):
        if field.name in parts:
            value = parts[field.name]
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            raise ValueError(f"{cls.__name__} without {field.name!r}")
        object.__setattr__(made, field.name, value)
    return made


def _encode_array(value: Any, arrays: list[np.ndarray]) -> dict[str, Any]:
    implementation = None
    if isinstance(value, jax.Array) and jnp.issubdtype(
        value.dtype, jax.dtypes.prng_key
    ):
        implementation = str(jax.random.key_impl(value))
        value = jax.random.key_data(value)
    data = np.asarray(value)
    dtype = data.dtype.name
    if data.dtype.kind == "V":
        # NumPy's files know nothing of bfloat16 and its like.
        data = data.view(f"u{data.dtype.itemsize}")
    elif data.dtype.kind not in "biufc":
        raise UnknownContent(f"an array of dtype {dtype}")
    arrays.append(data)
    return {"array": len(arrays) - 1, "dtype": dtype, "key": implementation}


def _as_array(data: np.ndarray, dtype: str) -> jax.Array:
    """The array in the very dtype it had, whether JAX has 64 bits switched on or not."""
    if data.dtype.name != dtype:
        data = data.view(jnp.dtype(dtype))
    with jax.enable_x64(True):
        return jnp.asarray(data)
