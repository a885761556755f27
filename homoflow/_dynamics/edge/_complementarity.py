"""Multipliers of several constraints on one symmetric matrix."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ._symmetric import as_matrix, as_vector, pairs

#: The residual at which the iteration stops, in units of the dtype's rounding, and the
#: most steps it may take.
_ROUNDINGS = 100
_MAX_STEPS = 20_000


class Multipliers(NamedTuple):
    """A solution of X ⪰ 0, Z = Z₀ + M·X ⪰ 0, ⟨X, Z⟩ = 0.

    - `residual`: ‖X − (X − Z)₊‖, relative to ‖X‖, in the scale in which it is solved.
    """

    matrix: Float[Array, "size size"]
    residual: Float[Array, ""]


def solve_complementarity(
    gram: Float[Array, "pairs pairs"], linear: Float[Array, " pairs"], size: int
) -> Multipliers:
    """The minimizer X ⪰ 0 of ½⟨X, M X⟩ + ⟨Z₀, X⟩, matrices as `as_vector` has them.

    By projected gradients with Nesterov's momentum, begun anew where it points uphill
    [O'Donoghue & Candès 2015]. `gram` is M and `linear` Z₀; the pairs that M has nothing
    for (zero on the diagonal) are left out. Rows and columns are scaled first, so that M
    has ones on its diagonal: X ↦ DXD keeps X ⪰ 0.
    """
    dtype = gram.dtype
    rows, columns = pairs(size)
    curvature = as_matrix(jnp.diagonal(gram), size).diagonal()
    is_used = curvature > 0
    scale = jnp.where(is_used, jnp.where(is_used, curvature, 1) ** -0.25, 0)
    factor = scale[rows] * scale[columns]
    gram = factor[:, None] * gram * factor
    linear = factor * linear
    largest = jnp.max(jnp.linalg.eigvalsh(gram))
    step = 1 / jnp.where(largest > 0, largest, 1)
    tolerance = _ROUNDINGS * jnp.finfo(dtype).eps

    def project(x: Array) -> Array:
        values, vectors = jnp.linalg.eigh(as_matrix(x, size))
        return as_vector((vectors * jnp.maximum(values, 0)) @ vectors.T)

    def improve(loop: tuple[Array, Array, Array, Int[Array, ""], Array]):
        x, ahead, momentum, count, _ = loop
        new = project(ahead - step * (gram @ ahead + linear))
        is_uphill = jnp.sum((ahead - new) * (new - x)) > 0
        following = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
        push = jnp.where(is_uphill, 0, (momentum - 1) / following)
        momentum = jnp.where(is_uphill, 1, following)
        still = project(new - step * (gram @ new + linear))
        size_of = jnp.linalg.norm(new) + step * jnp.linalg.norm(linear)
        residual = jnp.linalg.norm(new - still) / jnp.where(size_of > 0, size_of, 1)
        return new, new + push * (new - x), momentum, count + 1, residual

    def is_unfinished(loop) -> Array:
        *_, count, residual = loop
        return (residual > tolerance) & (count < _MAX_STEPS)

    nothing = jnp.zeros_like(linear)
    one, never = jnp.ones((), dtype), jnp.asarray(jnp.inf, dtype)
    start = (nothing, nothing, one, jnp.asarray(0), never)
    x, *_, residual = lax.while_loop(is_unfinished, improve, start)
    return Multipliers(as_matrix(factor * x, size), residual)
