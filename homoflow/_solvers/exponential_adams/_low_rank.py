"""A symmetric matrix of low rank, and its secant updates."""

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

    An update adds rows to the basis and turns `vectors` alone, which are small;
    where there is no more room the basis is turned too.

    - `basis`: orthonormal rows, of which the first `num_used` are; the others are zero.
    - `vectors`: orthogonal where they are used, and zero elsewhere.
    - `rates`: largest |rate| first.
    """

    basis: Float[Array, "rows size"]
    vectors: Float[Array, "rows rows"]
    rates: Float[Array, " rows"]
    num_used: Int[Array, ""]

    @property
    def num_rows(self) -> int:
        return self.rates.size

    def coordinates(self, vectors: Float[Array, "k size"]) -> Float[Array, "k rows"]:
        """⟨v_r, x⟩ of each vector."""
        return self._with_few_directions(
            lambda size: (vectors @ self.basis[:size].T) @ self.vectors[:size]
        )

    def combine(self, coordinates: Float[Array, "k rows"]) -> Float[Array, "k size"]:
        """Σ_r c_r v_r for each row of coordinates."""
        return self._with_few_directions(
            lambda size: (coordinates @ self.vectors[:size].T) @ self.basis[:size]
        )

    def _with_few_directions(self, product: Callable[[int], Array]) -> Array:
        if self.basis.size <= _CHEAP:
            return product(self.num_rows)
        return self.by_size(product, (_NONE, _FEW, _SOME, self.num_rows))

    def by_size(self, branch: Callable[[int], PyTree], sizes: Sequence[int]) -> PyTree:
        """`branch` of the least of the sizes that holds what is used."""
        sizes = sorted({min(size, self.num_rows) for size in sizes})
        # The same for a whole batch: otherwise vmap computes every branch.
        largest = eqxi.unvmap_max(self.num_used)
        index = jnp.sum(jnp.asarray(sizes) < largest).astype(jnp.int32)
        return jax.lax.switch(index, [partial(branch, size) for size in sizes])


def no_directions(rows: int, size: int, dtype: jnp.dtype) -> LowRank:
    return LowRank(
        jnp.zeros((rows, size), dtype),
        jnp.zeros((rows, rows), dtype),
        jnp.zeros(rows, dtype),
        jnp.asarray(0),
    )


def from_rows(rows: Float[Array, "k size"], num_rows: int) -> LowRank:
    """−GᵀG for a matrix G, in a basis of `num_rows`, at least as many as G has directions.

    Of GGᵀ's eigenvalues those below √ε of the largest are left out: they are not known.
    """
    count, size = rows.shape
    eps = jnp.finfo(rows.dtype).eps
    if count > size:
        rates, vectors = jnp.linalg.eigh(rows.T @ rows)
        directions, is_kept = vectors.T, rates > size * eps * rates[-1]
    else:
        rates, vectors = jnp.linalg.eigh(rows @ rows.T)
        is_kept = rates > jnp.sqrt(eps).astype(rates.dtype) * rates[-1]
        directions = (vectors.T @ rows) / jnp.sqrt(jnp.where(is_kept, rates, 1))[
            :, None
        ]
    directions = jnp.where(is_kept[:, None], directions, 0)
    # Orthonormal to √ε so far: by a step of Newton's method [Higham 2008, ch. 8] to ε. Much
    # faster than a QR factorization.
    off = directions @ directions.T - jnp.diag(is_kept.astype(rates.dtype))
    directions = directions - off @ directions / 2
    left = (0, num_rows - rates.size)
    return LowRank(
        jnp.pad(directions[::-1], (left, (0, 0))),
        jnp.diag(jnp.pad(is_kept[::-1], left).astype(rates.dtype)),
        jnp.pad(-jnp.where(is_kept, rates, 0)[::-1], left),
        jnp.sum(is_kept).astype(jnp.asarray(0).dtype),
    )


class Turn(NamedTuple):
    """What coordinates in J's directions become when J is updated.

    - `is_kept`: which directions J had room for.
    - `added`: orthonormal rows, orthogonal to those.
    - `turn`: from coordinates in both to those in the new directions.
    """

    is_kept: Bool[Array, " rows"]
    added: Float[Array, "more size"]
    turn: Float[Array, "rows+more rows"]

    def new_coordinates(
        self, vectors: Float[Array, "k size"], coordinates: Float[Array, "k rows"]
    ) -> Float[Array, "k rows"]:
        """The vectors' coordinates, from those in the old directions."""
        old = jnp.where(self.is_kept, coordinates, 0)
        return jnp.concatenate([old, vectors @ self.added.T], axis=1) @ self.turn


def secant_update(
    j: LowRank,
    steps: Float[Array, "k size"],
    changes: Float[Array, "k size"],
    min_rate: Float[Array, ""],
    rank: int,
) -> tuple[LowRank, Turn]:
    """The matrix nearest to J that is symmetric and maps `steps` to `changes`.

    In the Frobenius norm: Powell's symmetric Broyden update [Dennis & Schnabel 1983, eq.
    9.1.3]. The steps have unit length and are orthogonal to each other, and to J's basis
    but for the first; each change lies in the span of these and of the next step, but for
    the last. So k + 1 directions are added. Where the basis has no room for them, J is
    taken to be of its `rank` largest rates before, of those above `min_rate`.
    """
    all_kept = jnp.ones(j.num_rows, bool)
    j, is_kept = jax.lax.cond(
        j.num_used + len(steps) + 1 > j.num_rows,
        lambda: _condense(j, rank, min_rate),
        lambda: (j, all_kept),
    )
    # Where many directions are added at once, many are known.
    sizes = (_FEW, _SOME, j.num_rows) if len(steps) == 1 else (j.num_rows,)
    new, added, turn = j.by_size(
        lambda size: _add_directions(j, size, steps, changes), sizes
    )
    return new, Turn(is_kept, added, turn)


def _condense(
    j: LowRank, rank: int, min_rate: Float[Array, ""]
) -> tuple[LowRank, Array]:
    """J of its largest rates alone, with a basis that has room again."""
    is_kept = (jnp.abs(j.rates) > min_rate) & (jnp.arange(j.num_rows) < rank)
    new = LowRank(
        jnp.where(is_kept[:, None], j.vectors.T, 0) @ j.basis,
        jnp.diag(is_kept.astype(j.rates.dtype)),
        jnp.where(is_kept, j.rates, 0),
        jnp.sum(is_kept).astype(j.num_used.dtype),
    )
    return new, is_kept


def _add_directions(
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
    residual = within(changes) - rates * along
    update = along.T @ residual
    overlap = residual @ along.T
    overlap = (overlap + overlap.T) / 2
    small = jnp.diag(rates) + update + update.T - along.T @ overlap @ along
    number = jnp.arange(rates.size)
    rates, turn = _spectrum(small, (number >= j.num_used) & (number < size))
    missing = (0, max(j.num_rows - rates.size, 0))
    turn = jnp.pad(turn[:, : j.num_rows], ((0, 0), missing))
    place = jnp.arange(j.num_rows)[:, None] == j.num_used + jnp.arange(count + 1)
    place = place.astype(rates.dtype)
    new = LowRank(
        j.basis + place @ added,
        j.vectors[:, :size] @ turn[:size] + place @ turn[size:],
        jnp.pad(rates[: j.num_rows], missing),
        j.num_used + count + 1,
    )
    unused = jnp.zeros((j.num_rows - size, j.num_rows), turn.dtype)
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
