"""What the weights flow down, as a function of one vector."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..._laws import Laws
from ..._problem._problem import Problem
from ..._results._trajectory import Trajectory


class FlatLoss(eqx.Module):
    """L(w) + ½λ‖w‖², of which dw/dt = −∇L − λw is the gradient flow.

    `scale`: the units d in which weights are measured, if not 1: then it is a function of
    u with w = d∘u. What kind a stationary point is does not depend on units; how far
    rounding lets one see it does.
    """

    problem: Problem
    weight_decay: Float[Array, ""] | None = None
    laws: Laws = Laws(())
    scale: Float[Array, " size"] | None = None

    def weights(self, flat: Float[Array, " size"]) -> PyTree:
        """The weights w of a vector u."""
        _, unravel = ravel_pytree(self.problem.weights)
        return unravel(flat if self.scale is None else self.scale * flat)

    def value(self, flat: Float[Array, " size"]) -> Float[Array, ""]:
        weights = self.weights(flat)
        loss = self.problem.loss(weights)
        if self.weight_decay is None:
            return loss
        squares = [jnp.sum(w**2) for w in jax.tree.leaves(weights)]
        return loss + self.weight_decay * sum(squares) / 2

    def gradient(self, flat: Float[Array, " size"]) -> Float[Array, " size"]:
        return jax.grad(self.value)(flat)

    def recorded_value(self, flow: Trajectory, index: int) -> float:
        """The value at a time that a flow has recorded."""
        loss = float(flow.losses[index])
        if self.weight_decay is None:
            return loss
        square = sum(float(norms[index]) for norms in flow.squared_norms.values())
        return loss + float(self.weight_decay) * square / 2


def ravel_weights(problem: Problem, model: PyTree) -> np.ndarray:
    """The trained weights of a model in a row."""
    leaves = jax.tree.leaves(eqx.filter(model, problem.mask))
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


def with_weights(problem: Problem, flat: np.ndarray) -> PyTree:
    """The model with the trained weights of a row."""
    leaves, structure = jax.tree.flatten(problem.weights)
    parts = np.split(flat, np.cumsum([leaf.size for leaf in leaves])[:-1])
    arrays = [
        jnp.asarray(part.reshape(leaf.shape))
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return eqx.combine(jax.tree.unflatten(structure, arrays), problem.frozen)
