"""The largest eigenvalue of a symmetric operator, from products with vectors."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int

#: Vectors kept before the iteration starts again from the best one, and how often it may.
_BASIS = 32
_CYCLES = 30


class Eigenpair(NamedTuple):
    """An eigenvalue with its vector, and how many products it took.

    The value is NaN if the residual never came below what was asked for.
    """

    value: Float[Array, ""]
    vector: Float[Array, " size"]
    products: Int[Array, ""]


def largest_eigenvalue(
    product: Callable[[Array], Array], size: int, dtype: jnp.dtype, rtol: float
) -> Eigenpair:
    """The largest (not the largest absolute) eigenvalue of `product`, by Lanczos.

    With full reorthogonalization, started at random, and again from the best vector
    when the basis is full [Saad, Numerical Methods for Large Eigenvalue Problems, 2011,
    ch. 6]. It stops at a residual ‖Hv − θv‖ ≤ `rtol`·‖H‖ (‖H‖ as seen so far): then
    an eigenvalue lies within that of θ, and usually far closer, since the error of θ
    is of second order in the residual. That no larger one was missed is not proved.
    """
    start = jr.normal(jr.key(0), (size,), dtype)

    def more(state):
        found, cycle, products = state
        del products
        return ~found.is_good & (cycle < _CYCLES)

    def again(state):
        found, cycle, products = state
        found, used = _cycle(product, found.vector, min(size, _BASIS), rtol)
        return found, cycle + 1, products + used

    nothing = _Ritz(jnp.asarray(jnp.nan, dtype), start, jnp.asarray(False))
    found, _, products = jax.lax.while_loop(
        more, again, (nothing, jnp.asarray(0), jnp.asarray(0))
    )
    value = jnp.where(found.is_good, found.value, jnp.nan)
    return Eigenpair(value, found.vector, products)


class _Ritz(NamedTuple):
    value: Float[Array, ""]
    vector: Float[Array, " size"]
    is_good: Bool[Array, ""]


class _Krylov(NamedTuple):
    """A basis, the tridiagonal matrix in it, and its largest eigenvalue's vector."""

    basis: Float[Array, "more size"]
    diagonal: Float[Array, " most"]
    beside: Float[Array, " most"]
    length: Int[Array, ""]
    value: Float[Array, ""]
    coordinates: Float[Array, " most"]
    is_good: Bool[Array, ""]


def _cycle(
    product: Callable[[Array], Array], start: Array, most: int, rtol: float
) -> tuple[_Ritz, Int[Array, ""]]:
    """Lanczos from `start` until the residual is small or the basis is full."""
    dtype = start.dtype
    zeros = jnp.zeros(most, dtype)

    def step(k: _Krylov) -> _Krylov:
        q = k.basis[k.length]
        z = product(q)
        diagonal = k.diagonal.at[k.length].set(q @ z)
        for _ in range(2):  # Once leaves what rounding brings back.
            z = z - (k.basis @ z) @ k.basis
        size = jnp.linalg.norm(z)
        beside = k.beside.at[k.length].set(size)
        basis = k.basis.at[k.length + 1].set(jnp.where(size > 0, z / size, 0))
        value, coordinates, norm = _ritz(diagonal, beside, k.length + 1)
        residual = size * jnp.abs(coordinates[k.length])
        good = residual <= rtol * norm
        return _Krylov(basis, diagonal, beside, k.length + 1, value, coordinates, good)

    basis = jnp.zeros((most + 1, start.size), dtype)
    empty = _Krylov(
        basis.at[0].set(start / jnp.linalg.norm(start)),
        zeros, zeros, jnp.asarray(0), zeros[0], zeros, jnp.asarray(False),
    )  # fmt: skip
    k = jax.lax.while_loop(lambda k: ~k.is_good & (k.length < most), step, empty)
    vector = k.coordinates @ k.basis[:most]
    return _Ritz(k.value, vector, k.is_good), k.length


def _ritz(diagonal: Array, beside: Array, length: Array) -> tuple[Array, Array, Array]:
    """Largest eigenvalue, its vector, and the norm of the leading tridiagonal block."""
    index = jnp.arange(diagonal.size)
    beside = jnp.where(index < length - 1, beside, 0)[:-1]
    # What is not in use yet goes below all that is, so that it sorts first.
    lowest = -2 * (jnp.max(jnp.abs(diagonal)) + 2 * jnp.max(beside, initial=0))
    diagonal = jnp.where(index < length, diagonal, lowest)
    matrix = jnp.diag(diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1)
    values, vectors = jnp.linalg.eigh(matrix)
    used = index >= diagonal.size - length
    return values[-1], vectors[:, -1], jnp.max(jnp.where(used, jnp.abs(values), 0))
