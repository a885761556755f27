"""A symmetric matrix of low rank that learns from what it is compared with."""

from collections.abc import Callable
from typing import NamedTuple

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

#: Numbers of directions for which products are compiled: as few as hold all are used.
_SIZES = (0, 16)
#: A direction of less than this share of a vector is rounding.
_ROUNDING = 100.0


class LowRank(NamedTuple):
    """J = Σ_r rates_r v_r v_rᵀ, largest |rate| first; the rest of the room is zero."""

    directions: Float[Array, "room size"]
    rates: Float[Array, " room"]
    rank: Int[Array, ""]

    def coordinates(self, vectors: Float[Array, "k size"]) -> Float[Array, "k room"]:
        """⟨v_r, x⟩ of each vector."""

        def of(size: int) -> Array:
            part = vectors @ self.directions[:size].T
            return jnp.pad(part, ((0, 0), (0, self.rates.size - size)))

        return self._in_few(of)

    def combined(self, coordinates: Float[Array, "k room"]) -> Float[Array, "k size"]:
        """Σ_r c_r v_r for each row of coordinates."""
        return self._in_few(lambda size: coordinates[:, :size] @ self.directions[:size])

    def _in_few(self, product: Callable[[int], Array]) -> Array:
        sizes = sizes_up_to(self.rates.size)
        if len(sizes) == 1:
            return product(sizes[0])
        branches = [lambda size=size: product(size) for size in sizes]
        return jax.lax.switch(self._index(sizes), branches)

    def _index(self, sizes: tuple[int, ...]) -> Int[Array, ""]:
        # The same for a whole batch: otherwise vmap computes every branch.
        largest = eqxi.unvmap_max(self.rank)
        return jnp.sum(jnp.asarray(sizes) < largest).astype(jnp.int32)


def sizes_up_to(room: int) -> tuple[int, ...]:
    return (*(size for size in _SIZES if size < room), room)


def no_directions(room: int, size: int, dtype: jnp.dtype) -> LowRank:
    return LowRank(
        jnp.zeros((room, size), dtype), jnp.zeros(room, dtype), jnp.asarray(0)
    )


def learned(
    j: LowRank,
    step: Float[Array, " size"],
    change: Float[Array, " size"],
    least: Float[Array, ""],
) -> LowRank:
    """The matrix nearest to J that is symmetric and maps `step` to `change`.

    In the Frobenius norm: Powell's symmetric Broyden update [Dennis & Schnabel 1983, eq.
    9.1.3], which adds at most two directions. Of the result those with |rate| > `least`
    are kept, as far as there is room.
    """
    sizes = sizes_up_to(j.rates.size)
    branches = [
        lambda size=size: _learned(j, size, step, change, least) for size in sizes
    ]
    return jax.lax.switch(j._index(sizes), branches)


def _learned(
    j: LowRank, size: int, step: Array, change: Array, least: Array
) -> LowRank:
    room, known, rates = j.rates.size, j.directions[:size], j.rates[:size]
    length = jnp.linalg.norm(step)
    step, change = step / length, change / length
    first = _new_direction(known, step)
    second = _new_direction(jnp.concatenate([known, first[None]]), change)
    basis = jnp.concatenate([known, first[None], second[None]])
    along, image = basis @ step, basis @ change
    rest = image - jnp.pad(rates, (0, 2)) * along
    square = along @ along
    update = jnp.outer(along, rest) / square
    overlap = (along @ rest) / square**2
    small = (
        jnp.diag(jnp.pad(rates, (0, 2)))
        + update
        + update.T
        - overlap * jnp.outer(along, along)
    )
    rates, vectors = jnp.linalg.eigh(small)
    order = jnp.argsort(-jnp.abs(rates))[: min(size + 2, room)]
    rates, vectors = rates[order], vectors[:, order]
    kept = jnp.abs(rates) > least
    rates = jnp.where(kept, rates, 0)
    directions = jnp.where(kept, vectors, 0).T @ basis
    missing = room - rates.size
    return LowRank(
        jnp.pad(directions, ((0, missing), (0, 0))),
        jnp.pad(rates, (0, missing)),
        jnp.sum(kept).astype(j.rank.dtype),
    )


def _new_direction(known: Array, vector: Array) -> Array:
    """Of unit length, orthogonal to what is known; 0 if nothing but rounding is left."""
    size = jnp.linalg.norm(vector)
    for _ in range(2):  # Once leaves what rounding brings back.
        vector = vector - (known @ vector) @ known
    left = jnp.linalg.norm(vector)
    is_new = left > _ROUNDING * jnp.finfo(vector.dtype).eps * size
    return jnp.where(is_new, vector / jnp.where(is_new, left, 1), 0)
