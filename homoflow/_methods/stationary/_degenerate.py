"""What the loss does where its Hessian is zero and no law says why."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from ..._jax._compilation import fast_compile_jit
from ..._jax._precision import full_matmul_precision
from ._critical_point import STATIONARY, CriticalPoint
from ._flat_loss import FlatLoss

#: Random directions, each with its opposite, and how far along them, relative to ‖w‖.
_DIRECTIONS = 8
_RADII = (0.1, 0.03, 0.01)
#: Steps back to where the loss is stationary in all other directions.
_STEPS = 60
_EPS = float(np.finfo(float).eps)


class DegenerateTest(NamedTuple):
    """The loss on the set where it is stationary in all directions of nonzero curvature.

    - `is_flat`: it does not change there, nor is there a slope.
    - `decreases`: it takes lower values. Neither is known where no relaxation has ended.
    """

    is_flat: bool
    decreases: bool


def test_degenerate_directions(
    flat_loss: FlatLoss,
    point: CriticalPoint,
    explained: Float[np.ndarray, "explained size"],
) -> DegenerateTest:
    """Looks along random directions of zero curvature that `explained` does not span.

    The loss that is left when all directions of nonzero curvature have been eliminated
    (Lyapunov and Schmidt's reduction) is an analytic function of the others. Where it
    has no slope at random points, it is constant: then the stationary points form a
    manifold, as the zero eigenvalues say, and the Hessian decides what they are.
    """
    is_zero = np.abs(point.values) <= point.zero
    unexplained = _complement(point.vectors[:, is_zero], explained)
    inverse = np.where(is_zero, 0, 1 / np.where(is_zero, 1, point.values))
    scale = point.norm * point.size
    for radius in _RADII:
        results = _relax_and_probe(
            flat_loss,
            jnp.asarray(point.weights),
            jnp.asarray((point.vectors * inverse) @ point.vectors.T),
            jnp.asarray((point.vectors * ~is_zero) @ point.vectors.T),
            jnp.asarray(unexplained @ unexplained.T),
            jnp.asarray(radius * point.size),
        )
        losses, slopes, along = map(np.asarray, results)
        is_relaxed = slopes <= STATIONARY * scale
        decreases = losses < point.loss - _rounding_of_loss(point)
        if np.any(is_relaxed & decreases):
            return DegenerateTest(False, True)
        if np.all(is_relaxed):
            return DegenerateTest(bool(np.all(along <= STATIONARY * scale)), False)
    return DegenerateTest(False, False)


def _rounding_of_loss(point: CriticalPoint) -> float:
    """The largest difference of losses that says nothing.

    That of the loss itself, and what it changes by where weights are known to rounding
    only: a sum of squares that are all zero comes out as 1e-33 here and as 1e-34 there.
    """
    unsure = STATIONARY * point.size
    return 64 * _EPS * abs(point.loss) + point.norm * unsure**2 / 2


def _complement(basis: np.ndarray, explained: np.ndarray) -> np.ndarray:
    """What a space (columns) holds beside the directions (rows) that lie in it."""
    inside = explained @ basis
    _, _, rows = np.linalg.svd(inside)
    return basis @ rows[len(explained) :].T


@fast_compile_jit
@full_matmul_precision()
def _relax_and_probe(
    flat_loss: FlatLoss,
    flat: Float[Array, " size"],
    inverse: Float[Array, "size size"],
    across: Float[Array, "size size"],
    along: Float[Array, "size size"],
    radius: Float[Array, ""],
) -> tuple[Array, Array, Array]:
    """Losses after relaxations, and slopes in the directions with and without curvature.

    `inverse` is the Hessian's pseudo-inverse, `across` the projector onto its range,
    `along` that onto the directions to go. (They are square so that another rank does not
    compile again.)
    """
    drawn = jr.normal(jr.key(0), (_DIRECTIONS, flat.size), flat.dtype) @ along
    drawn = radius * drawn / jnp.linalg.norm(drawn, axis=1, keepdims=True)

    def relax(start):
        def step(_, w):
            return w - inverse @ flat_loss.gradient(w)

        w = jax.lax.fori_loop(0, _STEPS, step, start)
        slope = flat_loss.gradient(w)
        return (
            flat_loss.value(w),
            jnp.linalg.norm(across @ slope),
            jnp.linalg.norm(along @ slope),
        )

    return jax.vmap(relax)(flat + jnp.concatenate([drawn, -drawn]))
