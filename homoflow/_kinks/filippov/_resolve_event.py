"""What happens at a point that a step has reached: the new mode and its velocity."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..._results._event_kind import EventKind
from .._active_pairs import Slots
from .._system import System
from ._active_set import Way, find_contact
from ._counts import Counts, how_many
from ._event_log import NOTHING
from ._nonuniqueness import might_stay
from ._sliding_field import Groups, Point, evaluate, group
from ._sliding_mode import Mode, find_mode, held_rate, rate_of_change, smallest_rate

#: Evaluations at one point while base slopes adapt to the mode.
_ROUNDS = 6
#: Searches for another solution at one point.
_ATTEMPTS = 8
#: Velocities that differ by less, relative to the jumps that make them so, are the same.
_SAME_VELOCITY = 1e-6


class Target(NamedTuple):
    """A point at which the field is wanted.

    - `side`, `base`: of every pair, as it arrives there; `was`: side of those in slots.
    - `arrives`: those in slots that other pairs' constraints did not hold there before.
    - `wakes`: those in slots with dormant pairs in their sample.
    - `torn`: dormant pairs whose side depends on which of the sliders below opens first.
    - `near`, `dormant`: pairs with z = 0, and those of them that nothing reaches.
    - `settles`: whether the mode is to be settled, or is known: all in slots slide.
    """

    w: Float[Array, " weights"]
    side: Int[Array, "samples kinks"]
    base: Int[Array, "samples kinks"]
    slots: Slots
    was: Int[Array, " slots"]
    arrives: Bool[Array, " slots"]
    wakes: Bool[Array, " slots"]
    torn: Bool[Array, "samples kinks"]
    near: Bool[Array, "samples kinks"]
    dormant: Bool[Array, "samples kinks"]
    settles: Bool[Array, ""]


class Outcome(NamedTuple):
    """The field at a target, from the last of the rounds that it took.

    - `base`: side of the base slopes; `next_base`, `start`: for another round, `again`.
    - `velocity_before`: in the mode that the target was reached with, as far as its
        sliders are in slots; `velocity`: goes on from there; `back`: the way back onto
        the kinks, of rounding's size.
    - `still`: where ż = 0 without sliding, because others hold it there.
    - `repelled`: groups, at their leaders, at a concave kink that might let them go on to
        the other side as well; `chooses`: pairs for which that has been found.
    - `lingers`: pairs that leave, though a joint choice of slopes might hold them.
    - `unties`: pairs that have just come to their kinks below some that slide tied. Were
        they to open they would untie them, and that is not looked into.
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
    velocity_before: Float[Array, " weights"]
    velocity: Float[Array, " weights"]
    back: Float[Array, " weights"]
    still: Bool[Array, " slots"]
    repelled: Bool[Array, " slots"]
    unties: Bool[Array, " slots"]
    lingers: Bool[Array, " slots"]
    chooses: Bool[Array, " slots"]
    is_consistent: Bool[Array, ""]


