"""On which side a pair at its kink goes on, or whether it slides: complementarity.

Every group of pairs at its kink is in one of three states: on the minus side (λ = 0,
which needs ż ≤ 0), on the plus side (λ = width, ż ≥ 0), or it slides (ż = 0,
0 ≤ λ ≤ width). For positive widths these are the optimality conditions of the element
of least norm in the set of all slopes: min ½‖g + Jᵀλ‖² over 0 ≤ λ ≤ width. Its ẇ is
unique even where JJᵀ is singular. Principal pivoting from the mode before the event
finds it: without an event in no step, at a crossing, entry or exit in one or two.

A negative width is a concave kink: it repels, and nothing slides there.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ._field import Groups, Point, multipliers, widths
from ._system import System

_PIVOTS = 60
#: Pivots in which all violated groups move at once; after them one at a time.
_BLOCK_PIVOTS = 10
#: Up to these, relative to the gradient and to the largest width, signs do not count.
_RATE_TOLERANCE = 1e-13
_BOUND_TOLERANCE = 1e-11


class Mode(NamedTuple):
    """State (−1, 0 = slides, 1), multiplier and width of each group, at its leader.

    - `before`: the multiplier in the states that the search began with.
    - `back`: multipliers of the rows that lead back to the sliders' kinks.
    - `is_unique`: whether no other multipliers of sliders give the same ẇ.
    """

    state: Int[Array, " slots"]
    multiplier: Float[Array, " slots"]
    width: Float[Array, " slots"]
    before: Float[Array, " slots"]
    back: Float[Array, " slots"]
    is_unique: Bool[Array, ""]
    is_settled: Bool[Array, ""]


def find_mode(
    system: System,
    point: Point,
    groups: Groups,
    used: Bool[Array, " slots"],
    based_on_plus: Bool[Array, " slots"],
    start: Int[Array, " slots"],
    settles: Bool[Array, ""],
) -> Mode:
    """The mode in which the flow goes on, or the multipliers in a mode that is known.

    `start` holds the states to begin with, and to end with unless `settles`.
    Multipliers count from the base slopes: from the plus side's for the groups
    `based_on_plus`.
    """
    pivots = jnp.where(settles, _PIVOTS, 1)
    leads = used & groups.leads
    plus = based_on_plus.astype(point.gram.dtype)

    def pivot(carry):
        count, old, proposed, _ = carry
        one = jnp.arange(used.size) == jnp.argmax(proposed != old.state)
        block = count < _BLOCK_PIVOTS
        state = jnp.where(block | one, proposed, old.state)
        on_plus = (state > 0).astype(plus.dtype)
        fixed = jnp.where(leads & (state != 0), old.width * (on_plus - plus), 0)
        multiplier, back, is_unique = multipliers(point, leads & (state == 0), fixed)
        before = jnp.where(count == 0, multiplier, old.before)
        width = widths(system, point, groups, multiplier, used, based_on_plus)
        proposed = jnp.where(
            leads, _proposal(point, state, multiplier, width, plus), state
        )
        # The width of a kink taken with its whole jump depends on multipliers above.
        off_base = leads & (state != 0) & ((state > 0) != based_on_plus)
        change = jnp.abs(width - old.width)
        moved = jnp.any(off_base & (change > 1e-12 * jnp.max(jnp.abs(width))))
        new = Mode(state, multiplier, width, before, back, is_unique, old.is_settled)
        return count + 1, new, proposed, moved

    def unsettled(carry):
        count, mode, proposed, moved = carry
        again = moved | jnp.any(proposed != mode.state)
        return (count == 0) | (again & (count < pivots))

    no, zeros = jnp.asarray(False), jnp.zeros_like(point.scale)
    blank = Mode(start, zeros, zeros, zeros, zeros, no, no)
    first = (jnp.asarray(0), blank, start, no)
    count, mode, _, _ = lax.while_loop(unsettled, pivot, first)
    return mode._replace(is_settled=count < pivots)


def rate_of_change(point: Point, multiplier: Array) -> Array:
    """ż of the scaled rows."""
    return -(point.rates + point.gram @ multiplier)


def smallest_rate(point: Point) -> Array:
    """Smaller rates and jumps are rounding."""
    return _RATE_TOLERANCE * (jnp.linalg.norm(point.gradient) + 1e-300)


def _proposal(
    point: Point, state: Array, multiplier: Array, width: Array, plus: Array
) -> Array:
    """The states that the conditions ask for, where they are violated."""
    smallest = smallest_rate(point)
    slack = _BOUND_TOLERANCE * jnp.max(jnp.abs(width))
    rate = rate_of_change(point, multiplier)
    from_minus = multiplier + width * plus
    slides = state == 0
    low, high = slides & (from_minus < -slack), slides & (from_minus > width + slack)
    # A slider whose kink has turned concave: both sides are solutions. It takes the one
    # that its slope was nearer to.
    concave = slides & (width <= 0) & (low | high)
    high = jnp.where(concave, from_minus < 0.5 * width, high & ~low)
    low = jnp.where(concave, ~high, low)
    attracts = width > 0
    up, down = (
        (state < 0) & (rate > smallest),
        (state > 0) & (rate < -smallest),
    )
    state = jnp.where(up, jnp.where(attracts, 0, 1), state)
    state = jnp.where(down, jnp.where(attracts, 0, -1), state)
    return jnp.where(low, -1, jnp.where(high, 1, state)).astype(jnp.int32)
