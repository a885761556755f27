"""On which side a pair at its kink goes on, or whether it slides: complementarity.

Every group of pairs at its kink is in one of three states: on the minus side (λ = 0,
which needs ż ≤ 0), on the plus side (λ = width, ż ≥ 0), or it slides (ż = 0,
0 ≤ λ ≤ width). If all widths are positive these are the optimality conditions of the
element of least norm in the set of all slopes: min ½‖g + Jᵀλ‖² over 0 ≤ λ ≤ width. Its ẇ
is unique even where JJᵀ is singular.

The states are found by principal pivoting, which starts from the mode before the event.
It needs no pivot where there is no event, and one or two at a crossing, entry or exit.
With dependent rows it may cycle; after some pivots a descent takes over.

A kink of negative width is concave. It repels, and nothing slides there.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._system import System
from ._sliding_field import Groups, Linearization, compute_widths, solve_multipliers

_MAX_PIVOTS = 100
#: Pivots in which all violated groups change at once; after them comes the descent.
_NUM_BLOCK_PIVOTS = 10
#: Rates up to this times the gradient are rounding: their signs do not count.
_RATE_TOLERANCE = 1e-13
#: A pair whose rate is below this times the gradient is constrained by other pairs.
_CONSTRAINED_RATE = 1e-11
#: Multipliers may be outside of their intervals by this times the largest width.
_BOUND_TOLERANCE = 1e-11
#: Relative changes of widths up to this do not count.
_WIDTH_TOLERANCE = 1e-12


class Mode(NamedTuple):
    """State (−1, 0 = slides, 1), multiplier and width of each group, at its leader.

    - `multiplier_before`: the multiplier in the states that the search began with.
    - `correction`: multipliers of the rows that take the sliding pairs back to z = 0.
    - `is_unique`: whether no other multipliers of sliding pairs give the same ẇ.
    - `is_settled`: whether the search has ended with all conditions met.
    """

    state: Int[Array, " slots"]
    multiplier: Float[Array, " slots"]
    width: Float[Array, " slots"]
    multiplier_before: Float[Array, " slots"]
    correction: Float[Array, " slots"]
    is_unique: Bool[Array, ""]
    is_settled: Bool[Array, ""]

    @staticmethod
    def blank(state: Int[Array, " slots"], dtype: jnp.dtype) -> "Mode":
        zeros, no = jnp.zeros(state.size, dtype), jnp.asarray(False)
        return Mode(state, zeros, zeros, zeros, zeros, no, no)


class _Search(NamedTuple):
    """The mode that was tried last, and the states to try next.

    - `fraction`: slopes as fractions of their intervals, which the descent moves.
    - `last_state`: the states of the last pivot with a group off its base slope.
    """

    pivots: Int[Array, ""]
    mode: Mode
    next_state: Int[Array, " slots"]
    fraction: Float[Array, " slots"]
    widths_change: Bool[Array, ""]
    last_state: Int[Array, " slots"]

    def is_unsettled(self) -> Bool[Array, ""]:
        return self.widths_change | jnp.any(self.next_state != self.mode.state)


def find_mode(
    system: System,
    at: Linearization,
    groups: Groups,
    is_used: Bool[Array, " slots"],
    is_based_on_plus: Bool[Array, " slots"],
    start: Int[Array, " slots"],
    is_event: Bool[Array, ""],
) -> Mode:
    """The mode in which the flow goes on from an event.

    `start` holds the states to begin with. Where there is no event they are the mode, and
    only its multipliers are computed. Multipliers count from the base slopes: from the
    plus side's for the groups that are `is_based_on_plus`.
    """
    max_pivots = jnp.where(is_event, _MAX_PIVOTS, 1)
    leads = is_used & groups.is_leader
    plus = is_based_on_plus.astype(at.gram.dtype)

    def pivot(s: _Search) -> _Search:
        old, state = s.mode, s.next_state
        jump = (state > 0).astype(plus.dtype) - plus
        fixed = jnp.where(leads & (state != 0), old.width * jump, 0)
        found = solve_multipliers(at, leads & (state == 0), fixed)
        width = compute_widths(
            system, at, groups, found.value, is_used, is_based_on_plus
        )
        before = jnp.where(s.pivots == 0, found.value, old.multiplier_before)
        new = old._replace(
            state=state,
            multiplier=found.value,
            width=width,
            multiplier_before=before,
            correction=found.correction,
            is_unique=found.is_unique,
        )
        next_state, fraction = lax.cond(
            is_event,
            lambda: Violations.find(
                at, new, plus, leads, descends=s.pivots >= _NUM_BLOCK_PIVOTS
            ).next_states(state, s.fraction),
            lambda: (state, s.fraction),
        )
        # The width of a pair that is off its base slope depends on multipliers above it.
        is_off_base = leads & (state != 0) & ((state > 0) != is_based_on_plus)
        has_new_width = jnp.abs(width - old.width) > min_change(width)
        return _Search(
            pivots=s.pivots + 1,
            mode=new,
            next_state=next_state,
            fraction=fraction,
            widths_change=jnp.any(is_off_base & has_new_width),
            last_state=jnp.where(jnp.any(is_off_base), state, s.last_state),
        )

    def goes_on(s: _Search) -> Bool[Array, ""]:
        return (s.pivots == 0) | (s.is_unsettled() & (s.pivots < max_pivots))

    blank, zeros = Mode.blank(start, at.scale.dtype), jnp.zeros_like(at.scale)
    first = _Search(jnp.asarray(0), blank, start, zeros, jnp.asarray(False), start)
    last = lax.while_loop(goes_on, pivot, first)
    is_settled = last.pivots < max_pivots
    # Widths of pairs off their base slopes may diverge. At base slopes that fit these
    # states they are known: the caller tries again with those.
    state = jnp.where(is_settled | ~is_event, last.mode.state, last.last_state)
    return last.mode._replace(state=state, is_settled=is_settled)


def min_change(width: Float[Array, " slots"]) -> Float[Array, ""]:
    """Changes of widths up to this are rounding."""
    return _WIDTH_TOLERANCE * jnp.max(jnp.abs(width))


def compute_z_rate(at: Linearization, multiplier: Array) -> Float[Array, " slots"]:
    """ż of the scaled rows."""
    return -(at.row_dot_gradient + at.gram @ multiplier)


def min_rate(at: Linearization) -> Float[Array, ""]:
    """Rates and jumps below this are rounding."""
    return _RATE_TOLERANCE * (jnp.linalg.norm(at.gradient) + 1e-300)


def max_constrained_rate(at: Linearization) -> Float[Array, ""]:
    """A pair that does not slide, with a rate up to this, is constrained by others."""
    return _CONSTRAINED_RATE * jnp.sqrt(at.gradient @ at.gradient)


class Violations(NamedTuple):
    """Which states violate their conditions, and how.

    - `is_below`, `is_above`: sliding pairs at convex kinks with λ outside of its interval.
    - `falls`, `rises`: sliding pairs at concave kinks, by the side to which they go.
    - `enters`, `flips`: pairs with the ż of another side, at convex and concave kinks.
    - `fraction`: multipliers in units of the width, from the minus side; `size`: |ż|.
    - `descends`: whether only one thing changes at a time.
    """

    is_below: Bool[Array, " slots"]
    is_above: Bool[Array, " slots"]
    falls: Bool[Array, " slots"]
    rises: Bool[Array, " slots"]
    enters: Bool[Array, " slots"]
    flips: Bool[Array, " slots"]
    fraction: Float[Array, " slots"]
    size: Float[Array, " slots"]
    descends: Bool[Array, ""]

    @staticmethod
    def find(
        at: Linearization, mode: Mode, plus: Array, leads: Array, descends: Array
    ) -> "Violations":
        state, width = mode.state, mode.width
        tolerance = jnp.where(descends, max_constrained_rate(at), min_rate(at))
        slack = _BOUND_TOLERANCE * jnp.max(jnp.abs(width))
        rate = compute_z_rate(at, mode.multiplier)
        from_minus = mode.multiplier + width * plus
        slides, is_convex = leads & (state == 0), width > 0
        is_below = slides & (from_minus < -slack)
        is_above = slides & (from_minus > width + slack)
        # A sliding pair whose kink has become concave. Inside of the interval both sides
        # are solutions: it takes the one that its slope is nearer to. So it does outside
        # of the interval at first, as the width changes with the side. In the descent it
        # takes the side to which it is pushed.
        is_concave = ~is_convex & (is_below | is_above)
        takes_nearer = (is_below & is_above) | ~descends
        goes_up = jnp.where(takes_nearer, from_minus < 0.5 * width, is_above)
        is_wrong = leads & (jnp.where(state < 0, -rate, rate) < -tolerance)
        is_wrong = is_wrong & (state != 0)
        return Violations(
            is_below=is_below & is_convex,
            is_above=is_above & ~is_below & is_convex,
            falls=is_concave & ~goes_up,
            rises=is_concave & goes_up,
            enters=is_wrong & is_convex,
            flips=is_wrong & ~is_convex,
            fraction=from_minus / jnp.where(width != 0, width, 1),
            size=jnp.abs(rate),
            descends=jnp.asarray(descends),
        )

    def next_states(self, state: Array, fraction: Array) -> tuple[Array, Array]:
        """The next states, and slopes as fractions of their intervals.

        In a descent, slopes at convex kinks move towards the multipliers found until the
        first reaches an end of its interval. Only when none does, another pair starts to
        slide. Where no kink is above another ‖ẇ‖ falls with every move, so that no state
        comes back [Stark & Parker 1995, bounded-variable least squares].
        """
        is_outside = self.is_below | self.is_above
        slides = state == 0
        move = self.fraction - fraction
        to_end = jnp.where(self.is_above, 1 - fraction, -fraction)
        to_end = to_end / jnp.where(is_outside, move, 1)
        to_end = jnp.where(is_outside, to_end, jnp.inf)
        part = jnp.minimum(jnp.min(to_end, initial=1), 1)
        stops = is_outside & ((to_end <= part) | ~self.descends)
        turns = stops | self.falls | self.rises
        may_enter = ~self.descends | ~jnp.any(turns)
        worst = jnp.argmax(jnp.where(self.enters, self.size, 0))
        is_worst = jnp.arange(state.size) == worst
        enters = self.enters & may_enter & (is_worst | ~self.descends)
        flips = self.flips & may_enter & ~(self.descends & jnp.any(enters))
        ends = 0.5 * (1 + state.astype(fraction.dtype))
        fraction = jnp.where(
            slides, fraction + jnp.where(self.descends, part, 1) * move, ends
        )
        state = jnp.where(enters, 0, jnp.where(flips, -state, state))
        state = jnp.where(self.rises | (stops & self.is_above), 1, state)
        state = jnp.where(self.falls | (stops & self.is_below), -1, state)
        return state.astype(jnp.int32), fraction.clip(0, 1)
