"""The largest eigenvalue of a symmetric operator, from products with vectors."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int

#: Vectors kept before the iteration restarts from the best one, and how often it may.
_MAX_BASIS = 32
_MAX_RESTARTS = 30


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

    def should_restart(state):
        found, cycle, products = state
        del products
        return ~found.is_converged & (cycle < _MAX_RESTARTS)

    def restart(state):
        found, cycle, products = state
        found, used = _lanczos(product, found.vector, min(size, _MAX_BASIS), rtol)
        return found, cycle + 1, products + used

    initial = _Ritz(jnp.asarray(jnp.nan, dtype), start, jnp.asarray(False))
    found, _, products = jax.lax.while_loop(
        should_restart, restart, (initial, jnp.asarray(0), jnp.asarray(0))
    )
    value = jnp.where(found.is_converged, found.value, jnp.nan)
    return Eigenpair(value, found.vector, products)


class _Ritz(NamedTuple):
    value: Float[Array, ""]
    vector: Float[Array, " size"]
    is_converged: Bool[Array, ""]


class _Krylov(NamedTuple):
    """A basis, the tridiagonal matrix in it, and its largest eigenvalue's vector."""

    basis: Float[Array, "max_length+1 size"]
    diagonal: Float[Array, " max_length"]
    off_diagonal: Float[Array, " max_length"]
    length: Int[Array, ""]
    value: Float[Array, ""]
    coordinates: Float[Array, " max_length"]
    is_converged: Bool[Array, ""]


def _lanczos(
    product: Callable[[Array], Array], start: Array, max_length: int, rtol: float
) -> tuple[_Ritz, Int[Array, ""]]:
    """Lanczos from `start` until the residual is small or the basis is full."""
    dtype = start.dtype
    zeros = jnp.zeros(max_length, dtype)

    def step(k: _Krylov) -> _Krylov:
        q = k.basis[k.length]
        z = product(q)
        diagonal = k.diagonal.at[k.length].set(q @ z)
        for _ in range(2):  # Once leaves what rounding brings back.
            z = z - (k.basis @ z) @ k.basis
        size = jnp.linalg.norm(z)
        off_diagonal = k.off_diagonal.at[k.length].set(size)
        basis = k.basis.at[k.length + 1].set(jnp.where(size > 0, z / size, 0))
        value, coordinates, norm = _ritz(diagonal, off_diagonal, k.length + 1)
        residual = size * jnp.abs(coordinates[k.length])
        is_converged = residual <= rtol * norm
        return _Krylov(
            basis,
            diagonal,
            off_diagonal,
            k.length + 1,
            value,
            coordinates,
            is_converged,
        )

    basis = jnp.zeros((max_length + 1, start.size), dtype)
    initial = _Krylov(
        basis.at[0].set(start / jnp.linalg.norm(start)),
        diagonal=zeros,
        off_diagonal=zeros,
        length=jnp.asarray(0),
        value=zeros[0],
        coordinates=zeros,
        is_converged=jnp.asarray(False),
    )
    k = jax.lax.while_loop(
        lambda k: ~k.is_converged & (k.length < max_length), step, initial
    )
    vector = k.coordinates @ k.basis[:max_length]
    return _Ritz(k.value, vector, k.is_converged), k.length


def _ritz(
    diagonal: Array, off_diagonal: Array, length: Array
) -> tuple[Array, Array, Array]:
    """Largest eigenvalue, its vector, and the norm of the leading tridiagonal block."""
    index = jnp.arange(diagonal.size)
    off_diagonal = jnp.where(index < length - 1, off_diagonal, 0)[:-1]
    # What is not in use yet goes below all that is, so that it sorts first.
    lowest = -2 * (jnp.max(jnp.abs(diagonal)) + 2 * jnp.max(off_diagonal, initial=0))
    diagonal = jnp.where(index < length, diagonal, lowest)
    matrix = jnp.diag(diagonal) + jnp.diag(off_diagonal, 1) + jnp.diag(off_diagonal, -1)
    values, vectors = jnp.linalg.eigh(matrix)
    used = index >= diagonal.size - length
    return values[-1], vectors[:, -1], jnp.max(jnp.where(used, jnp.abs(values), 0))
