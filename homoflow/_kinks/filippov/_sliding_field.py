"""The velocity that keeps sliding pairs on their kinks, and its multipliers.

While some pairs slide the velocity is ẇ = −P∇L, where P projects onto {v : Jv = 0} and
the rows of J are the gradients ∇_w z_k of the sliding pairs k [Filippov 1988].

Every pair has a *base slope*, that of one of its sides. Let g be the gradient at base
slopes. Then ẇ = −(g + Jᵀλ) with (JJᵀ)λ = −Jg. The multipliers tell the slopes at which
the network is. Telescoping from the top layer down, the gradient at any slopes α is
exactly g + Σ_k (α_k − base_k) b_k J_k, where b_k = ∂L/∂a_k at the slopes α above k, and
J_k is taken at base slopes. So λ_k = (α_k − base_k) b_k, and α_k lies between low and
high if λ_k lies between 0 and the *width* (high − low) b_k.

All multipliers here are those of rows scaled to length 1.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._active_pairs import ActivePairs
from .._rows import Rows
from .._system import System

#: Rows are parallel if the cosine of their angle differs from ±1 by no more.
_MAX_PARALLEL_GAP = 1e-9
#: Rows no further than this from the span of others are dependent on them: multipliers
#: are then not unique.
_MAX_DEPENDENT = 1e-5
#: Rows no further than this are left out. The constraints of the others imply theirs.
_MAX_REDUNDANT = 1e-6
#: Added to the diagonal of the scaled Gram matrix, which is 1.
_JITTER = 1e-14
#: The largest matrix that LAPACK (OpenBLAS) factorizes on one thread. Several threads wait
#: for each other in loops: on busy cores for a hundred times as long as the work takes.
MAX_ON_ONE_THREAD = 127
#: Fewer slots than these are not told apart.
MIN_FEW = 8


class Linearization(NamedTuple):
    """The problem at one w to first order, at base slopes, for the active pairs.

    - `num_used`: of the slots no later one is used.
    - `scale`: 1/‖J_k‖, or 0 in a slot without a row.
    - `gram`, `row_dot_gradient`: JJᵀ and Jg of the scaled rows.
    - `residual`: z in units of the scaled rows, which is rounding error.
    - `slope_gap`: high − low.
    - `dloss_da`: ∂L/∂a_k; `dz_da[l, k]`: ∂z_l/∂a_k, which is 0 unless the kink k is below
        the kink l in the same sample.
    """

    loss: Float[Array, ""]
    num_used: Int[Array, ""]
    gradient: Float[Array, " weights"]
    rows: Rows
    scale: Float[Array, " slots"]
    gram: Float[Array, "slots slots"]
    row_dot_gradient: Float[Array, " slots"]
    residual: Float[Array, " slots"]
    slope_gap: Float[Array, " slots"]
    dloss_da: Float[Array, " slots"]
    dz_da: Float[Array, "slots slots"]

    @property
    def length(self) -> Float[Array, " slots"]:
        """‖J_k‖, or 0 in a slot without a row."""
        has_row = self.scale > 0
        return jnp.where(has_row, 1 / jnp.where(has_row, self.scale, 1), 0)

    def at_pace(self, pace: Float[Array, ""]) -> "Linearization":
        """That of a flow so many times as fast, which slides along the same kinks."""
        return self._replace(
            gradient=pace * self.gradient,
            row_dot_gradient=pace * self.row_dot_gradient,
            dloss_da=pace * self.dloss_da,
        )


class Groups(NamedTuple):
    """Groups of pairs with parallel rows (from repeated or antipodal inputs, say).

    The pairs of a group share one multiplier, which belongs to its leader.

    - `leader`: the leader's slot, for each slot.
    - `sense`: −1 where a pair's row points against its leader's, else 1.
    - `is_shared`: whether a pair's group has other members.
    """

    leader: Int[Array, " slots"]
    sense: Int[Array, " slots"]
    is_shared: Bool[Array, " slots"]

    @property
    def is_leader(self) -> Bool[Array, " slots"]:
        return self.leader == self._slots

    @property
    def _slots(self) -> Int[Array, " slots"]:
        return jnp.arange(self.leader.size, dtype=self.leader.dtype)

    def base_side(self, side: Int[Array, " slots"]) -> Int[Array, " slots"]:
        """The side of each pair's base slope, given its own side (0 while it slides).

        That of a sliding pair is the minus side of its group: multipliers count from
        there.
        """
        return jnp.where(side == 0, -self.sense, side)

    def sum(self, values: Float[Array, " slots"]) -> Float[Array, " slots"]:
        """Sums over groups, at their leaders."""
        return jnp.zeros_like(values).at[self.leader].add(values)

    def truncate(self, capacity: int) -> "Groups":
        """Those of the first slots, if no later one is used."""
        return Groups(*(part[:capacity] for part in self))

    @staticmethod
    def apart(capacity: int) -> "Groups":
        """Where each pair is alone in its group."""
        slots = jnp.arange(capacity, dtype=jnp.int32)
        return Groups(slots, jnp.ones_like(slots), jnp.zeros(capacity, bool))


def linearize(
    system: System, w: Array, base: Int[Array, "samples kinks"], pairs: ActivePairs
) -> Linearization:
    """One gradient of the loss at base slopes, and one row for each active pair."""
    found = system.derivatives(w, system.slope(base), pairs)
    is_used = pairs.is_used
    num_used = pairs.num_slots_used
    gram = in_first_slots(
        num_used, is_used.size, lambda few: found.rows.truncate(few).gram()
    )
    square = jnp.diagonal(gram)
    has_row = is_used & (square > 0)
    scale = jnp.where(has_row, 1 / jnp.sqrt(jnp.where(has_row, square, 1)), 0)
    sample = pairs.flat_index // system.num_kinks
    are_in_sample = (
        is_used[:, None] & is_used[None, :] & (sample[:, None] == sample[None, :])
    )
    return Linearization(
        loss=found.loss,
        num_used=num_used,
        gradient=found.gradient,
        rows=found.rows,
        scale=scale,
        gram=gram * scale[:, None] * scale[None, :],
        row_dot_gradient=system.layout.jvp(found.rows, found.gradient) * scale,
        residual=pairs.gather(found.z) * scale,
        slope_gap=pairs.gather(system.high - system.low),
        dloss_da=jnp.where(is_used, pairs.gather(found.dloss_da), 0),
        dz_da=jnp.where(are_in_sample, found.dz_da, 0),
    )


def group_parallel_rows(at: Linearization, is_used: Bool[Array, " slots"]) -> Groups:
    slots = jnp.arange(is_used.size, dtype=jnp.int32)
    are_parallel = jnp.abs(at.gram) > 1 - _MAX_PARALLEL_GAP
    are_parallel = are_parallel & is_used[:, None] & is_used[None, :]
    first = jnp.argmax(are_parallel, 1).astype(jnp.int32)
    leader = jnp.where(is_used, first, slots)
    is_antiparallel = at.gram[slots, leader] < 0
    sense = jnp.where(is_antiparallel, -1, 1).astype(jnp.int32)
    groups = Groups(leader, sense, jnp.zeros_like(is_used))
    size = groups.sum(is_used.astype(at.gram.dtype))
    return groups._replace(is_shared=(size > 1)[leader])


def in_first_slots(
    num_used: Int[Array, ""], capacity: int, compute: Callable[[int], Array]
) -> Float[Array, "slots _"]:
    """`compute(n)`, a table of n rows, for one of a few n, not less than `num_used`.

    The table gets further rows of zeros, and columns if it has one for each slot.
    Products and factors of matrices take most of the time of an evaluation: in half as
    many slots, a quarter or an eighth of it.
    """
    sizes = *(n for n in (capacity // 4, capacity // 2) if n >= MIN_FEW), capacity

    def compute_in(n: int) -> Array:
        table = compute(n)
        missing = [(0, capacity - n if size == n else 0) for size in table.shape]
        return jnp.pad(table, missing)

    index = sum((num_used > n).astype(int) for n in sizes[:-1])
    return lax.switch(index, [functools.partial(compute_in, n) for n in sizes])


def factorize_gram(
    gram: Float[Array, "slots slots"], slides: Bool[Array, " slots"]
) -> tuple[
    Callable[[Float[Array, "slots sides"]], Float[Array, "slots sides"]],
    Float[Array, " slots"],
]:
    """A solver of (JJᵀ)x = right for the scaled rows of the sliding pairs, from `gram`.

    x is 0 for all other pairs, and for rows that are in the span of those before them.
    Returned too is the length of the part of each row that is outside of that span, as a
    fraction of the row's.
    """
    on = slides.astype(gram.dtype)
    matrix = gram * on[:, None] * on[None, :] + jnp.diag(1 - on + _JITTER)
    factor = _factor(matrix, on)
    outside = jnp.diagonal(factor)
    redundant = slides & (outside < _MAX_REDUNDANT)
    dropped = redundant[:, None] | redundant[None, :]
    factor = jnp.where(dropped, jnp.diag(redundant.astype(on.dtype)), factor)
    on = jnp.where(redundant, 0, on)

    def solve(right):
        y = lax.linalg.triangular_solve(
            factor, right * on[:, None], left_side=True, lower=True
        )
        x = lax.linalg.triangular_solve(
            factor, y, left_side=True, lower=True, transpose_a=True
        )
        return x * on[:, None]

    return solve, jnp.where(slides, outside, 1)


def _factor(
    matrix: Float[Array, "slots slots"], on: Float[Array, " slots"]
) -> Float[Array, "slots slots"]:
    """The lower Cholesky factor of a matrix that is diagonal outside of the slots `on`.

    Slots are filled from the first. While only the first ones are on, just their block is
    factorized, which takes one thread.
    """

    def factorize_all():
        return lax.linalg.cholesky(matrix, symmetrize_input=False)

    def factorize_block():
        few = slice(MAX_ON_ONE_THREAD)
        block = lax.linalg.cholesky(matrix[few, few], symmetrize_input=False)
        return jnp.diag(jnp.sqrt(jnp.diagonal(matrix))).at[few, few].set(block)

    if on.size <= MAX_ON_ONE_THREAD:
        return factorize_all()
    has_later_ones = jnp.any(on[MAX_ON_ONE_THREAD:] > 0)
    return lax.cond(has_later_ones, factorize_all, factorize_block)


class Multipliers(NamedTuple):
    """Multipliers λ of the rows.

    - `correction`: the multipliers that take the sliding pairs back to z = 0, from where
        rounding has taken them.
    - `is_unique`: false where rows are dependent, so that other λ give the same ẇ.
    """

    value: Float[Array, " slots"]
    correction: Float[Array, " slots"]
    is_unique: Bool[Array, ""]


def solve_multipliers(
    at: Linearization, slides: Bool[Array, " slots"], fixed: Float[Array, " slots"]
) -> Multipliers:
    """The multipliers with ż = 0 for the sliding pairs, those of the others `fixed`."""
    right = jnp.stack([-(at.row_dot_gradient + at.gram @ fixed), at.residual], 1)

    def solve_in_first(few: int) -> Float[Array, "few 3"]:
        solve, outside = factorize_gram(at.gram[:few, :few], slides[:few])
        return jnp.concatenate([solve(right[:few]), 1 - outside[:, None]], 1)

    x = in_first_slots(at.num_used, slides.size, solve_in_first)
    is_unique = jnp.max(x[:, 2], initial=0) < 1 - _MAX_DEPENDENT
    return Multipliers(fixed + x[:, 0], x[:, 1], is_unique)


def compute_widths(
    system: System,
    at: Linearization,
    groups: Groups,
    multiplier: Float[Array, " slots"],
    is_used: Bool[Array, " slots"],
    is_based_on_plus: Bool[Array, " slots"],
) -> Float[Array, " slots"]:
    """The width of each group, at its leader: how far its multiplier can go from 0.

    The width of a pair is (high − low) ∂L/∂a · ‖J_k‖, where ∂L/∂a depends on the slopes of
    the kinks above it in the same sample:

    - A kink above that is alone in its group has the slope that its multiplier tells.
    - A member of another group takes part in that group's multiplier. Its part is that of
      its own jump in the group's width.
    - A member of the same group goes from one side to the other together with the pair,
      so it counts with its whole jump.

    The second rule needs widths of kinks above. So they are computed from the top layer
    down, one layer in a pass. Without groups one pass is enough.
    """
    length, gap = at.length, at.slope_gap
    has_groups = jnp.any(is_used & groups.is_shared)
    passes = jnp.where(has_groups, system.function.depth, 1)
    are_in_group = groups.leader[:, None] == groups.leader[None, :]
    sense = groups.sense.astype(multiplier.dtype)

    def widths_at(dloss_da):
        return groups.sum(jnp.where(is_used, gap * dloss_da * length, 0))

    def update_layer(_, carry):
        dloss_da, width = carry
        part = jnp.where(width != 0, multiplier / jnp.where(width != 0, width, 1), 0)
        jump = sense * gap * dloss_da
        shift = jnp.where(
            groups.is_shared, part[groups.leader] * jump, multiplier * at.scale
        )
        whole = jnp.where(is_based_on_plus, -jump, jump)
        in_group = lax.cond(
            has_groups,
            lambda: (whole - shift) @ jnp.where(are_in_group, at.dz_da, 0),
            lambda: jnp.zeros_like(shift),
        )
        # Products with a vector: a sum over a matrix takes ten times as long.
        dloss_da = at.dloss_da + shift @ at.dz_da + in_group
        return dloss_da, widths_at(dloss_da)

    # At the base slopes: no widths above are known yet.
    start = at.dloss_da, widths_at(at.dloss_da)
    return lax.fori_loop(0, passes, update_layer, start)[1]


def sliding_velocity(system: System, at: Linearization, multiplier: Array) -> Array:
    """ẇ = −(g + Jᵀλ)."""
    return -(at.gradient + system.layout.vjp(at.rows, multiplier * at.scale))