class Settled(NamedTuple):
    """A point with its mode.

    - `w`: the weights, moved back onto the constraints by rounding's worth.
    - `side`, `base`: of every pair; `held`: pairs whose z others keep at 0.
    - `slots`: those that slide.
    - `velocity` goes on from here.
    - `choices`: the kind of event where the side is one of two that are possible.
    - `torn`, `near`, `dormant`: as in the target.
    - `again`: pairs changed sides below dormant ones, which now may wake on others: the
        point has to be settled once more. `leaves`: some pair leaves its kink.
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
    largest: Float[Array, ""]
    choices: Int[Array, "samples kinks"]
    torn: Bool[Array, "samples kinks"]
    near: Bool[Array, "samples kinks"]
    dormant: Bool[Array, "samples kinks"]
    is_settled: Bool[Array, ""]
    again: Bool[Array, ""]
    leaves: Bool[Array, ""]


def arrival(
    system: System,
    w: Float[Array, " weights"],
    side: Int[Array, "samples kinks"],
    base: Int[Array, "samples kinks"],
    trigger: Bool[Array, "samples kinks"],
    largest: Float[Array, ""],
    way: Way,
    room: int,
) -> tuple[Target, Bool[Array, ""]]:
    """The target at which a mode is to be settled, and whether its slots overflow.

    `side` and `base` are those that the step arrived with, `trigger` marks the pair
    that ended it, `largest` is the scale of z; `way` is how the flow went on from where
    the step began.
    """
    contact = find_contact(system, w, side, base, trigger, largest, way)
    asleep = contact.dormant | (way.again & way.dormant)
    slots = Slots.of(contact.at_kink, room)
    was = jnp.where(slots.used, slots.gathered(contact.side), -1)
    overflows = jnp.sum(contact.at_kink) > room
    target = Target(
        w=w,
        side=contact.side,
        base=contact.base,
        slots=slots,
        was=was,
        arrives=slots.used & ~slots.gathered(way.held),
        wakes=slots.beside(asleep),
        torn=contact.torn,
        near=contact.at_kink | contact.dormant,
        dormant=contact.dormant,
        settles=jnp.asarray(True),
    )
    return target, overflows


def loses_sliders(target: Target, slots: Slots) -> Bool[Array, ""]:
    """Whether pairs in `slots` slid up to the target, where nothing reaches them.

    Their constraints are gone there: the velocity before is not the old mode's.
    """
    slid, sliders = how_many([target.slots.used & (target.was == 0), slots.used])
    return slid < sliders


class _Search(NamedTuple):
    """The latest round, and the outcome with which the flow goes on.

    Attempt 0 looks for the latter, further ones for another solution.
    """

    latest: Outcome
    outcome: Outcome
    attempt: Int[Array, ""]
    ended: Bool[Array, ""]


def rounds(system: System, target: Target) -> Outcome:
    """Evaluate at the target, again until base slopes and mode fit.

    They do not at once if a group's members have base slopes of different sides, or if
    a pair changes side below another pair at its kink, whose row it then changes.

    If pairs then are at concave kinks that might let them go on to the other side too,
    the search is repeated from there, for what it tells: the first outcome stays.
    """

    def one(s: _Search) -> _Search:
        latest = _round(system, target, s.latest)
        unfinished = latest.again & target.settles & (latest.number < _ROUNDS)
        return lax.switch(
            jnp.where(unfinished, 2, jnp.minimum(s.attempt, 1)),
            (
                lambda: _attempted(target, latest, 0),
                lambda: _attempted(
                    target, _compared(target, s.outcome, latest), s.attempt
                ),
                lambda: s._replace(latest=latest),
            ),
        )

    blank = _blank(target)
    start = _Search(blank, blank, jnp.asarray(0), jnp.asarray(False))
    return lax.while_loop(lambda s: ~s.ended, one, start).outcome


def _attempted(target: Target, found: Outcome, attempt) -> _Search:
    """The search after so many attempts: the next one begins with other sides.

    First all pairs in question start on their other sides, then one at a time.
    """
    groups, suspects = found.groups, found.repelled
    arriving = groups.total(target.arrives.astype(found.loss.dtype)) > 0
    number = jnp.cumsum(suspects)
    useful = (attempt == 0) | ((attempt <= number[-1]) & (number[-1] > 1))
    again = target.settles & useful & (attempt < _ATTEMPTS)
    again = again & jnp.any(suspects & arriving) & ~jnp.any(found.chooses)
    turned = suspects & ((attempt == 0) | (number == attempt))
    start = jnp.where(turned, -found.mode.state, found.mode.state)
    side = (start[groups.leader] * groups.sense).astype(jnp.int32)
    base = groups.base_of(side)
    base = jnp.where(target.slots.used, base, found.base)
    next_ = found._replace(
        number=jnp.ones_like(found.number), start=start, next_base=base
    )
    return _Search(next_, found, jnp.asarray(attempt + 1), ~again)


def _compared(target: Target, found: Outcome, other: Outcome) -> Outcome:
    """`found`, and which of its pairs are on other sides in a solution that differs."""
    sides = [_sides(target, outcome) for outcome in (found, other)]
    suspects = found.repelled[found.groups.leader] & target.slots.used
    jump = jnp.max(jnp.where(suspects, jnp.abs(found.mode.width), 0), initial=0)
    apart = other.velocity - found.velocity
    differs = jnp.sqrt(apart @ apart) > _SAME_VELOCITY * jump
    fits = other.mode.is_settled & other.is_consistent & ~other.again
    return found._replace(
        number=found.number + other.number - 1,
        chooses=suspects & (sides[0] != sides[1]) & differs & fits,
    )


def _sides(target: Target, outcome: Outcome) -> Int[Array, " slots"]:
    groups = outcome.groups
    side = outcome.mode.state[groups.leader] * groups.sense
    return jnp.where(target.slots.used, side, 1).astype(jnp.int32)


def _repelled(point: Point, mode: Mode, rate: Array, leads: Array) -> Array:
    """Groups at concave kinks whose ż may change sign with their sides.

    Whatever the other pairs do, ż changes by no more than the sum of all jumps.
    """
    concave = leads & (mode.state != 0) & (mode.width < -smallest_rate(point))
    jumps = jnp.sum(jnp.where(concave, -mode.width, 0))
    return concave & (jnp.abs(rate) <= jumps)


def _blank(target: Target) -> Outcome:
    slots, was, w = target.slots, target.was, target.w
    first = jnp.where(was == 0, slots.gathered(target.base), was)
    none, nowhere = jnp.zeros(was.size, w.dtype), jnp.zeros_like(w)
    states, no = jnp.zeros_like(was), jnp.asarray(False)
    nobody = jnp.zeros_like(slots.used)
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
        mode=Mode(states, none, none, none, none, no, no),
        velocity_before=nowhere,
        velocity=nowhere,
        back=nowhere,
        still=slots.used,
        repelled=nobody,
        unties=nobody,
        lingers=nobody,
        chooses=nobody,
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
    tied = (groups.total(used.astype(point.scale.dtype)) > 1)[groups.leader]
    knots = used & ~tied & ~on_plus & target.wakes
    point = point._replace(
        jump=lax.cond(
            jnp.any(knots),
            lambda: jnp.where(
                knots,
                system.openings(target.w, system.slope(table), target.dormant, slots),
                point.jump,
            ),
            lambda: point.jump,
        )
    )
    slid = groups.total((was == 0).astype(point.scale.dtype)) > 0
    start = jnp.where(is_first, jnp.where(slid, 0, was * groups.sense), r.start)
    mode = find_mode(system, point, groups, used, plus, start, target.settles)
    side = (mode.state[groups.leader] * groups.sense).astype(jnp.int32)
    moved = used & (side != 0) & (side != base)
    nested = jnp.any(moved[None, :] & (point.above != 0))
    again = mixed | nested
    slides_tied = used & (side == 0) & tied
    below_tied = jnp.any(slides_tied[:, None] & (point.above != 0), 0)
    fitting = groups.base_of(jnp.where(mixed, 0, side))
    before, after, back = _velocities(system, point, mode, target.settles)
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
        velocity_before=jnp.where(is_first, before, r.velocity_before),
        velocity=after,
        back=back,
        still=jnp.abs(rate) <= held_rate(point),
        repelled=_repelled(point, mode, rate, used & groups.leads),
        unties=target.arrives & (was != 0) & below_tied,
        lingers=lax.cond(
            target.settles & jnp.any(used & (side != 0)),
            lambda: _lingering(point, mode, on_plus, used & ~tied),
            lambda: jnp.zeros_like(used),
        )
        if system.function.depth > 1
        else jnp.zeros_like(used),
        chooses=r.chooses,
        is_consistent=~mixed,
    )


def _lingering(
    point: Point, mode: Mode, on_plus: Bool[Array, " slots"], alone: Array
) -> Bool[Array, " slots"]:
    """Pairs that leave below sliders, though a joint choice of slopes might hold them."""
    slides = alone & (mode.state == 0)
    is_below = jnp.any(slides[:, None] & (point.above != 0), 0)
    leaves = alone & (mode.state != 0) & is_below
    return lax.cond(
        jnp.any(leaves),
        lambda: might_stay(point, mode, on_plus, leaves),
        lambda: jnp.zeros_like(leaves),
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
    torn: Bool[Array, "samples kinks"],
    again: Bool[Array, ""],
) -> tuple[Settled, Counts]:
    """The settled point, and the counts with what it took.

    `torn` are those pairs that were so already; `again` tells that it was settled
    before. What changes then depends on which kinks are taken to close first: that may
    be a choice, as may be what keeps tied pairs tied.
    """
    slots, was, groups, mode = target.slots, target.was, last.groups, last.mode
    used = slots.used
    side = _sides(target, last)
    slides = used & (side == 0)
    leads = slides & groups.leads
    base = groups.base_of(side)
    on_plus = ((last.base * groups.sense) > 0)[groups.leader]
    from_minus = mode.multiplier + mode.width * on_plus.astype(mode.width.dtype)
    turned = again & used & (side != was)
    # Where sliders are dependent each is held to its own interval, which may be too much.
    dependent = target.arrives & slides & ~mode.is_unique
    nothing = jnp.zeros(target.side.shape, bool)
    up, down = int(EventKind.choice_up), int(EventKind.choice_down)
    first_torn = target.torn & ~torn
    nothing_chosen = jnp.where(first_torn, down, NOTHING).astype(jnp.int32)
    choice = jnp.where(side > 0, up, down).astype(jnp.int32)
    rows, sliding = how_many([used, slides])
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
        largest=last.largest,
        choices=slots.scattered(
            nothing_chosen,
            choice,
            last.chooses | last.unties | last.lingers | turned | dependent,
        ),
        torn=target.torn,
        near=target.near,
        dormant=target.dormant,
        is_settled=mode.is_settled & last.is_consistent & ~last.again,
        again=jnp.any(target.wakes & (side != was)),
        leaves=jnp.any(used & (side != 0) & ~last.still),
    )
    counts = counts.plus(gradients=last.number, rows=last.number * rows, forward=2)
    return settled, counts.with_sliding(sliding)
