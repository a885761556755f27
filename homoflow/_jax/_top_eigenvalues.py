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
#: small residual at once, whatever eigenvalue it belongs to. Fewer where a guard is known.
_MIN_STEPS, _MIN_STEPS_KNOWN = 8, 2


class TopEigenpairs(NamedTuple):
    """The largest eigenvalues, in falling order.

    - `values`: NaN where the residual never came below what was asked for.
    - `vectors`: their unit vectors, as rows.
    - `residuals`: ‖Hv − λv‖.
    - `norm`: ‖H‖ as far as it was seen.
    - `num_products`: how many products were computed.
    """

    values: Float[Array, " k"]
    vectors: Float[Array, "k size"]
    residuals: Float[Array, " k"]
    norm: Float[Array, ""]
    num_products: Int[Array, ""]


def top_eigenvalues(
    product: Callable[[Array], Array],
    guess: Float[Array, "k size"],
    rtol: float,
    known: "Known | None" = None,
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

    What is `known` from an operator that was much the same is a guard vector for the next
    eigenvalue: then one random vector is enough beside it, and fewer steps. The next guard
    is the last of the `vectors` then, if there are more than k weights.
    """
    k, size = guess.shape
    most, few = min(max(2 * k, k + 2), size), min(k + 2, size)
    key = jr.key(0) if known is None else jr.key(known.count)
    stray = jr.normal(key, (most - k, size), guess.dtype)
    num, min_steps = min(2 * k, size), _MIN_STEPS
    if known is not None:
        is_known = known.count > 0
        num = jnp.where(is_known, few, num)
        min_steps = jnp.where(is_known, _MIN_STEPS_KNOWN, min_steps)
        if most > k:
            guard = jnp.where(is_known, known.guard, stray[0])
            stray = stray.at[0].set(guard)
    wanted, watched = jnp.asarray(k), jnp.asarray(num)
    search = _Search(product, wanted, watched, most, rtol, min_steps)
    found = search.run(jnp.concatenate([guess, stray]), _BASIS)
    is_good = found.residuals <= rtol * found.norm
    return found._replace(
        values=jnp.where(is_good, found.values, jnp.nan)[:k],
        vectors=found.vectors[: k if known is None else k + 1],
        residuals=found.residuals[:k],
    )


class Known(NamedTuple):
    """What is known of the eigenvalues that follow those looked for.

    - `guard`: the vector of the next one.
    - `count`: how many operators were looked at since nothing was known, 0 if nothing is.
    """

    guard: Float[Array, " size"]
    count: Int[Array, ""]


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
    how accurate they are: no value is NaN for being inaccurate. Values that are not
    watched mean nothing, but are not larger than an eigenvalue; their vectors are the guess.
    """
    num_wanted, num_watched = jnp.asarray(num_wanted), jnp.asarray(num_watched)
    rows = guess.shape[0]
    search = _Search(product, num_wanted, num_watched, rows, rtol, 0)
    return search.run(guess, _FOLLOWING_BASIS)


class _Subspace(NamedTuple):
    """An orthonormal basis, its images, and what is known of the Ritz pairs watched.

    - `basis`, `images`, `projected`: vectors, their products, and the operator between
        them; the first `length` rows are in use.
    - `values`, `coordinates`, `residuals`: of the Ritz pairs, which are rows.
    - `worst`: the pair by whose residual the basis grows next.
    - `norm`: the largest absolute Ritz value.
    """

    basis: Float[Array, "room size"]
    images: Float[Array, "room size"]
    projected: Float[Array, "room room"]
    length: Int[Array, ""]
    num_products: Int[Array, ""]
    values: Float[Array, " rows"]
    coordinates: Float[Array, "rows room"]
    residuals: Float[Array, " rows"]
    worst: Int[Array, ""]
    norm: Float[Array, ""]
    is_done: Bool[Array, ""]

    def vector(self, pair: int | Int[Array, ""]) -> Float[Array, " size"]:
        return _combine(self.coordinates[pair], self.basis, self.length)

    def residual(self, pair: Int[Array, ""]) -> Float[Array, " size"]:
        """Hv − θv of a Ritz pair."""
        image = _combine(self.coordinates[pair], self.images, self.length)
        return image - self.values[pair] * self.vector(pair)

    def orthogonal(self, z: Float[Array, " size"]) -> Float[Array, " size"]:
        """What of a vector is not in the basis."""
        return z - _combine(_dots(self.basis, z, self.length), self.basis, self.length)


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
    min_steps: int | Int[Array, ""]

    def run(self, first: Float[Array, "rows size"], least_room: int) -> TopEigenpairs:
        """The pairs, from a basis that begins with what `first` spans."""
        room = min(first.shape[1], max(least_room, 4 * self.rows))
        start = self.start(first)

        def search(start: _Subspace) -> TopEigenpairs:
            return self._answer(self._extend(_enlarged(start, room), room), first)

        def answer(start: _Subspace) -> TopEigenpairs:
            return self._answer(start, first)

        # A guess that is good enough needs no room.
        return lax.cond(start.is_done, answer, search, start)

    def _extend(self, start: _Subspace, room: int) -> _Subspace:
        def is_unfinished(loop: tuple[_Subspace, Array]) -> Array:
            state, cycle = loop
            return ~state.is_done & (cycle < _MAX_CYCLES)

        def run_cycle(loop: tuple[_Subspace, Array]) -> tuple[_Subspace, Array]:
            state, cycle = loop
            is_full = (state.length == room) & (cycle > 0)
            state = lax.cond(is_full, self.thin_out, lambda s: s, state)
            state = lax.while_loop(
                lambda s: ~s.is_done & (s.length < room), self.grow, state
            )
            return state, cycle + 1

        return lax.while_loop(is_unfinished, run_cycle, (start, jnp.asarray(0)))[0]

    def _answer(
        self, state: _Subspace, first: Float[Array, "rows size"]
    ) -> TopEigenpairs:
        """The pairs that are watched; vectors that are not are as they were."""

        def fill(i: Array, vectors: Array) -> Array:
            return vectors.at[i].set(state.vector(i))

        vectors = lax.fori_loop(0, self.num_watched, fill, first)
        return TopEigenpairs(
            state.values, vectors, state.residuals, state.norm, state.num_products
        )

    def start(self, first: Float[Array, "rows size"]) -> _Subspace:
        """The vectors to begin with, made orthonormal, and their images."""
        rows, dtype = self.rows, first.dtype
        none, nothing = jnp.asarray(0), jnp.zeros(rows, dtype)
        square = jnp.zeros((rows, rows), dtype)
        empty = _Subspace(
            basis=jnp.zeros_like(first),
            images=jnp.zeros_like(first),
            projected=square,
            length=none,
            num_products=none,
            values=nothing,
            coordinates=square,
            residuals=nothing,
            worst=none,
            norm=jnp.zeros((), dtype),
            is_done=jnp.asarray(False),
        )
        append = lambda i, state: self._append(state, first[i])  # noqa: E731
        return self._look(lax.fori_loop(0, self.num_watched, append, empty))

    def grow(self, state: _Subspace) -> _Subspace:
        """One more vector in the basis: the worst residual, without what is known."""
        return self._look(self._append(state, state.residual(state.worst)))

    def thin_out(self, state: _Subspace) -> _Subspace:
        """The better half of a full basis; a small one as it is."""
        room = state.basis.shape[0]
        num_kept = max(self.rows, room // 2)
        if num_kept >= room:
            return state
        values, coordinates = _ritz(state.projected, state.length)
        best = coordinates[:, ::-1][:, :num_kept].T
        values = values[::-1][:num_kept]
        return state._replace(
            basis=jnp.zeros_like(state.basis).at[:num_kept].set(best @ state.basis),
            images=jnp.zeros_like(state.images).at[:num_kept].set(best @ state.images),
            projected=jnp.zeros_like(state.projected)
            .at[:num_kept, :num_kept]
            .set(jnp.diag(values)),
            coordinates=jnp.eye(self.rows, room, dtype=values.dtype),
            length=jnp.asarray(num_kept),
        )

    def _append(self, state: _Subspace, z: Float[Array, " size"]) -> _Subspace:
        """A vector more in the basis, with its product."""
        dtype, size, at = z.dtype, z.size, state.length
        new = state.orthogonal(z)
        length = jnp.linalg.norm(new)
        # Where the basis is invariant a residual is rounding, and anything else is new.
        least = jnp.maximum(state.norm, jnp.linalg.norm(z))
        is_new = length > 10 * jnp.finfo(dtype).eps * least

        def stray() -> Array:
            random = jr.normal(jr.key(state.num_products), (size,), dtype)
            return state.orthogonal(random)

        new = lax.cond(is_new, lambda: new, stray)
        # Twice: once leaves what rounding brings back.
        new = state.orthogonal(new / jnp.linalg.norm(new))
        new = new / jnp.linalg.norm(new)
        image = self.product(new)
        basis, images = state.basis.at[at].set(new), state.images.at[at].set(image)
        row = _dots(basis, image, at + 1)
        projected = state.projected.at[at].set(row).at[:, at].set(row)
        return state._replace(
            basis=basis,
            images=images,
            projected=projected,
            length=at + 1,
            num_products=state.num_products + 1,
        )

    def _look(self, state: _Subspace) -> _Subspace:
        """The Ritz pairs of a basis, and whether they will do."""
        values, coordinates = _ritz(state.projected, state.length)
        index = jnp.arange(values.size)
        is_used = index >= values.size - state.length
        norm = jnp.max(jnp.where(is_used, jnp.abs(values), 0))
        state = state._replace(
            values=values[::-1][: self.rows],
            coordinates=coordinates[:, ::-1][:, : self.rows].T,
            norm=norm,
        )

        def measure(i: Array, residuals: Array) -> Array:
            return residuals.at[i].set(jnp.linalg.norm(state.residual(i)))

        residuals = jnp.zeros_like(state.values)
        residuals = lax.fori_loop(0, self.num_watched, measure, residuals)
        is_small = residuals <= self.rtol * norm
        # The pairs that follow need not be exact, only be known to stay below.
        is_below = state.values + residuals <= state.values[self.num_wanted - 1]
        index = jnp.arange(self.rows)
        is_wanted, is_watched = index < self.num_wanted, index < self.num_watched
        is_enough = is_small | (~is_wanted & is_below) | ~is_watched
        size = state.basis.shape[1]
        num_needed = jnp.minimum(size, self.num_watched + self.min_steps)
        is_done = jnp.all(is_enough) & (state.num_products >= num_needed)
        # What is good enough gets no further vector as long as something else is not.
        missing = jnp.where(is_enough & ~jnp.all(is_enough), -1, residuals)
        missing = jnp.where(is_watched, missing, -1)
        return state._replace(
            residuals=residuals,
            worst=jnp.argmax(missing),
            is_done=is_done | ~jnp.isfinite(norm),
        )


def _enlarged(state: _Subspace, room: int) -> _Subspace:
    """With room for more vectors in the basis."""
    more = room - state.basis.shape[0]
    return state._replace(
        basis=jnp.pad(state.basis, ((0, more), (0, 0))),
        images=jnp.pad(state.images, ((0, more), (0, 0))),
        projected=jnp.pad(state.projected, ((0, more), (0, more))),
        coordinates=jnp.pad(state.coordinates, ((0, 0), (0, more))),
    )


# Bases have few of their rows in use as a rule, and rows are as long as the weights: loops
# over these rows cost less than products of whole arrays.


def _dots(
    rows: Float[Array, "room size"], z: Float[Array, " size"], num: Int[Array, ""]
) -> Float[Array, " room"]:
    """The products of the first `num` rows with a vector, 0 for all others."""

    def fill(i: Array, found: Array) -> Array:
        return found.at[i].set(rows[i] @ z)

    return lax.fori_loop(0, num, fill, jnp.zeros(rows.shape[0], z.dtype))


def _combine(
    factors: Float[Array, " room"],
    rows: Float[Array, "room size"],
    num: Int[Array, ""],
) -> Float[Array, " size"]:
    """The first `num` rows, each times its factor, in one sum."""

    def add(i: Array, total: Array) -> Array:
        return total + factors[i] * rows[i]

    return lax.fori_loop(0, num, add, jnp.zeros_like(rows[0]))


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
