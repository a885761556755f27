"""Points of a run, for observables."""

import jax
import jax.numpy as jnp

from homoflow._observe._base import Point


def point_of(problem, weights=None) -> Point:
    """The point of a gradient flow at these weights, or at the problem's own."""
    weights = problem.weights if weights is None else weights
    loss, gradient = jax.value_and_grad(problem.loss)(weights)
    velocity = jax.tree.map(jnp.negative, gradient)
    return Point(
        jnp.zeros(()), problem, weights, loss, gradient, weights, lambda: velocity
    )
