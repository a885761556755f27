"""What happens at a point that a step has reached: the new mode and its velocity."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ._contact import find_contact
from ._counts import Counts
from ._field import Groups, Point, evaluate, group
from ._mode import Mode, find_mode, rate_of_change
from ._system import Slots, System

#: Evaluations at one point while base slopes adapt to the mode.
_ROUNDS = 6
#: A slider whose share of its interval is inside it by this much leaves it early.
_INTERIOR = 1e-3
#: Rates below this times the gradient are held at 0 by other pairs' constraints.
_HELD = 1e-11


class Target(NamedTuple):
    """A point at which the field is wanted.

    - `side`, `base`: of every pair, as it arrives there; `was`: side of those in slots.
    - `settles`: whether the mode is to be settled, or is known: all in slots slide.
    """

    w: Float[Array, " weights"]
    side: Int[Array, "samples kinks"]
    base: Int[Array, "samples kinks"]
    slots: Slots
    was: Int[Array, " slots"]
    settles: Bool[Array, ""]


class Outcome(NamedTuple):
    """The field at a target, from the last of the rounds that it took.

    - `base`: side of the base slopes; `next_base`, `start`: for another round, `again`.
    - `velocity_before`: in the mode that the target was reached with; `velocity`: goes
        on from there; `back`: the way back onto the kinks, of rounding's size.
    - `rate`: ż of the scaled rows, `still` where others hold it at 0.
    """

    number: Int[Array, ""]
    base: Int[Array, " slots"]
    next_base: Int[Array, " slots"]
    start: Int[Array, " slots"]
    again: Bool[Array, ""]
    loss: Float[Array, ""]
    largest: Float[Array, ""]
    groups: Groups
    mode: Mode
    multiplier_before: Float[Array, " slots"]
    velocity_before: Float[Array, " weights"]
    velocity: Float[Array, " weights"]
    back: Float[Array, " weights"]
    rate: Float[Array, " slots"]
    still: Bool[Array, " slots"]
    is_consistent: Bool[Array, ""]


class Settled(NamedTuple):
    """A point with its mode.

    - `w`: the weights, moved back onto the constraints by rounding's worth.
    - `side`, `base`: of every pair; `held`: pairs whose z others keep at 0.
    - `slots`: those that slide.
    - `velocity` goes on from here; `velocity_before` is that of the mode that a step
        arrived with, NaN where that cannot be told.
    """

    w: Float[Array, " weights"]
    loss: Float[Array, ""]
    side: Int[Array, "samples kinks"]
    base: Int[Array, "samples kinks"]
    held: Bool[Array, "samples kinks"]
    slots: Slots
    leads: Bool[Array, " slots"]
    multiplier: Float[Array, " slots"]
    width: Float[Array, " slots"]
    velocity: Float[Array, " weights"]
    velocity_before: Float[Array, " weights"]
    largest: Float[Array, ""]
    is_settled: Bool[Array, ""]


def arrival(
    system: System,
    w: Float[Array, " weights"],
    side: Int[Array, "samples kinks"],
    base: Int[Array, "samples kinks"],
    trigger: Bool[Array, "samples kinks"],
    largest: Float[Array, ""],
    room: int,
) -> tuple[Target, Bool[Array, ""]]:
    """The target at which a mode is to be settled, and whether its slots overflow.

    `side` and `base` are those that the step arrived with, `trigger` marks the pair
    that ended it, `largest` is the scale of z.
    """
    contact = find_contact(system, w, side, base, trigger, largest)
    slots = Slots.of(contact.at_kink, room)
    was = jnp.where(slots.used, slots.gathered(contact.side), -1)
    overflows = jnp.sum(contact.at_kink) > room
    settles = jnp.asarray(True)
    return Target(w, contact.side, contact.base, slots, was, settles), overflows


def rounds(system: System, target: Target) -> Outcome:
    """Evaluate at the target, again until base slopes and mode fit.

    They do not at once if a group's members have base slopes of different sides, or if
    a pair changes side below another pair at its kink, whose row it then changes.
    """

    def one(outcome: Outcome) -> Outcome:
        return _round(system, target, outcome)

    def go_on(outcome: Outcome):
        more = outcome.again & target.settles & (outcome.number < _ROUNDS)
        return (outcome.number == 0) | more

    return lax.while_loop(go_on, one, _blank(target))


def _blank(target: Target) -> Outcome:
    slots, was, w = target.slots, target.was, target.w
    first = jnp.where(was == 0, slots.gathered(target.base), was)
    none, nowhere = jnp.zeros(was.size, w.dtype), jnp.zeros_like(w)
    states, no = jnp.zeros_like(was), jnp.asarray(False)
    zero, number = jnp.zeros((), w.dtype), jnp.asarray(0)
    return Outcome(
        number=number,
        base=first,
        next_base=first,
        start=states,
        again=no,
        loss=zero,
        largest=zero,
        groups=Groups(states, states),
        mode=Mode(states, none, none, none, none, no),
        multiplier_before=none,
        velocity_before=nowhere,
        velocity=nowhere,
        back=nowhere,
        rate=none,
        still=slots.used,
        is_consistent=no,
    )


def _round(system: System, target: Target, r: Outcome) -> Outcome:
    slots, was, base = target.slots, target.was, r.next_base
    used = slots.used
    table = slots.scattered(target.base, base, used)
    point = evaluate(system, target.w, table, slots)
    groups = group(point, used)
    is_first = r.number == 0
    # The side of its group on which a member's base slope lies.
    on_plus = (base * groups.sense) > 0
    plus = on_plus[groups.leader]
    mixed = jnp.any(used & (on_plus != plus))
    slid = groups.total((was == 0).astype(point.scale.dtype)) > 0
    start = jnp.where(is_first, jnp.where(slid, 0, was * groups.sense), r.start)
    mode = find_mode(system, point, groups, used, plus, start, target.settles)
    side = (mode.state[groups.leader] * groups.sense).astype(jnp.int32)
    moved = used & (side != 0) & (side != base)
    nested = jnp.any(moved[None, :] & (point.above != 0))
    again = mixed | nested
    fitting = jnp.where(mixed | (side == 0), -groups.sense, side)
    before, after, back = _velocities(system, point, mode, target.settles)
    before = jnp.where(mixed & target.settles, jnp.nan, before)
    rate = rate_of_change(point, mode.multiplier)
    return Outcome(
        number=r.number + 1,
        base=base,
        next_base=jnp.where(again & used, fitting, base),
        start=jnp.where(mixed, start, mode.state),
        again=again,
        loss=point.loss,
        largest=point.largest,
        groups=groups,
        mode=mode,
        multiplier_before=jnp.where(is_first, mode.before, r.multiplier_before),
        velocity_before=jnp.where(is_first, before, r.velocity_before),
        velocity=after,
        back=back,
        rate=rate,
        still=jnp.abs(rate) <= _HELD * jnp.sqrt(point.gradient @ point.gradient),
        is_consistent=~mixed,
    )


def _velocities(
    system: System, point: Point, mode: Mode, settles: Array
) -> Float[Array, "3 weights"]:
    """ẇ = −(g + Jᵀλ) before and after the search for the mode; and the way back."""
    lams = jnp.stack([mode.before, mode.multiplier, mode.back]) * point.scale
    drive = jnp.array([1, 1, 0], point.scale.dtype)

    def one(i, out):
        forced = drive[i] * point.gradient + system.against(point.rows, lams[i])
        return out.at[i].set(-forced)

    nothing = jnp.zeros((3, point.gradient.size), point.scale.dtype)
    return lax.fori_loop(0, jnp.where(settles, 3, 1), one, nothing)


def conclude(
    target: Target,
    last: Outcome,
    counts: Counts,
    *,
    sliders: Bool[Array, " slots"],
    starting: Bool[Array, ""],
) -> tuple[Settled, Counts]:
    """The settled point, and the counts with what has happened there.

    `sliders` are the slots that slid on the way to it.
    """
    slots, was, groups, mode = target.slots, target.was, last.groups, last.mode
    used = slots.used
    side = jnp.where(used, mode.state[groups.leader] * groups.sense, 1)
    side = side.astype(jnp.int32)
    slides = used & (side == 0)
    leads = slides & groups.leads
    # Sliders are based on their group's minus side: their multipliers count from there.
    base = jnp.where(side == 0, -groups.sense, side)
    on_plus = ((last.base * groups.sense) > 0)[groups.leader]
    from_minus = mode.multiplier + mode.width * on_plus.astype(mode.width.dtype)
    nothing = jnp.zeros(target.side.shape, bool)
    # A slider that went dormant took its constraint with it: the step that led here
    # cannot be judged by the old mode's velocity.
    lost = jnp.sum(used & (was == 0)) < jnp.sum(sliders)
    before = jnp.where(lost, jnp.nan, last.velocity_before)
    settled = Settled(
        w=target.w + last.back,
        loss=last.loss,
        side=slots.scattered(target.side, side, used),
        base=slots.scattered(target.base, base, used),
        held=slots.scattered(nothing, used & (side != 0) & last.still, used),
        slots=slots._replace(used=slides),
        leads=leads,
        multiplier=jnp.where(leads, from_minus, 0),
        width=jnp.where(leads, mode.width, 0),
        velocity=last.velocity,
        velocity_before=before,
        largest=last.largest,
        is_settled=mode.is_settled & last.is_consistent & ~last.again,
    )
    return settled, _counted(counts, target, side, last, starting)


def _counted(
    counts: Counts, target: Target, now: Array, last: Outcome, starting: Array
) -> Counts:
    used, was, mode = target.slots.used, target.was, last.mode
    pairs = _transitions(was, now, used)
    width = mode.width
    share = last.multiplier_before / jnp.where(width != 0, width, 1)
    inside = (share > _INTERIOR) & (share < 1 - _INTERIOR)
    turned = ((width <= 0) & inside)[last.groups.leader] & (was == 0) & (now != 0)
    ambiguous = (used & turned) | (_repelled(used, last) & starting)
    return counts.plus(
        gradients=last.number,
        rows=last.number * jnp.sum(pairs),
        forward=2,
        crossings=jnp.where(starting, 0, pairs[0, 2] + pairs[2, 0]),
        entries=pairs[0, 1] + pairs[2, 1],
        exits=pairs[1, 0] + pairs[1, 2],
        non_unique=jnp.sum(ambiguous),
    ).with_sliding(jnp.sum(pairs[:, 1]))


def _transitions(was: Array, now: Array, used: Array) -> Int[Array, "3 3"]:
    """How many pairs went from each side to each: minus, sliding, plus."""
    kind = jnp.where(used, 3 * was + now + 4, -1)
    return jnp.sum(kind[:, None] == np.arange(9, dtype=np.int32), 0).reshape(3, 3)


def _repelled(used: Array, last: Outcome) -> Bool[Array, " slots"]:
    """Groups at a concave kink that could go on to either side, at their leaders."""
    mode, rate = last.mode, last.rate
    # On the other side the multiplier is larger or smaller by the (negative) width.
    other = rate + mode.state.astype(rate.dtype) * mode.width
    both = jnp.where(mode.state < 0, other >= 0, other <= 0)
    concave = mode.width < -1e-9 * jnp.max(jnp.abs(mode.width))
    return used & last.groups.leads & (mode.state != 0) & concave & both
