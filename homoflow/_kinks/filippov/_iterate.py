"""One iteration of the search for the mode in which the flow goes on from a point."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._system import System
from ._event_point import EventPoint
from ._nonuniqueness import may_keep_sliding
from ._sliding_field import Groups, Linearization, group_parallel_rows, linearize
from ._sliding_mode import (
    Mode,
    compute_z_rate,
    find_mode,
    max_constrained_rate,
    min_rate,
)


class Trial(NamedTuple):
    """What an iteration starts from: base sides, and states of the groups' leaders.

    `is_needed` tells whether there should be another one.
    """

    base: Int[Array, " slots"]
    start: Int[Array, " slots"]
    is_needed: Bool[Array, ""]


class Field(NamedTuple):
    """L and velocities.

    - `velocity_before`: in the mode in which the point was reached, as far as its sliding
        pairs are active; `velocity`: that with which the flow goes on.
    - `correction`: the way back onto the kinks of the sliding pairs, of rounding's size.
    """

    loss: Float[Array, ""]
    velocity_before: Float[Array, " weights"]
    velocity: Float[Array, " weights"]
    correction: Float[Array, " weights"]


class Marks(NamedTuple):
    """What there is to say of active pairs.

    - `is_still`: ż = 0, whether the pair slides or others constrain it.
    - `nonconvex`: leaders of groups at concave kinks, which might as well go to the other
        side.
    - `nonunique`: pairs for which this was found to be so.
    - `may_keep_sliding`: pairs that leave, but might slide with a joint choice of slopes.
    - `decouples`: pairs that arrive below sliding pairs of one group. Should they leave,
        that group might part; this is not examined.
    """

    is_still: Bool[Array, " slots"]
    nonconvex: Bool[Array, " slots"]
    nonunique: Bool[Array, " slots"]
    may_keep_sliding: Bool[Array, " slots"]
    decouples: Bool[Array, " slots"]


class Iterate(NamedTuple):
    """The field and mode at a point, from the last of so many iterations.

    `base` holds the base sides that were used, and `next` those that fit the mode found.
    """

    number: Int[Array, ""]
    base: Int[Array, " slots"]
    next: Trial
    groups: Groups
    mode: Mode
    field: Field
    marks: Marks

    @staticmethod
    def blank(event: EventPoint) -> "Iterate":
        """Before the first iteration."""
        pairs, before, w = event.pairs, event.side_before, event.w
        base = jnp.where(before == 0, pairs.gather(event.tables.base), before)
        zero, nowhere = jnp.zeros((), w.dtype), jnp.zeros_like(w)
        states, no = jnp.zeros_like(before), jnp.zeros_like(pairs.is_used)
        return Iterate(
            number=jnp.asarray(0),
            base=base,
            next=Trial(base, states, jnp.asarray(False)),
            groups=Groups(states, states, no),
            mode=Mode.blank(states, w.dtype),
            field=Field(zero, nowhere, nowhere, nowhere),
            marks=Marks(pairs.is_used, no, no, no, no),
        )

    @property
    def is_base_on_plus(self) -> Bool[Array, " slots"]:
        """Whether each pair's base slope is on the plus side of its group."""
        return (self.base * self.groups.sense) > 0

    def sides(self, event: EventPoint) -> Int[Array, " slots"]:
        """The sides of active pairs that the mode tells, 0 where they slide."""
        side = self.mode.state[self.groups.leader] * self.groups.sense
        return jnp.where(event.pairs.is_used, side, 1).astype(jnp.int32)


def iterate(system: System, event: EventPoint, last: Iterate) -> Iterate:
    """One iteration: linearize at base slopes, find the mode, fit base slopes to it."""
    is_used, before, base = event.pairs.is_used, event.side_before, last.next.base
    at, groups = _linearize(system, event, base)
    dtype, is_first = at.scale.dtype, last.number == 0
    on_plus = (base * groups.sense) > 0
    plus = on_plus[groups.leader]
    is_mixed = jnp.any(is_used & (on_plus != plus))
    slid = groups.sum((before == 0).astype(dtype)) > 0
    first = jnp.where(slid, 0, before * groups.sense)
    start = jnp.where(is_first, first, last.next.start)
    mode = find_mode(system, at, groups, is_used, plus, start, event.is_event)
    side = (mode.state[groups.leader] * groups.sense).astype(jnp.int32)
    leaves_base = is_used & (side != 0) & (side != base)
    changes_rows, marks = lax.cond(
        event.is_event,
        lambda: (
            jnp.any(leaves_base[None, :] & (at.dz_da != 0)),
            _mark(system, event, at, groups, mode, on_plus),
        ),
        lambda: (jnp.zeros((), bool), last.marks),
    )
    is_needed = is_mixed | changes_rows
    fitting = groups.base_side(jnp.where(is_mixed, 0, side))
    velocity_before, velocity, correction = _velocities(
        system, at, mode, event.is_event
    )
    velocity_before = jnp.where(is_first, velocity_before, last.field.velocity_before)
    return Iterate(
        number=last.number + 1,
        base=base,
        next=Trial(
            base=jnp.where(is_needed & is_used, fitting, base),
            start=jnp.where(is_mixed, start, mode.state),
            is_needed=is_needed,
        ),
        groups=groups,
        mode=mode,
        field=Field(at.loss, velocity_before, velocity, correction),
        marks=marks._replace(nonunique=last.marks.nonunique),
    )


