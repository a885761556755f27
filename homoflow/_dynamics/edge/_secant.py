"""How curved the loss is from one side of the oscillation to the other."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ._curvature import Curvature


def secant_shift(
    curvature: Curvature,
    w: Float[Array, " size"],
    vectors: Float[Array, "critical size"],
    oscillation: Float[Array, "critical critical"],
    num: Int[Array, ""],
    threshold: Float[Array, ""],
) -> Float[Array, ""]:
    """By which part the curvature between the ends of the oscillation is off the threshold.

    Weights that jump between w + σu and w − σu do so without growing where the slope of
    the gradient *between* these is the threshold, and not the eigenvalue at w: they differ
    by D⁴L[u, u, u, u]σ²/6 and higher orders. That is computed with all orders, for each
    direction in which Σ = UXUᵀ oscillates by itself. The one that is furthest off counts.
    """
    variances, rotation = jnp.linalg.eigh(oscillation)
    directions = rotation.T @ vectors
    size = variances.size

    def look(i: Array, worst: Array) -> Array:
        sigma = jnp.sqrt(jnp.maximum(variances[size - 1 - i], 0))
        u = directions[size - 1 - i]
        ends = [curvature.gradient(w + sign * sigma * u) for sign in (1, -1)]
        secant = u @ (ends[0] - ends[1]) / jnp.where(sigma > 0, 2 * sigma, 1)
        shift = jnp.where(sigma > 0, secant / threshold - 1, 0)
        return jnp.where(jnp.abs(shift) > jnp.abs(worst), shift, worst)

    return lax.fori_loop(0, num, look, jnp.zeros_like(w, shape=()))
