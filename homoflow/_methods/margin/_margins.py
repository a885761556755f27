"""Margins, their gradients, and the curvature of the Lagrangian that they make."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from ..._jax._compilation import fast_compile_jit
from ..._jax._precision import full_matmul_precision
from ..._problem._log_risk import sample_margins
from ..._problem._problem import Problem
from ._piece import Piece, margins_on

#: The largest deviation from Euler's identity, relative to its terms.
_MAX_DEVIATION = 1e-6


class Margins(NamedTuple):
    """Margins in a row, their change along the weights, and their gradients in rows."""

    values: np.ndarray
    along: np.ndarray
    slopes: np.ndarray

    def degree(self, w: np.ndarray) -> float:
        """L of Euler's identity ⟨∇m, w⟩ = L·m; `ValueError` where there is none."""
        degree = float(self.values @ self.along / (self.values @ self.values))
        scale = np.linalg.norm(self.slopes, axis=1) * np.linalg.norm(w)
        deviation = np.abs(self.along - degree * self.values)
        worst = float(np.max(deviation / np.where(scale > 0, scale, 1)))
        if not (worst <= _MAX_DEVIATION and degree > 0):
            raise ValueError(
                "The margins are not homogeneous in the trained weights: ⟨∇m, w⟩ = L·m "
                f"fails by {worst:.1e} of its size at L = {degree:.3g}. The theory of "
                "maximal margins is for networks without biases above the first layer "
                "and with homogeneous activations."
            )
        return degree


def margins_at(problem: Problem, w: np.ndarray, piece: Piece | None = None) -> Margins:
    """The margins; of a network with kinks those on a piece, if it is given."""
    side = None if piece is None else jnp.asarray(piece.side)
    values, along, slopes = map(np.asarray, _margins(problem, side, jnp.asarray(w)))
    return Margins(values.ravel(), along.ravel(), slopes)


def lagrangian_hessian(
    problem: Problem,
    w: np.ndarray,
    multipliers: np.ndarray,
    piece: Piece | None = None,
    forces: np.ndarray | None = None,
) -> np.ndarray:
    """I − Σ λ_i ∇²m_i − Σ ν_k ∇²z_k, ν the `forces` of the kinks that are held."""
    side = held = None
    if piece is not None:
        side = jnp.asarray(piece.side)
        of_all = np.zeros(piece.side.shape)
        if forces is not None:
            of_all[piece.held] = forces
        held = jnp.asarray(of_all)
    curved = _hessian(problem, side, jnp.asarray(w), jnp.asarray(multipliers), held)
    return np.asarray(curved)


def flat_weights(problem: Problem) -> np.ndarray:
    return np.asarray(ravel_pytree(problem.weights)[0])


def with_flat_weights(problem: Problem, w: np.ndarray) -> Problem:
    unravel = ravel_pytree(problem.weights)[1]
    return eqx.tree_at(lambda p: p.weights, problem, unravel(jnp.asarray(w)))


@fast_compile_jit
@full_matmul_precision()
def _margins(
    problem: Problem, side: Array | None, flat: Float[Array, " weights"]
) -> tuple[Array, Array, Float[Array, "margins weights"]]:
    unravel = ravel_pytree(problem.weights)[1]

    def margins_of(v):
        if side is not None:
            return margins_on(problem, side, v)[0]
        return sample_margins(problem, unravel(v))

    values, along = jax.jvp(margins_of, (flat,), (flat,))
    slopes = jax.jacrev(lambda v: margins_of(v).ravel())(flat)
    return values, along, slopes


@fast_compile_jit
@full_matmul_precision()
def _hessian(
    problem: Problem,
    side: Array | None,
    flat: Float[Array, " weights"],
    multipliers: Array,
    forces: Array | None,
) -> Float[Array, "weights weights"]:
    unravel = ravel_pytree(problem.weights)[1]

    def lagrangian(v):
        held = 0.0
        if side is None or forces is None:
            margins = sample_margins(problem, unravel(v))
        else:
            margins, z = margins_on(problem, side, v)
            held = jnp.sum(forces * z)
        return 0.5 * jnp.sum(v**2) - jnp.sum(multipliers * margins.ravel()) - held

    return jax.hessian(lagrangian)(flat)
