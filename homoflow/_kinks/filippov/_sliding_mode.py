"""On which side a pair at its kink goes on, or whether it slides: complementarity.

Every group of pairs at its kink is in one of three states: on the minus side (λ = 0,
which needs ż ≤ 0), on the plus side (λ = width, ż ≥ 0), or it slides (ż = 0,
0 ≤ λ ≤ width). For positive widths these are the optimality conditions of the element
of least norm in the set of all slopes: min ½‖g + Jᵀλ‖² over 0 ≤ λ ≤ width. Its ẇ is
unique even where JJᵀ is singular. Principal pivoting from the mode before the event
finds it: without an event in no step, at a crossing, entry or exit in one or two. Where
that goes round in circles (rows are dependent) a descent finds it.

A negative width is a concave kink: it repels, and nothing slides there.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._system import System
from ._sliding_field import Groups, Point, multipliers, widths

_PIVOTS = 100
#: Pivots in which all violated groups move at once; after them comes the descent.
_BLOCK_PIVOTS = 10
#: Up to these, relative to the gradient and to the largest width, signs do not count.
_RATE_TOLERANCE = 1e-13
#: Rates below this times the gradient are held at 0 by other pairs' constraints.
_HELD = 1e-11
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
        count, old, state, share, _, strayed = carry
        on_plus = (state > 0).astype(plus.dtype)
        fixed = jnp.where(leads & (state != 0), old.width * (on_plus - plus), 0)
        multiplier, back, is_unique = multipliers(point, leads & (state == 0), fixed)
        before = jnp.where(count == 0, multiplier, old.before)
        width = widths(system, point, groups, multiplier, used, based_on_plus)
        new = Mode(state, multiplier, width, before, back, is_unique, old.is_settled)
        asked = _Asked.of(point, new, plus, leads, descends=count >= _BLOCK_PIVOTS)
        proposed, share = asked.by(state, share)
        # The width of a kink taken with its whole jump depends on multipliers above.
        off_base = leads & (state != 0) & ((state > 0) != based_on_plus)
        change = jnp.abs(width - old.width)
        moved = jnp.any(off_base & (change > 1e-12 * jnp.max(jnp.abs(width))))
        strayed = jnp.where(jnp.any(off_base), state, strayed)
        return count + 1, new, proposed, share, moved, strayed

    def unsettled(carry):
        count, mode, proposed, _, moved, _ = carry
        again = moved | jnp.any(proposed != mode.state)
        return (count == 0) | (again & (count < pivots))

    no, zeros = jnp.asarray(False), jnp.zeros_like(point.scale)
    blank = Mode(start, zeros, zeros, zeros, zeros, no, no)
    first = (jnp.asarray(0), blank, start, zeros, no, start)
    count, mode, _, _, _, strayed = lax.while_loop(unsettled, pivot, first)
    settled = count < pivots
    # Widths of pairs off their base slopes may run away: from base slopes that fit these
    # sides they are known.
    state = jnp.where(settled | ~settles, mode.state, strayed)
    return mode._replace(state=state, is_settled=settled)


def rate_of_change(point: Point, multiplier: Array) -> Array:
    """ż of the scaled rows."""
    return -(point.rates + point.gram @ multiplier)


def smallest_rate(point: Point) -> Array:
    """Smaller rates and jumps are rounding."""
    return _RATE_TOLERANCE * (jnp.linalg.norm(point.gradient) + 1e-300)


def held_rate(point: Point) -> Array:
    """Smaller rates are 0: other pairs' constraints hold that pair at its kink."""
    return _HELD * jnp.sqrt(point.gradient @ point.gradient)


class _Asked(NamedTuple):
    """Which states violate their conditions, and where they should be.

    - `low`, `high`: sliders below and above their interval, convex ones.
    - `down`, `up`: those that a slider at a concave kink takes as its side.
    - `enters`, `flips`: pairs whose ż is not that of their side, at convex and at concave
        kinks.
    - `place`: multipliers in units of the width, from the minus side; `violation`: |ż|.
    - `descends`: whether to change one thing at a time.
    """

    low: Bool[Array, " slots"]
    high: Bool[Array, " slots"]
    down: Bool[Array, " slots"]
    up: Bool[Array, " slots"]
    enters: Bool[Array, " slots"]
    flips: Bool[Array, " slots"]
    place: Float[Array, " slots"]
    violation: Float[Array, " slots"]
    descends: Bool[Array, ""]

    @staticmethod
    def of(point: Point, mode: Mode, plus: Array, leads: Array, descends) -> "_Asked":
        state, width = mode.state, mode.width
        smallest = jnp.where(descends, held_rate(point), smallest_rate(point))
        slack = _BOUND_TOLERANCE * jnp.max(jnp.abs(width))
        rate = rate_of_change(point, mode.multiplier)
        from_minus = mode.multiplier + width * plus
        slides, attracts = leads & (state == 0), width > 0
        low, high = (
            slides & (from_minus < -slack),
            slides & (from_minus > width + slack),
        )
        # A slider whose kink has turned concave: inside of the interval both sides are
        # solutions. It takes the one that its slope was nearer to; outside of it too at
        # first, as the width changes with the side, and then the one it is pushed to.
        concave = ~attracts & (low | high)
        nearer = (low & high) | ~descends
        up_there = jnp.where(nearer, from_minus < 0.5 * width, high)
        wrong = leads & (jnp.where(state < 0, -rate, rate) < -smallest) & (state != 0)
        return _Asked(
            low=low & attracts,
            high=high & ~low & attracts,
            down=concave & ~up_there,
            up=concave & up_there,
            enters=wrong & attracts,
            flips=wrong & ~attracts,
            place=from_minus / jnp.where(width != 0, width, 1),
            violation=jnp.abs(rate),
            descends=jnp.asarray(descends),
        )

    def by(self, state: Array, share: Array) -> tuple[Array, Array]:
        """The next states, and slopes between those of both sides, in [0, 1].

        In a descent the slopes of convex kinks move towards what is asked until the first
        is at an end of its interval. Then a further one is freed. Where no kink is above
        another ‖ẇ‖ falls with every move: so no state comes back [Stark & Parker 1995,
        bounded-variable least squares].
        """
        leaves = self.low | self.high
        slides = state == 0
        way = self.place - share
        left = jnp.where(self.high, 1 - share, -share) / jnp.where(leaves, way, 1)
        left = jnp.where(leaves, left, jnp.inf)
        part = jnp.minimum(jnp.min(left, initial=1), 1)
        stops = leaves & ((left <= part) | ~self.descends)
        turns = stops | self.down | self.up
        ready = ~self.descends | ~jnp.any(turns)
        worst = jnp.argmax(jnp.where(self.enters, self.violation, 0))
        is_worst = jnp.arange(state.size) == worst
        enters = self.enters & ready & (is_worst | ~self.descends)
        flips = self.flips & ready & ~(self.descends & jnp.any(enters))
        ends = 0.5 * (1 + state.astype(share.dtype))
        share = jnp.where(slides, share + jnp.where(self.descends, part, 1) * way, ends)
        state = jnp.where(enters, 0, jnp.where(flips, -state, state))
        state = jnp.where(self.up | (stops & self.high), 1, state)
        state = jnp.where(self.down | (stops & self.low), -1, state)
        return state.astype(jnp.int32), share.clip(0, 1)
