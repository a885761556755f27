"""The models that a run has saved."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ._trajectory import Trajectory


def models_at(trajectory: Trajectory, index: np.ndarray) -> PyTree:
    """The models at some of the times, all their arrays stacked."""

    def pick(stacked, single):
        if not eqx.is_array(stacked):
            return stacked
        if stacked.ndim > single.ndim:
            return jnp.asarray(np.asarray(stacked)[index])
        return jnp.asarray(np.broadcast_to(stacked, (len(index), *stacked.shape)))

    return jax.tree.map(pick, trajectory.models, trajectory.model)
