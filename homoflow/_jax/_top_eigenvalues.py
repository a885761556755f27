"""The largest eigenvalues of a symmetric operator, from products with vectors."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

#: Vectors kept (or eight for each eigenvalue, if that is more) before the basis is thinned
#: out, and how often it may be.
_BASIS = 32
_MAX_CYCLES = 30
#: The same where a good guess is followed.
_FOLLOWING_BASIS = 16
#: Vectors by which the basis has to grow before an answer is believed: a good guess has a
#: small residual at once, whatever eigenvalue it belongs to.
_MIN_STEPS = 8


class TopEigenpairs(NamedTuple):
    """The largest eigenvalues, in falling order.

    - `values`: NaN where the residual never came below what was asked for.
    - `vectors`: their unit vectors, as rows.
    - `residuals`: ‖Hv − λv‖.
    - `num_products`: how many products were computed.
    """

    values: Float[Array, " k"]
    vectors: Float[Array, "k size"]
    residuals: Float[Array, " k"]
    num_products: Int[Array, ""]


def top_eigenvalues(
    product: Callable[[Array], Array], guess: Float[Array, "k size"], rtol: float
) -> TopEigenpairs:
    """The k largest (not the largest absolute) eigenvalues of `product`.

    By Rayleigh–Ritz in a basis that begins with the `guess` and as many random vectors and
    grows by the residual of the worst of the first 2k Ritz vectors. Without a
    preconditioner this is Davidson's method, and spans what block Lanczos does; a full
    basis is thinned out to its best vectors [Stathopoulos, Saad & Wu 1998]. It stops at
    residuals ‖Hv − θv‖ ≤ `rtol`·‖H‖ (‖H‖ as seen so far): then an eigenvalue lies within
    that of each θ, and usually far closer, since their errors are of second order.

    The random vectors, and the k pairs that follow the wanted ones, are there to find
    larger eigenvalues that the guess knows nothing of: its vectors may be as good as exact
    and of other eigenvalues, and each random one sees one of several that are equal. That
    none was missed is not proved.
    """
    k, size = guess.shape
    num_watched = min(2 * k, size)
    stray = jr.normal(jr.key(0), (num_watched - k, size), guess.dtype)
    num = jnp.asarray(num_watched)
    search = _Search(product, jnp.asarray(k), num, num_watched, rtol, _MIN_STEPS)
    state = search.run(jnp.concatenate([guess, stray]), _BASIS)
    is_good = state.residuals <= rtol * state.norm
    return TopEigenpairs(
        jnp.where(is_good, state.values, jnp.nan)[:k],
        state.vectors[:k],
        state.residuals[:k],
        state.num_products,
    )


def follow_eigenpairs(
    product: Callable[[Array], Array],
    guess: Float[Array, "rows size"],
    num_wanted: Int[ArrayLike, ""],
    num_watched: Int[ArrayLike, ""],
    rtol: float | Float[Array, ""],
) -> TopEigenpairs:
    """What the largest eigenvalues and their vectors, known close by, have become.

    As `top_eigenvalues`, for operators that change little from call to call: a guess that
    is still good costs one product for each row that is watched. Of these the first
    `num_wanted` are made accurate; the others are guards, that see an eigenvalue come
    which is about to be one of the largest. One that comes from directions of which the
    guards know nothing is missed.

    **Returns:** as many pairs as there are rows, all with their residuals, by which to tell
    how accurate they are: no value is NaN for being inaccurate. Those that are not watched
    mean nothing, but are not larger than an eigenvalue.
    """
    num_wanted, num_watched = jnp.asarray(num_wanted), jnp.asarray(num_watched)
    rows = guess.shape[0]
    search = _Search(product, num_wanted, num_watched, rows, rtol, 0)
    state = search.run(guess, _FOLLOWING_BASIS)
    return TopEigenpairs(
        state.values, state.vectors, state.residuals, state.num_products
    )


class _Subspace(NamedTuple):
    """An orthonormal basis, its images, and the Ritz pairs that are watched.

    - `projected`: the operator in the basis; the first `length` rows are in use.
    - `worst`: the residual vector by which the basis grows next.
    - `norm`: the largest absolute Ritz value.
    """

    basis: Float[Array, "room size"]
    images: Float[Array, "room size"]
    projected: Float[Array, "room room"]
    length: Int[Array, ""]
    num_products: Int[Array, ""]
    values: Float[Array, " watched"]
    vectors: Float[Array, "watched size"]
    residuals: Float[Array, " watched"]
    worst: Float[Array, " size"]
    norm: Float[Array, ""]
    is_done: Bool[Array, ""]


class _Search(NamedTuple):
    """How the pairs are looked for.

    - `num_wanted`: how many have to be accurate, of the `num_watched` that are in sight, of
        which there may be `rows`.
    - `min_steps`: by how many vectors the basis has to grow in any case.
    """

    product: Callable[[Array], Array]
    num_wanted: Int[Array, ""]
    num_watched: Int[Array, ""]
    rows: int
    rtol: float | Float[Array, ""]
    min_steps: int

    def run(self, first: Float[Array, "rows size"], least_room: int) -> "_Subspace":
        """The pairs, from a basis that begins with what `first` spans."""
        room = min(first.shape[1], max(least_room, 4 * self.rows))

        def is_unfinished(loop: tuple[_Subspace, Array]) -> Array:
            state, cycle = loop
            return ~state.is_done & (cycle < _MAX_CYCLES)

        def run_cycle(loop: tuple[_Subspace, Array]) -> tuple[_Subspace, Array]:
            state, cycle = loop
            state = self.thin_out(state)
            state = lax.while_loop(
                lambda s: ~s.is_done & (s.length < room), self.grow, state
            )
            return state, cycle + 1

        start = self.start(first, room)
        return lax.while_loop(is_unfinished, run_cycle, (start, jnp.asarray(0)))[0]

    def start(self, first: Float[Array, "rows size"], room: int) -> _Subspace:
        """The vectors to begin with, made orthonormal, and their images."""
        size, dtype, rows = first.shape[1], first.dtype, self.rows
        is_watched = jnp.arange(rows) < self.num_watched
        first = jnp.where(is_watched[:, None], jnp.linalg.qr(first.T)[0].T, 0)

        def fill(i: Array, images: Array) -> Array:
            return images.at[i].set(self.product(first[i]))

        images = lax.fori_loop(0, self.num_watched, fill, jnp.zeros_like(first))
        empty = jnp.zeros((room, size), dtype)
        projected = jnp.zeros((room, room), dtype)
        return self._look(
            empty.at[:rows].set(first),
            empty.at[:rows].set(images),
            projected.at[:rows, :rows].set(first @ images.T),
            self.num_watched,
            self.num_watched,
        )

    def grow(self, state: _Subspace) -> _Subspace:
        """One more vector in the basis: the worst residual, without what is known."""
        new = self._new_direction(state)
        image = self.product(new)
        at = state.length
        basis, images = state.basis.at[at].set(new), state.images.at[at].set(image)
        row = basis @ image
        projected = state.projected.at[at].set(row).at[:, at].set(row)
        return self._look(basis, images, projected, at + 1, state.num_products + 1)

    def thin_out(self, state: _Subspace) -> _Subspace:
        """The better half of a full basis; any other as it is."""
        room = state.basis.shape[0]
        num_kept = max(self.rows, room // 2)
        values, coordinates = _ritz(state.projected, state.length)
        best = coordinates[:, ::-1][:, :num_kept].T
        values = values[::-1][:num_kept]
        kept = state._replace(
            basis=jnp.zeros_like(state.basis).at[:num_kept].set(best @ state.basis),
            images=jnp.zeros_like(state.images).at[:num_kept].set(best @ state.images),
            projected=jnp.zeros_like(state.projected)
            .at[:num_kept, :num_kept]
            .set(jnp.diag(values)),
            length=jnp.asarray(num_kept),
        )
        is_full = (state.length == room) & (num_kept < room)
        return jax.tree.map(lambda a, b: jnp.where(is_full, a, b), kept, state)

    def _new_direction(self, state: _Subspace) -> Float[Array, " size"]:
        """A unit vector orthogonal to the basis."""
        size, dtype = state.worst.size, state.worst.dtype

        def orthogonal(z):
            for _ in range(2):  # Once leaves what rounding brings back.
                z = z - (state.basis @ z) @ state.basis
            return z

        z = orthogonal(state.worst)
        length = jnp.linalg.norm(z)
        # Where the basis is invariant a residual is rounding, and anything else is new.
        is_new = length > 10 * jnp.finfo(dtype).eps * state.norm
        stray = orthogonal(jr.normal(jr.key(state.num_products), (size,), dtype))
        z = jnp.where(is_new, z, stray)
        # An almost parallel one is orthogonal to its own length only.
        z = orthogonal(z / jnp.linalg.norm(z))
        return z / jnp.linalg.norm(z)

    def _look(
        self,
        basis: Array,
        images: Array,
        projected: Array,
        length: Int[Array, ""],
        num_products: Int[Array, ""],
    ) -> _Subspace:
        """The Ritz pairs of a basis, and whether they will do."""
        values, coordinates = _ritz(projected, length)
        index = jnp.arange(values.size)
        is_used = index >= values.size - length
        norm = jnp.max(jnp.where(is_used, jnp.abs(values), 0))
        top = coordinates[:, ::-1][:, : self.rows].T
        values = values[::-1][: self.rows]
        vectors = top @ basis
        errors = top @ images - values[:, None] * vectors
        residuals = jnp.linalg.norm(errors, axis=1)
        is_small = residuals <= self.rtol * norm
        # The pairs that follow need not be exact, only be known to stay below.
        is_below = values + residuals <= values[self.num_wanted - 1]
        index = jnp.arange(self.rows)
        is_wanted, is_watched = index < self.num_wanted, index < self.num_watched
        is_enough = is_small | (~is_wanted & is_below) | ~is_watched
        num_needed = jnp.minimum(basis.shape[1], self.num_watched + self.min_steps)
        is_done = jnp.all(is_enough) & (num_products >= num_needed)
        # What is good enough gets no further vector as long as something else is not.
        missing = jnp.where(is_enough & ~jnp.all(is_enough), -1, residuals)
        missing = jnp.where(is_watched, missing, -1)
        return _Subspace(
            basis,
            images,
            projected,
            length,
            num_products,
            values,
            vectors,
            residuals,
            errors[jnp.argmax(missing)],
            norm,
            is_done | ~jnp.isfinite(norm),
        )


def _ritz(
    projected: Float[Array, "room room"], length: Int[Array, ""]
) -> tuple[Float[Array, " room"], Float[Array, "room room"]]:
    """Ritz values in rising order and their coordinates, those not in use first."""
    index = jnp.arange(projected.shape[0])
    is_used = index < length
    matrix = jnp.where(is_used[:, None] & is_used, projected, 0)
    lowest = -2 * jnp.max(jnp.sum(jnp.abs(matrix), axis=1)) - 1
    matrix = matrix + jnp.diag(jnp.where(is_used, 0, lowest))
    return jnp.linalg.eigh(matrix)