def _linearize(
    system: System, event: EventPoint, base: Int[Array, " slots"]
) -> tuple[Linearization, Groups]:
    """The problem at a point to first order, with one-sided derivatives where needed.

    The latter are for pairs at the minus side which may reconnect others: ∂L/∂a then
    depends on the sides to which they push these.
    """
    pairs, is_used = event.pairs, event.pairs.is_used
    table = pairs.scatter(event.tables.base, base, is_used)
    at = linearize(system, event.w, table, pairs)
    groups = lax.cond(
        event.is_event,
        lambda: group_parallel_rows(at, is_used),
        lambda: event.groups,
    )
    on_plus = (base * groups.sense) > 0
    is_one_sided = is_used & ~groups.is_shared & ~on_plus & event.may_reconnect

    def differentiate():
        found = system.dloss_da_if_alone(
            event.w, system.slope(table), event.tables.disconnected, pairs
        )
        return jnp.where(is_one_sided, found, at.dloss_da)

    dloss_da = lax.cond(jnp.any(is_one_sided), differentiate, lambda: at.dloss_da)
    at = at._replace(dloss_da=dloss_da)
    if system.descent is not None:
        at = at.at_pace(system.descent.pace(event.t, at.loss))
    return at, groups


def _mark(
    system: System,
    event: EventPoint,
    at: Linearization,
    groups: Groups,
    mode: Mode,
    on_plus: Bool[Array, " slots"],
) -> Marks:
    is_used = event.pairs.is_used
    side = (mode.state[groups.leader] * groups.sense).astype(jnp.int32)
    slides_in_group = is_used & (side == 0) & groups.is_shared
    is_below_group = jnp.any(slides_in_group[:, None] & (at.dz_da != 0), 0)
    rate = compute_z_rate(at, mode.multiplier)
    no = jnp.zeros_like(is_used)
    keeps_sliding = no
    if system.function.depth > 1:
        keeps_sliding = lax.cond(
            jnp.any(is_used & (side != 0)),
            lambda: _find_optional_sliding(
                at, mode, on_plus, is_used & ~groups.is_shared
            ),
            lambda: no,
        )
    return Marks(
        is_still=jnp.abs(rate) <= max_constrained_rate(at),
        nonconvex=_find_nonconvex(at, mode, rate, is_used & groups.is_leader),
        nonunique=no,
        may_keep_sliding=keeps_sliding,
        decouples=event.arrives & (event.side_before != 0) & is_below_group,
    )


def _find_nonconvex(
    at: Linearization, mode: Mode, rate: Array, leads: Bool[Array, " slots"]
) -> Bool[Array, " slots"]:
    """Groups at concave kinks whose ż may change sign with their sides.

    Whatever the other pairs do, ż changes by no more than the sum of all jumps.
    """
    is_concave = leads & (mode.state != 0) & (mode.width < -min_rate(at))
    jumps = jnp.sum(jnp.where(is_concave, -mode.width, 0))
    return is_concave & (jnp.abs(rate) <= jumps)


def _find_optional_sliding(
    at: Linearization,
    mode: Mode,
    on_plus: Bool[Array, " slots"],
    is_alone: Bool[Array, " slots"],
) -> Bool[Array, " slots"]:
    """Pairs that leave below sliding pairs, though they might slide as well."""
    slides = is_alone & (mode.state == 0)
    is_below = jnp.any(slides[:, None] & (at.dz_da != 0), 0)
    leaves = is_alone & (mode.state != 0) & is_below
    return lax.cond(
        jnp.any(leaves),
        lambda: may_keep_sliding(at, mode, on_plus, leaves),
        lambda: jnp.zeros_like(leaves),
    )


def _velocities(
    system: System, at: Linearization, mode: Mode, is_event: Bool[Array, ""]
) -> Float[Array, "3 weights"]:
    """ẇ = −(g + Jᵀλ) before and after the search for the mode; and the correction."""
    rows = jnp.stack([mode.multiplier_before, mode.multiplier, mode.correction])
    rows = rows * at.scale
    has_gradient = jnp.array([1, 1, 0], at.scale.dtype)

    def add_velocity(i, out):
        force = has_gradient[i] * at.gradient + system.layout.vjp(at.rows, rows[i])
        return out.at[i].set(-force)

    zeros = jnp.zeros((3, at.gradient.size), at.scale.dtype)
    return lax.fori_loop(0, jnp.where(is_event, 3, 1), add_velocity, zeros)
