"""A symmetric matrix of low rank that learns from what it is compared with."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

#: Numbers of directions for which products are compiled, beside all: the fewest that hold
#: what is known are used.
_NONE, _FEW, _SOME = 0, 16, 32
#: Below this many numbers a product with all directions costs next to nothing.
_CHEAP = 2**16
#: A direction of less than this share of a vector is rounding.
_ROUNDING = 100.0


class LowRank(NamedTuple):
    """J = Σ_r rates_r v_r v_rᵀ with orthonormal v_r = Σ_i vectors_ir basis_i.

    What is learned adds rows to the basis and turns `vectors` alone, which are small;
    where there is no more room the basis is turned too.

    - `basis`: orthonormal rows, of which the first `used` are; the others are zero.
    - `vectors`: orthogonal where they are used, and zero elsewhere.
    - `rates`: largest |rate| first.
    """

    basis: Float[Array, "rows size"]
    vectors: Float[Array, "rows rows"]
    rates: Float[Array, " rows"]
    used: Int[Array, ""]

    @property
    def rows(self) -> int:
        return self.rates.size

    def coordinates(self, vectors: Float[Array, "k size"]) -> Float[Array, "k rows"]:
        """⟨v_r, x⟩ of each vector."""
        return self._in_few(
            lambda size: (vectors @ self.basis[:size].T) @ self.vectors[:size]
        )

    def combined(self, coordinates: Float[Array, "k rows"]) -> Float[Array, "k size"]:
        """Σ_r c_r v_r for each row of coordinates."""
        return self._in_few(
            lambda size: (coordinates @ self.vectors[:size].T) @ self.basis[:size]
        )

    def _in_few(self, product: Callable[[int], Array]) -> Array:
        if self.basis.size <= _CHEAP:
            return product(self.rows)
        return self.by_size(product, (_NONE, _FEW, _SOME, self.rows))

    def by_size(self, branch: Callable[[int], PyTree], sizes: Sequence[int]) -> PyTree:
        """`branch` of the least of the sizes that holds what is used."""
        sizes = sorted({min(size, self.rows) for size in sizes})
        # The same for a whole batch: otherwise vmap computes every branch.
        largest = eqxi.unvmap_max(self.used)
        index = jnp.sum(jnp.asarray(sizes) < largest).astype(jnp.int32)
        return jax.lax.switch(index, [partial(branch, size) for size in sizes])


def no_directions(rows: int, size: int, dtype: jnp.dtype) -> LowRank:
    return LowRank(
        jnp.zeros((rows, size), dtype),
        jnp.zeros((rows, rows), dtype),
        jnp.zeros(rows, dtype),
        jnp.asarray(0),
    )


def of_rows(rows: Float[Array, "k size"], room: int) -> LowRank:
    """−GᵀG for a matrix G, with room for at least as many directions as that has.

    Of GGᵀ's eigenvalues those below √ε of the largest are left out: they are not known.
    """
    count, size = rows.shape
    eps = jnp.finfo(rows.dtype).eps
    if count > size:
        rates, vectors = jnp.linalg.eigh(rows.T @ rows)
        directions, kept = vectors.T, rates > size * eps * rates[-1]
    else:
        rates, vectors = jnp.linalg.eigh(rows @ rows.T)
        kept = rates > jnp.sqrt(eps).astype(rates.dtype) * rates[-1]
        directions = (vectors.T @ rows) / jnp.sqrt(jnp.where(kept, rates, 1))[:, None]
    directions = jnp.where(kept[:, None], directions, 0)
    # Orthonormal to √ε so far: by a step of Newton's method [Higham 2008, ch. 8] to ε. Much
    # faster than a QR factorization.
    off = directions @ directions.T - jnp.diag(kept.astype(rates.dtype))
    directions = directions - off @ directions / 2
    left = (0, room - rates.size)
    return LowRank(
        jnp.pad(directions[::-1], (left, (0, 0))),
        jnp.diag(jnp.pad(kept[::-1], left).astype(rates.dtype)),
        jnp.pad(-jnp.where(kept, rates, 0)[::-1], left),
        jnp.sum(kept).astype(jnp.asarray(0).dtype),
    )


class Turn(NamedTuple):
    """What coordinates in J's directions become when J has learned.

    - `kept`: the directions that J had room for.
    - `added`: orthonormal rows, orthogonal to those.
    - `turn`: from coordinates in both to those in the new directions.
    """

    kept: Bool[Array, " rows"]
    added: Float[Array, "more size"]
    turn: Float[Array, "rows+more rows"]

    def turned(
        self, seen: Float[Array, "k size"], inner: Float[Array, "k rows"]
    ) -> Float[Array, "k rows"]:
        """The coordinates of what was `seen`, from those in the old directions."""
        inner = jnp.where(self.kept, inner, 0)
        return jnp.concatenate([inner, seen @ self.added.T], axis=1) @ self.turn


def learned(
    j: LowRank,
    steps: Float[Array, "k size"],
    changes: Float[Array, "k size"],
    least: Float[Array, ""],
    rank: int,
) -> tuple[LowRank, Turn]:
    """The matrix nearest to J that is symmetric and maps `steps` to `changes`.

    In the Frobenius norm: Powell's symmetric Broyden update [Dennis & Schnabel 1983, eq.
    9.1.3]. The steps have unit length and are orthogonal to each other, and to J's basis
    but for the first; each change lies in the span of these and of the next step, but for
    the last. So k + 1 directions are added. Where the basis has no room for them, J is
    taken to be of its `rank` largest rates before, of those above `least`.
    """
    everything = jnp.ones(j.rows, bool)
    j, kept = jax.lax.cond(
        j.used + len(steps) + 1 > j.rows,
        lambda: _condensed(j, rank, least),
        lambda: (j, everything),
    )
    # Where many directions are learned at once, many are known.
    sizes = (_FEW, _SOME, j.rows) if len(steps) == 1 else (j.rows,)
    new, added, turn = j.by_size(lambda size: _learned(j, size, steps, changes), sizes)
    return new, Turn(kept, added, turn)


def _condensed(j: LowRank, rank: int, least: Float[Array, ""]) -> tuple[LowRank, Array]:
    kept = (jnp.abs(j.rates) > least) & (jnp.arange(j.rows) < rank)
    new = LowRank(
        jnp.where(kept[:, None], j.vectors.T, 0) @ j.basis,
        jnp.diag(kept.astype(j.rates.dtype)),
        jnp.where(kept, j.rates, 0),
        jnp.sum(kept).astype(j.used.dtype),
    )
    return new, kept


def _learned(
    j: LowRank, size: int, steps: Array, changes: Array
) -> tuple[LowRank, Array, Array]:
    """The new matrix, what is added to its basis, and how coordinates turn."""
    known, count = j.basis[:size], len(steps)
    first = new_direction(steps[0], known)
    added = jnp.concatenate([first[None], steps[1:]])
    last = new_direction(changes[-1], known, added)
    added = jnp.concatenate([added, last[None]])

    def within(vectors: Array) -> Array:
        """Coordinates in J's directions and in those that are added."""
        old = (vectors @ known.T) @ j.vectors[:size, :size]
        return jnp.concatenate([old, vectors @ added.T], axis=1)

    rates = jnp.pad(j.rates[:size], (0, count + 1))
    along = within(steps)
    rest = within(changes) - rates * along
    update = along.T @ rest
    overlap = rest @ along.T
    overlap = (overlap + overlap.T) / 2
    small = jnp.diag(rates) + update + update.T - along.T @ overlap @ along
    number = jnp.arange(rates.size)
    rates, turn = _spectrum(small, (number >= j.used) & (number < size))
    missing = (0, max(j.rows - rates.size, 0))
    turn = jnp.pad(turn[:, : j.rows], ((0, 0), missing))
    place = jnp.arange(j.rows)[:, None] == j.used + jnp.arange(count + 1)
    place = place.astype(rates.dtype)
    new = LowRank(
        j.basis + place @ added,
        j.vectors[:, :size] @ turn[:size] + place @ turn[size:],
        jnp.pad(rates[: j.rows], missing),
        j.used + count + 1,
    )
    unused = jnp.zeros((j.rows - size, j.rows), turn.dtype)
    return new, added, jnp.concatenate([turn[:size], unused, turn[size:]])


def _spectrum(
    matrix: Float[Array, "n n"], unused: Bool[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """Eigenvalues, the largest in size first, and eigenvectors; what is unused is last."""
    # So that eigenvectors do not mix what is unused with directions of rate 0.
    apart = 2 * jnp.linalg.norm(matrix) + 1
    rates, vectors = jnp.linalg.eigh(matrix + jnp.diag(jnp.where(unused, apart, 0)))
    is_unused = jnp.arange(rates.size) >= rates.size - jnp.sum(unused)
    order = jnp.argsort(jnp.where(is_unused, 1, -jnp.abs(rates)))
    rates = jnp.where(is_unused, 0, rates)[order]
    vectors = jnp.where(is_unused, 0, vectors)[:, order]
    return rates, vectors


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
