"""What the loss does where its Hessian is zero and no law says why."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from ..._jax._precision import full_matmul_precision
from ._critical_point import STATIONARY, View
from ._landscape import Landscape

#: Random directions, each with its opposite, and how far along them, relative to ‖w‖.
_DIRECTIONS = 8
_RADII = (0.1, 0.03, 0.01)
#: Steps back to where the loss is stationary in all other directions.
_STEPS = 60
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
    is_zero = np.abs(view.values) <= view.zero
    unexplained = _complement(view.vectors[:, is_zero], explained)
    inverse = np.where(is_zero, 0, 1 / np.where(is_zero, 1, view.values))
    scale = view.norm * view.size
    for radius in _RADII:
        found = _excursion(
            landscape,
            jnp.asarray(view.weights),
            jnp.asarray((view.vectors * inverse) @ view.vectors.T),
            jnp.asarray((view.vectors * ~is_zero) @ view.vectors.T),
            jnp.asarray(unexplained @ unexplained.T),
            jnp.asarray(radius * view.size),
        )
        losses, slopes, along = map(np.asarray, found)
        settled = slopes <= STATIONARY * scale
        falls = losses < view.loss - 64 * _EPS * abs(view.loss)
        if np.any(settled & falls):
            return Valley(False, True)
        if np.all(settled):
            return Valley(bool(np.all(along <= STATIONARY * scale)), False)
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
    inverse: Float[Array, "size size"],
    across: Float[Array, "size size"],
    along: Float[Array, "size size"],
    radius: Float[Array, ""],
) -> tuple[Array, Array, Array]:
    """Losses after excursions, and slopes in the directions with and without curvature.

    `inverse` is the Hessian's pseudo-inverse, `across` the projector onto its range,
    `along` that onto the directions to go. (They are square so that another rank does not
    compile again.)
    """
    drawn = jr.normal(jr.key(0), (_DIRECTIONS, flat.size), flat.dtype) @ along
    drawn = radius * drawn / jnp.linalg.norm(drawn, axis=1, keepdims=True)

    def settle(start):
        def step(_, w):
            return w - inverse @ landscape.slope(w)

        w = jax.lax.fori_loop(0, _STEPS, step, start)
        slope = landscape.slope(w)
        return (
            landscape.height(w),
            jnp.linalg.norm(across @ slope),
            jnp.linalg.norm(along @ slope),
        )

    return jax.vmap(settle)(flat + jnp.concatenate([drawn, -drawn]))
