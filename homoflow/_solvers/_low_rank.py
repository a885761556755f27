"""A symmetric matrix of low rank that learns from what it is compared with."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

#: Numbers of directions for which products are compiled, beside all: the fewest that hold
#: what is known are used.
_NONE, _FEW, _SOME = 0, 16, 32
#: Below this many numbers a product with all directions costs next to nothing.
_CHEAP = 2**16
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
        room = self.rates.size
        if self.directions.size <= _CHEAP:
            return product(room)
        return self.by_size(product, (_NONE, _FEW, room))

    def by_size(self, branch: Callable[[int], PyTree], sizes: Sequence[int]) -> PyTree:
        """`branch` of the least of the sizes that holds what is known."""
        room = self.rates.size
        sizes = sorted({min(size, room) for size in sizes})
        # The same for a whole batch: otherwise vmap computes every branch.
        largest = eqxi.unvmap_max(self.rank)
        index = jnp.sum(jnp.asarray(sizes) < largest).astype(jnp.int32)
        return jax.lax.switch(index, [partial(branch, size) for size in sizes])


def no_directions(room: int, size: int, dtype: jnp.dtype) -> LowRank:
    return LowRank(
        jnp.zeros((room, size), dtype), jnp.zeros(room, dtype), jnp.asarray(0)
    )


def learned(
    j: LowRank,
    steps: Float[Array, "k size"],
    changes: Float[Array, "k size"],
    least: Float[Array, ""],
    seen: Sequence[Float[Array, "_ size"]],
    inner: Sequence[Float[Array, "_ room"]],
) -> tuple[LowRank, list[Float[Array, "_ room"]]]:
    """The matrix nearest to J that is symmetric and maps `steps` to `changes`.

    In the Frobenius norm: Powell's symmetric Broyden update [Dennis & Schnabel 1983, eq.
    9.1.3]. The steps have unit length and are orthogonal to each other, and to J's
    directions but for the first; each change lies in the span of these and of the next
    step, but for the last. So k + 1 directions are added. Of the result those with |rate| >
    `least` are kept, as far as there is room. Also returns the coordinates of what was
    `seen` in its directions, from those in J's, `inner`.
    """

    def at(size: int) -> tuple[LowRank, list[Array]]:
        return _learned(j, size, steps, changes, least, seen, inner)

    # Where many directions are learned at once, many are known.
    room = j.rates.size
    return j.by_size(at, (_FEW, _SOME, room) if len(steps) == 1 else (room,))


def _learned(
    j: LowRank,
    size: int,
    steps: Array,
    changes: Array,
    least: Array,
    seen: Sequence[Array],
    inner: Sequence[Array],
) -> tuple[LowRank, list[Array]]:
    room, known, count = j.rates.size, j.directions[:size], len(steps)
    first = new_direction(steps[0], known)
    basis = jnp.concatenate([known, first[None], steps[1:]])
    last = new_direction(changes[-1], basis)
    basis = jnp.concatenate([basis, last[None]])
    rates = jnp.pad(j.rates[:size], (0, count + 1))
    along = steps @ basis.T
    rest = changes @ basis.T - rates * along
    update = along.T @ rest
    overlap = rest @ along.T
    overlap = (overlap + overlap.T) / 2
    small = jnp.diag(rates) + update + update.T - along.T @ overlap @ along
    rates, vectors = jnp.linalg.eigh(small)
    order = jnp.argsort(-jnp.abs(rates))[: min(rates.size, room)]
    rates, vectors = rates[order], vectors[:, order]
    kept = jnp.abs(rates) > least
    rates = jnp.where(kept, rates, 0)
    vectors = jnp.where(kept, vectors, 0)
    missing = room - rates.size
    new = LowRank(
        jnp.pad(vectors.T @ basis, ((0, missing), (0, 0))),
        jnp.pad(rates, (0, missing)),
        jnp.sum(kept).astype(j.rank.dtype),
    )
    added = basis[size:].T

    def turned(vectors_seen: Array, old: Array) -> Array:
        old = jnp.concatenate([old[:, :size], vectors_seen @ added], axis=1)
        return jnp.pad(old @ vectors, ((0, 0), (0, missing)))

    return new, [turned(*pair) for pair in zip(seen, inner, strict=True)]


def new_direction(
    vector: Float[Array, " size"], *known: Float[Array, "_ size"]
) -> Float[Array, " size"]:
    """Of unit length, orthogonal to what is known; 0 if nothing but rounding is left."""
    size = jnp.linalg.norm(vector)
    for _ in range(2):  # Once leaves what rounding brings back.
        for directions in known:
            vector = vector - (directions @ vector) @ directions
    left = jnp.linalg.norm(vector)
    is_new = left > _ROUNDING * jnp.finfo(vector.dtype).eps * size
    return jnp.where(is_new, vector / jnp.where(is_new, left, 1), 0)
