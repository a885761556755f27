"""Sliding: the velocity that keeps pairs on their kinks, and what it takes.

On the pairs that slide the velocity is ẇ = −P∇L, with P the projector onto {v : Jv = 0}
and J the rows ∇_w z_k [Filippov 1988]. With one `base` slope for each pair it is
ẇ = −(g + Jᵀλ), (JJᵀ)λ = −Jg on the sliding pairs. Telescoping from the top layer down,
the gradient at any slopes α is exactly g + Σ_k (α_k − base_k) b_k J_k with b_k = ∂L/∂a_k
at the slopes α above k and J_k at the base slopes: so λ_k = (α_k − base_k) b_k, and
α_k lies between low and high where λ_k lies between 0 and the width (high − low) b_k.

All multipliers here are those of rows scaled to length 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._active_pairs import Slots
from .._system import Rows, System

#: Rows whose directions agree to this much belong to kinks that coincide.
_PARALLEL = 1e-9
#: Rows that are no further from the span of others, though not parallel to one of them,
#: belong to kinks that are not independent.
_DEPENDENT = 1e-5
#: Rows that are no further are left out: what keeps the others at their kinks keeps them.
_REDUNDANT = 1e-6
#: Added to the scaled Gram matrix, whose diagonal is 1.
_JITTER = 1e-14
#: LAPACK (OpenBLAS) factorizes no larger matrix on one thread. Several wait for each other
#: in loops: on busy cores for a hundred times as long as the work takes.
MOST_ON_ONE_THREAD = 127


class Point(NamedTuple):
    """Everything that the field needs at one w, for the pairs in the slots.

    - `scale`: 1/‖J_k‖, 0 where there is no row.
    - `gram`, `rates`: JJᵀ and Jg of the scaled rows.
    - `jump`: ∂L/∂a_k at the base slopes; `above[l, k]`: ∂z_l/∂a_k.
    - `gap`: high − low; `off`: z, in units of the scaled rows.
    - `largest`: the largest |z| of all pairs.
    """

    loss: Float[Array, ""]
    largest: Float[Array, ""]
    gradient: Float[Array, " weights"]
    rows: Rows
    scale: Float[Array, " slots"]
    gram: Float[Array, "slots slots"]
    rates: Float[Array, " slots"]
    jump: Float[Array, " slots"]
    above: Float[Array, "slots slots"]
    gap: Float[Array, " slots"]
    off: Float[Array, " slots"]

    @property
    def length(self) -> Float[Array, " slots"]:
        """‖J_k‖, 0 where there is no row."""
        there = self.scale > 0
        return jnp.where(there, 1 / jnp.where(there, self.scale, 1), 0)


class Groups(NamedTuple):
    """Pairs with parallel rows (repeated or antipodal inputs, say) share a multiplier.

    - `leader`: the slot that carries it, for each slot.
    - `sense`: −1 where a pair's row points against its leader's, else 1.
    """

    leader: Int[Array, " slots"]
    sense: Int[Array, " slots"]

    @property
    def leads(self) -> Bool[Array, " slots"]:
        return self.leader == self._numbers

    @property
    def _numbers(self) -> Int[Array, " slots"]:
        return jnp.arange(self.leader.size, dtype=self.leader.dtype)

    def base_of(self, side: Int[Array, " slots"]) -> Int[Array, " slots"]:
        """Where base slopes are: sliders' on the minus side of their group.

        Their multipliers count from there.
        """
        return jnp.where(side == 0, -self.sense, side)

    def total(self, values: Array) -> Array:
        """Sums over groups, at their leaders."""
        is_member = self.leader[None, :] == self._numbers[:, None]
        return is_member.astype(values.dtype) @ values


def evaluate(system: System, w: Array, base: Array, slots: Slots) -> Point:
    """One gradient of the loss, and one row for each pair in the slots."""
    slopes = system.slope(base)
    found = system.derivatives(w, slopes, slots)
    gram = found.rows.gram()
    square = jnp.diagonal(gram)
    present = slots.used & (square > 0)
    scale = jnp.where(present, 1 / jnp.sqrt(jnp.where(present, square, 1)), 0)
    sample = slots.pair // system.kinks
    together = (
        slots.used[:, None] & slots.used[None, :] & (sample[:, None] == sample[None, :])
    )
    return Point(
        loss=found.loss,
        largest=jnp.max(jnp.abs(found.z)),
        gradient=found.gradient,
        rows=found.rows,
        scale=scale,
        gram=gram * scale[:, None] * scale[None, :],
        rates=system.along(found.rows, found.gradient) * scale,
        jump=jnp.where(slots.used, slots.gathered(found.jump), 0),
        above=jnp.where(together, found.above, 0),
        gap=slots.gathered(system.high - system.low),
        off=slots.gathered(found.z) * scale,
    )


def group(point: Point, used: Bool[Array, " slots"]) -> Groups:
    """Which pairs have parallel rows."""
    numbers = jnp.arange(used.size, dtype=jnp.int32)
    parallel = (jnp.abs(point.gram) > 1 - _PARALLEL) & used[:, None] & used[None, :]
    first = jnp.argmax(parallel, 1).astype(jnp.int32)
    leader = jnp.where(used, first, numbers)
    against = point.gram[numbers, leader] < 0
    sense = jnp.where(against, -1, 1).astype(jnp.int32)
    return Groups(leader, sense)


def gram_solver(
    point: Point, slides: Bool[Array, " slots"]
) -> tuple[
    Callable[[Float[Array, "slots sides"]], Float[Array, "slots sides"]],
    Float[Array, " slots"],
]:
    """Solves (JJᵀ)x = right with the scaled rows of the pairs in `slides`; 0 elsewhere.

    And 0 for rows that those before them span.

    And the part of each row that is outside of the span of those before it (of 1).
    """
    on = slides.astype(point.gram.dtype)
    matrix = point.gram * on[:, None] * on[None, :] + jnp.diag(1 - on + _JITTER)
    factor = _factor(matrix, on)
    outside = jnp.diagonal(factor)
    redundant = slides & (outside < _REDUNDANT)
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
    """The lower Cholesky factor of a matrix that is diagonal but for the slots `on`.

    On one thread, unless there are too many of them: slots are filled from the first.
    """

    def whole():
        return lax.linalg.cholesky(matrix, symmetrize_input=False)

    def first():
        few = slice(MOST_ON_ONE_THREAD)
        block = lax.linalg.cholesky(matrix[few, few], symmetrize_input=False)
        return jnp.diag(jnp.sqrt(jnp.diagonal(matrix))).at[few, few].set(block)

    if on.size <= MOST_ON_ONE_THREAD:
        return whole()
    return lax.cond(jnp.any(on[MOST_ON_ONE_THREAD:] > 0), whole, first)


def multipliers(
    point: Point, slides: Bool[Array, " slots"], fixed: Float[Array, " slots"]
) -> tuple[Float[Array, " slots"], Float[Array, " slots"], Bool[Array, ""]]:
    """λ that keeps the pairs in `slides` on their kinks, others `fixed`.

    And the multipliers of the rows that lead back to the kinks of those pairs, and
    whether λ is unique: it is not where rows are dependent.
    """
    right = jnp.stack([-(point.rates + point.gram @ fixed), point.off], 1)
    solve, outside = gram_solver(point, slides)
    x = solve(right)
    return fixed + x[:, 0], x[:, 1], jnp.min(outside, initial=1) > _DEPENDENT


def widths(
    system: System,
    point: Point,
    groups: Groups,
    multiplier: Float[Array, " slots"],
    used: Bool[Array, " slots"],
    based_on_plus: Bool[Array, " slots"],
) -> Float[Array, " slots"]:
    """The largest multiplier of each group, at its leader: the gradient's whole jump.

    ∂L/∂a at a kink must see the actual slopes of the kinks above it in the same sample.
    Those enter through their multipliers, and a member of another group has the share of
    that group's multiplier that its own jump has in the group's. Members of its own group
    have changed sides where the jump is whole: between the two gradients lies a segment.
    So with groups the widths are found from the top layer down, one layer in a pass.
    """
    length = point.length
    alone = groups.total(jnp.ones_like(multiplier))[groups.leader] == 1
    passes = jnp.where(jnp.any(used & ~alone), system.function.depth, 1)
    own = groups.leader[:, None] == groups.leader[None, :]
    sense = groups.sense.astype(multiplier.dtype)

    def one_layer(number, carry):
        jump, width = carry
        share = jnp.where(width != 0, multiplier / jnp.where(width != 0, width, 1), 0)
        across = sense * point.gap * jump
        shift = jnp.where(
            alone, multiplier * point.scale, share[groups.leader] * across
        )
        whole = jnp.where(based_on_plus, -across, across)
        shifts = jnp.where(own, whole[:, None], shift[:, None])
        # The first pass is at the base slopes: there is no width yet to share.
        shifts = jnp.where(used[:, None] & (number > 0), shifts, 0)
        jump = point.jump + jnp.sum(point.above * shifts, 0)
        return jump, groups.total(jnp.where(used, point.gap * jump * length, 0))

    start = point.jump, jnp.zeros_like(point.jump)
    return lax.fori_loop(0, passes + 1, one_layer, start)[1]


def velocity(system: System, point: Point, multiplier: Array) -> Array:
    """ẇ = −(g + Jᵀλ)."""
    return -(point.gradient + system.against(point.rows, multiplier * point.scale))
