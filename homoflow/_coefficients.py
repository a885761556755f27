"""Whether the numbers in an equation make sense, where they are known."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ._concrete import is_concrete


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


def _check_scalar(name: str, value: Any) -> None:
    if callable(value) or jnp.ndim(value) != 0:
        raise ValueError(f"`{name}` must be one number; got {value!r}.")
