"""What people pass in the wrong kind, refused by a sentence that says what to write."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._text import short_repr
from ._tracing import is_concrete


def check_number(name: str, value: Any) -> None:
    """`TypeError` unless it is a real number, `ValueError` if there are several.

    Booleans, strings and complex numbers are none. Traced numbers are.
    """
    if isinstance(value, type) or callable(value):
        raise TypeError(f"`{name}` must be one number; got {short_repr(value)}.")
    if not _has_real_dtype(value):
        raise TypeError(
            f"`{name}` must be a real number, such as 0.5; got {short_repr(value)}."
        )
    if np.ndim(value) != 0:
        raise ValueError(f"`{name}` must be one number; got shape {np.shape(value)}.")


def check_flag(name: str, value: Any, *, may_be_none: bool = False) -> None:
    """`TypeError` unless it is `True` or `False`."""
    if isinstance(value, bool | np.bool_) or (value is None and may_be_none):
        return
    choices = "True, False or None" if may_be_none else "True or False"
    raise TypeError(f"`{name}` must be {choices}; got {short_repr(value)}.")


def check_key(key: Any) -> None:
    """`TypeError` unless it is a random key of JAX, `ValueError` if there are several."""
    if isinstance(key, type) or not hasattr(key, "dtype") or not hasattr(key, "shape"):
        raise TypeError(
            "`key` must be a random key of JAX, such as `jax.random.key(0)`; got "
            f"{short_repr(key)}."
        )
    is_new = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not is_new and key.dtype != np.uint32:
        raise TypeError(
            "`key` must be a random key of JAX, such as `jax.random.key(0)`; got an array "
            f"of type {key.dtype}."
        )
    axes = len(key.shape) if is_new else len(key.shape) - 1
    if axes != 0:
        raise ValueError(
            f"`key` must be a single random key; got shape {key.shape}. For one run for "
            "each key use `equinox.filter_vmap` over them."
        )


def check_instance(name: str, value: Any, expected: type, what: str) -> None:
    """`TypeError` unless it is an instance; `what` says in words what is expected."""
    refuse_class(name, value)
    if not isinstance(value, expected):
        raise TypeError(f"`{name}` must be {what}; got {short_repr(value)}.")


def refuse_class(name: str, value: Any) -> None:
    """`TypeError` for a class where an instance is meant."""
    if isinstance(value, type):
        raise TypeError(
            f"`{name}` is the class {value.__name__}: pass an instance, "
            f"`{value.__name__}(…)`."
        )


def as_times(ts: Any) -> Array:
    """A user's `ts` as an array; `TypeError` or `ValueError` unless that is of numbers."""
    is_array = hasattr(ts, "dtype") or hasattr(ts, "__array__")
    is_sequence = is_array or isinstance(ts, Iterable)
    if isinstance(ts, str | bytes) or not is_sequence:
        raise TypeError(
            "`ts` must be a sequence of times, such as `jnp.linspace(0, t1, 11)`; got "
            f"{short_repr(ts)}."
        )
    given = ts if is_array else list(ts)
    is_text = not is_array and any(isinstance(t, str | bytes) for t in given)
    if is_text or (hasattr(ts, "dtype") and not _has_real_dtype(ts)):
        raise TypeError(
            f"`ts` must hold real numbers, the times to record at; got {short_repr(ts)}."
        )
    is_numpy = isinstance(given, np.ndarray) and given.dtype.kind in "iuf"
    try:
        # Nothing is compiled for an array of NumPy that is only put on the device.
        times = jax.device_put(given) if is_numpy else jnp.asarray(given)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`ts` must hold real numbers, the times to record at: {error}"
        ) from error
    if times.ndim != 1 or times.shape[0] == 0:
        raise ValueError(f"`ts` must be a sequence of times; got shape {times.shape}.")
    if not _has_real_dtype(times):
        raise TypeError(
            f"`ts` must hold real numbers, the times to record at; got {times.dtype}."
        )
    return times


def as_known_number(value: Any) -> Any:
    """A number as Python's where its value is known, else as the traced one it is."""
    return float(value) if is_concrete(value) else value


def _has_real_dtype(value: Any) -> bool:
    """Whether it is a number or an array of a real type, integers among them."""
    if isinstance(value, bool | np.bool_ | str | bytes) or value is None:
        return False
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        try:
            dtype = np.asarray(value).dtype
        except (TypeError, ValueError):
            return False
    try:
        is_integer = jnp.issubdtype(dtype, jnp.integer)
        return bool(is_integer or jnp.issubdtype(dtype, jnp.floating))
    except TypeError:
        return False
