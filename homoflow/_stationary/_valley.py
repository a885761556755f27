"""What the loss does where its Hessian is zero and no law says why."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from .._precision import full_matmul_precision
from ._landscape import Landscape
from ._view import View

#: Random directions, each with its opposite, and how far along them, relative to ‖w‖.
_DIRECTIONS = 8
_RADII = (0.1, 0.03, 0.01)
#: Steps back to where the loss is stationary in all other directions.
_STEPS = 60
#: ‖∇L‖ relative to ‖∇²L‖·‖w‖ where the loss is flat, and below which it is stationary in
#: the other directions.
_FLAT, _SETTLED = 1e-12, 1e-10
_EPS = float(np.finfo(float).eps)


class Valley(NamedTuple):
    """The loss on the set where it is stationary in all directions of nonzero curvature.

    - `is_flat`: it does not change there, nor is there a slope.
    - `falls`: it takes lower values. Neither is known where it is not `settled`.
    """

    is_flat: bool
    falls: bool


def valley(
    landscape: Landscape, view: View, explained: Float[np.ndarray, "explained size"]
) -> Valley:
    """Looks along random directions of zero curvature that `explained` does not span.

    The loss that is left when all directions of nonzero curvature have been eliminated
    (Lyapunov and Schmidt's reduction) is an analytic function of the others. Where it
    has no slope at random points, it is constant: then the stationary points form a
    manifold, as the zero eigenvalues say, and the Hessian decides what they are.
    """
    assert view.values is not None
    assert view.vectors is not None
    is_zero = np.abs(view.values) <= view.zero
    unexplained = _complement(view.vectors[:, is_zero], explained)
    across = view.vectors[:, ~is_zero]
    for radius in _RADII:
        found = _excursion(
            landscape,
            jnp.asarray(view.weights),
            jnp.asarray(across),
            jnp.asarray(1 / view.values[~is_zero]),
            jnp.asarray(unexplained),
            radius * view.size,
        )
        losses, slopes, along = map(np.asarray, found)
        scale = view.norm * view.size
        settled = slopes <= _SETTLED * scale if across.size else np.full(len(losses), True)
        falls = losses < view.loss - 64 * _EPS * abs(view.loss)
        if np.any(settled & falls):
            return Valley(False, True)
        if np.all(settled):
            return Valley(bool(np.all(along <= _FLAT * scale)), False)
    return Valley(False, False)


def _complement(basis: np.ndarray, explained: np.ndarray) -> np.ndarray:
    """What a space (columns) holds beside the directions (rows) that lie in it."""
    inside = explained @ basis
    _, _, rows = np.linalg.svd(inside)
    return basis @ rows[len(explained) :].T


@eqx.filter_jit
@full_matmul_precision()
def _excursion(
    landscape: Landscape,
    flat: Float[Array, " size"],
    across: Float[Array, "size curved"],
    inverse: Float[Array, " curved"],
    along: Float[Array, "size unexplained"],
    radius: float,
) -> tuple[Array, Array, Array]:
    """Losses after excursions, and slopes in the directions with and without curvature."""
    drawn = jr.normal(jr.key(0), (_DIRECTIONS, along.shape[1]), flat.dtype)
    drawn = radius * drawn / jnp.linalg.norm(drawn, axis=1, keepdims=True)
    starts = flat + jnp.concatenate([drawn, -drawn]) @ along.T

    def settle(w):
        def step(_, w):
            return w - across @ (inverse * (across.T @ landscape.slope(w)))

        w = jax.lax.fori_loop(0, _STEPS, step, w)
        slope = landscape.slope(w)
        return (
            landscape.height(w),
            jnp.linalg.norm(across.T @ slope),
            jnp.linalg.norm(along.T @ slope),
        )

    return jax.vmap(settle)(starts)
