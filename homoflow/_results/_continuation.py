"""A run that goes on where another one ended, on the same clock."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from ._trajectory import Trajectory


def start_of(model: PyTree) -> tuple[PyTree, Any]:
    """The model to start from, and its time: 0, or the end of the run that goes on."""
    if not isinstance(model, Trajectory):
        return model, 0.0
    reached = model.stats["time_reached"]
    if jnp.ndim(reached) != 0:
        raise ValueError(
            "A batch of runs goes on inside of `vmap`: continue each of them there, as "
            "they were made."
        )
    return model.model, reached
