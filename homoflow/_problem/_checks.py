"""Whether the numbers in an equation make sense, where they are known."""

import operator
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._jax._arguments import check_number
from .._jax._text import short_repr
from .._jax._tracing import is_concrete


def check_learning_rate(learning_rate: Any) -> None:
    """`ValueError` unless it is one positive, finite number."""
    check_number("learning_rate", learning_rate)
    if is_concrete(learning_rate):
        value = float(learning_rate)
        if not (np.isfinite(value) and value > 0):
            raise ValueError(
                f"`learning_rate` must be positive and finite; got {value}."
            )


def check_momentum(momentum: Any) -> None:
    """`ValueError` unless it is one number in [0, 1)."""
    check_number("momentum", momentum)
    if is_concrete(momentum) and not 0 <= float(momentum) < 1:
        raise ValueError(f"`momentum` must lie in [0, 1); got {float(momentum)}.")


def check_weight_decay(weight_decay: Any) -> None:
    """`ValueError` unless it is one finite number that is not negative."""
    check_number("weight_decay", weight_decay)
    if is_concrete(weight_decay):
        value = float(weight_decay)
        if not (np.isfinite(value) and value >= 0):
            raise ValueError(
                f"`weight_decay` must be finite and not negative; got {value}."
            )


def check_mass(mass: Any) -> None:
    """`ValueError` unless it is one positive, finite number."""
    check_number("mass", mass)
    if is_concrete(mass) and not (np.isfinite(float(mass)) and float(mass) > 0):
        raise ValueError(f"`mass` must be positive and finite; got {float(mass)}.")


def check_count(name: str, count: Any, *, least: int = 1) -> None:
    """`ValueError` unless it is an integer, and not less than `least`."""
    if isinstance(count, bool) or not isinstance(count, int | np.integer):
        raise ValueError(f"`{name}` must be an integer; got {count!r}.")
    if count < least:
        raise ValueError(f"`{name}` must be at least {least}; got {count}.")


def check_batch_size(batch_size: Any, samples: int) -> None:
    """`ValueError` unless it is an integer from 1 to the number of samples."""
    is_integer = isinstance(batch_size, int | np.integer)
    if isinstance(batch_size, bool) or not is_integer or not 1 <= batch_size <= samples:
        raise ValueError(
            f"`batch_size` must be an integer from 1 to the {samples} samples; got "
            f"{batch_size!r}."
        )


#: A tolerance below this many units of rounding cannot be reached.
FLOOR_ULPS = 20


def tolerance_floor(dtype: jnp.dtype) -> float:
    """The smallest relative tolerance that the dtype can reach."""
    return FLOOR_ULPS * float(jnp.finfo(dtype).eps)


def check_tolerance(name: str, value: Any, dtype: jnp.dtype) -> None:
    """`ValueError` for a tolerance that makes no sense or cannot be reached."""
    if value is None:
        return
    check_number(name, value)
    if not is_concrete(value):
        return
    value = float(value)
    if not (np.isfinite(value) and (value > 0 or (name == "atol" and value == 0))):
        raise ValueError(f"`{name}` must be positive and finite; got {value}.")
    floor = tolerance_floor(dtype)
    if name == "rtol" and value < floor:
        help_ = (
            " Float64 reaches tighter ones: run "
            "`jax.config.update('jax_enable_x64', True)` before anything else, and make "
            "the weights float64."
            if dtype == jnp.float32
            else ""
        )
        raise ValueError(
            f"rtol = {value:g} is below {floor:.1e}, the tightest relative tolerance "
            f"that {dtype.name} can reach.{help_}"
        )


def checked_step(dt0: Any, dtype: jnp.dtype) -> Array | None:
    if dt0 is None:
        return None
    check_number("dt0", dt0)
    if is_concrete(dt0) and not (np.isfinite(float(dt0)) and float(dt0) > 0):
        raise ValueError(f"`dt0` must be positive and finite; got {dt0}.")
    return as_scalar(dt0, dtype)


def as_scalar(value: Any, dtype: jnp.dtype) -> Array | None:
    """A number as an array of the weights' dtype."""
    return None if value is None else jnp.asarray(value, dtype)


def as_max_steps(max_steps: Any) -> int:
    """The number of steps a solver may take; `ValueError` unless a positive integer."""
    is_integer = isinstance(max_steps, int | np.integer)
    if isinstance(max_steps, bool) or not is_integer or max_steps < 1:
        raise ValueError(f"`max_steps` must be a positive integer; got {max_steps!r}.")
    return operator.index(max_steps)


def check_laws(laws: Any) -> None:
    """`TypeError` for a single law, or names in place of laws."""
    if laws is None:
        return
    by_name = '`homoflow.laws(model)["neurons[1]"]` is the one of that name'
    if isinstance(laws, str):
        raise TypeError(
            f"`laws` must be a list of law objects, not a string: {by_name}, if there is "
            f"one; got {short_repr(laws)}."
        )
    if isinstance(laws, type) or not isinstance(laws, Iterable):
        raise TypeError(
            "`laws` must be a collection of law objects, such as `homoflow.laws(model)`; "
            f"got {short_repr(laws)}. A single law goes into a list, `laws=[law]`."
        )
    if isinstance(laws, Collection):
        strings = [law for law in laws if isinstance(law, str)]
        if strings:
            raise TypeError(
                "`laws` must hold law objects, not str, such as "
                f"`homoflow.laws(model)[{strings[0]!r}]`; got {strings[0]!r}."
            )


def as_coefficient(check: Callable[[Any], None]) -> Callable[[Any], Any]:
    """A converter for a coefficient of an equation: checked, and an array.

    As an array, a new value does not compile anything anew.
    """

    def convert(value: Any) -> Array | None:
        if value is None:
            return None
        check(value)
        if isinstance(value, Array) and jnp.issubdtype(value.dtype, jnp.floating):
            return value
        return jnp.asarray(value, jnp.result_type(float))

    return convert
