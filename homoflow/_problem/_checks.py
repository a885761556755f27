"""Whether the numbers in an equation make sense, where they are known."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from .._jax._tracing import is_concrete


def check_learning_rate(learning_rate: Any) -> None:
    """`ValueError` unless it is one positive, finite number."""
    _check_scalar("learning_rate", learning_rate)
    if is_concrete(learning_rate):
        value = float(learning_rate)
        if not (np.isfinite(value) and value > 0):
            raise ValueError(
                f"`learning_rate` must be positive and finite; got {value}."
            )


def check_momentum(momentum: Any) -> None:
    """`ValueError` unless it is one number in [0, 1)."""
    _check_scalar("momentum", momentum)
    if is_concrete(momentum) and not 0 <= float(momentum) < 1:
        raise ValueError(f"`momentum` must lie in [0, 1); got {float(momentum)}.")


def check_weight_decay(weight_decay: Any) -> None:
    """`ValueError` unless it is one finite number that is not negative."""
    _check_scalar("weight_decay", weight_decay)
    if is_concrete(weight_decay):
        value = float(weight_decay)
        if not (np.isfinite(value) and value >= 0):
            raise ValueError(
                f"`weight_decay` must be finite and not negative; got {value}."
            )


def check_mass(mass: Any) -> None:
    """`ValueError` unless it is one positive, finite number."""
    _check_scalar("mass", mass)
    if is_concrete(mass) and not (np.isfinite(float(mass)) and float(mass) > 0):
        raise ValueError(f"`mass` must be positive and finite; got {float(mass)}.")


def check_batch_size(batch_size: Any, samples: int) -> None:
    """`ValueError` unless it is an integer from 1 to the number of samples."""
    is_integer = isinstance(batch_size, int | np.integer)
    if isinstance(batch_size, bool) or not is_integer or not 1 <= batch_size <= samples:
        raise ValueError(
            f"`batch_size` must be an integer from 1 to the {samples} samples; got "
            f"{batch_size!r}."
        )


def _check_scalar(name: str, value: Any) -> None:
    if callable(value) or jnp.ndim(value) != 0:
        raise ValueError(f"`{name}` must be one number; got {value!r}.")
