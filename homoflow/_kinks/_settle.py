"""What happens at a point that a step has reached: the new mode and its velocity."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ._contact import Contact, find_contact
from ._field import Groups, Point, evaluate, group, multipliers, solve, velocity
from ._mode import Mode, find_mode, rate_of_change
from ._system import Slots, System

#: Evaluations at one point while base slopes adapt to the mode.
_ROUNDS = 6
#: A slider whose share of its interval is inside it by this much leaves it early.
_INTERIOR = 1e-3
#: Rates below this times the gradient are held at 0 by other pairs' constraints.
_HELD = 1e-11


class Counts(NamedTuple):
    """How often things happened, for `stats`."""

    gradients: Int[Array, ""]
    rows: Int[Array, ""]
    forward: Int[Array, ""]
    crossings: Int[Array, ""]
    entries: Int[Array, ""]
    exits: Int[Array, ""]
    non_unique: Int[Array, ""]
    largest_sliding_set: Int[Array, ""]

    @staticmethod
    def zeros() -> "Counts":
        return Counts(*(jnp.asarray(0) for _ in Counts._fields))

    def plus(self, **more: Array | int) -> "Counts":
        return self._replace(**{k: getattr(self, k) + v for k, v in more.items()})


class Settled(NamedTuple):
    """A point with its mode.

    - `w`: the weights, moved back onto the constraints by rounding's worth.
    - `side`, `base`: of every pair; `held`: pairs whose z others keep at 0.
    - `slides`: slots that slide.
    - `velocity` goes on from here; `velocity_before` is that of the mode that a step
        arrived with, NaN where that cannot be told.
    """

    w: Float[Array, " weights"]
    loss: Float[Array, ""]
    side: Int[Array, "samples kinks"]
    base: Int[Array, "samples kinks"]
    held: Bool[Array, "samples kinks"]
    slots: Slots
    groups: Groups
    multiplier: Float[Array, " slots"]
    width: Float[Array, " slots"]
    velocity: Float[Array, " weights"]
    velocity_before: Float[Array, " weights"]
    largest: Float[Array, ""]
    overflows: Bool[Array, ""]
    is_settled: Bool[Array, ""]
    changed: Bool[Array, ""]


class _Round(NamedTuple):
    """One evaluation at the point, at the base slopes `base`."""

    number: Int[Array, ""]
    base: Int[Array, " slots"]
    next_base: Int[Array, " slots"]
    start: Int[Array, " slots"]
    again: Bool[Array, ""]
    velocity_before: Float[Array, " weights"]
    multiplier_before: Float[Array, " slots"]
    point: Point
    groups: Groups
    mode: Mode
    is_consistent: Bool[Array, ""]


def settle(
    system: System,
    w: Float[Array, " weights"],
    side: Int[Array, "samples kinks"],
    base: Int[Array, "samples kinks"],
    trigger: Bool[Array, "samples kinks"],
    largest: Float[Array, ""],
    counts: Counts,
    *,
    room: int,
    starting: Bool[Array, ""],
) -> tuple[Settled, Counts]:
    """Find the mode in which the flow goes on from w.

    `side` and `base` are those that the step arrived with, `trigger` marks the pair
    that ended it, `largest` is the scale of z.
    """
    contact = find_contact(system, w, side, base, trigger, largest)
    slots = _as_slots(contact.at_kink, room)
    was = jnp.where(slots.used, slots.gathered(contact.side), -1)
    base_then = slots.gathered(contact.base)
    first = jnp.where(slots.used & (was == 0), base_then, was)
    last, rounds = _rounds(system, w, contact.base, slots, was, first)
    counts = counts.plus(gradients=rounds, rows=rounds * jnp.sum(slots.used), forward=2)
    settled, now = _conclude(system, w, contact, slots, was, last)
    # A slider that went dormant took its constraint with it: the step that led here
    # cannot be judged by the old mode's velocity.
    lost = jnp.any((side == 0) & ~contact.at_kink)
    settled = settled._replace(
        velocity_before=jnp.where(lost, jnp.nan, settled.velocity_before),
        largest=jnp.maximum(largest, settled.largest),
    )
    return settled, _counted(counts, slots, was, now, last, starting)


def _as_slots(at_kink: Array, room: int) -> Slots:
    size = at_kink.size
    index = jnp.nonzero(at_kink.ravel(), size=room, fill_value=size)[0]
    used = index < size
    return Slots(jnp.where(used, index, 0), used)


def _rounds(
    system: System, w: Array, base: Array, slots: Slots, was: Array, first: Array
) -> tuple[_Round, Array]:
    """Evaluate until base slopes and mode fit.

    They do not at once if a group's members have base slopes of different sides, or if
    a pair changes side below another pair at its kink, whose row it then changes.
    """
    round_ = _first_round(system, w, base, slots, first)

    def one(r: _Round) -> _Round:
        return _one_round(system, w, base, slots, was, r)

    def go_on(r: _Round):
        return r.again & (r.number < _ROUNDS)

    last = lax.while_loop(go_on, one, round_)
    return last, last.number


def _first_round(system, w, base, slots: Slots, first) -> _Round:
    shapes = jax.eval_shape(lambda: evaluate(system, w, base, slots))
    point = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    room = slots.used.size
    zeros, states = jnp.zeros(room, w.dtype), jnp.zeros(room, jnp.int32)
    numbers = jnp.arange(room)
    factor, no = jnp.zeros((room, room), w.dtype), jnp.asarray(False)
    return _Round(
        number=jnp.asarray(0),
        base=first,
        next_base=first,
        start=states,
        again=jnp.asarray(True),
        velocity_before=jnp.full_like(w, jnp.nan),
        multiplier_before=zeros,
        point=point,
        groups=Groups(numbers, states),
        mode=Mode(states, zeros, zeros, factor, no),
        is_consistent=no,
    )


def _one_round(
    system: System, w: Array, table: Array, slots: Slots, was: Array, r: _Round
) -> _Round:
    used, base = slots.used, r.next_base
    point = evaluate(system, w, slots.scattered(table, base, used), slots)
    groups = group(point, used)
    leads = used & groups.leads
    is_first = r.number == 0
    # The side of its group on which a member's base slope lies.
    on_plus = (base * groups.sense) > 0
    plus = on_plus[groups.leader]
    mixed = jnp.any(used & (on_plus != plus))
    slid = groups.total((was == 0).astype(jnp.int32)) > 0
    start = jnp.where(is_first, jnp.where(slid, 0, was * groups.sense), r.start)
    zeros = jnp.zeros_like(point.scale)
    multiplier, factor = multipliers(point, leads & (start == 0), zeros)
    before = jnp.where(
        is_first & ~mixed, velocity(system, point, multiplier), r.velocity_before
    )
    given = Mode(start, multiplier, zeros, factor, jnp.asarray(False))
    mode = find_mode(system, point, groups, used, plus, given)
    side = (mode.state[groups.leader] * groups.sense).astype(jnp.int32)
    moved = used & (side != 0) & (side != base)
    nested = jnp.any(moved[None, :] & (point.above != 0))
    again = mixed | nested
    fitting = jnp.where(mixed | (side == 0), -groups.sense, side)
    return _Round(
        number=r.number + 1,
        base=base,
        next_base=jnp.where(again & used, fitting, base),
        start=jnp.where(mixed, start, mode.state),
        again=again,
        velocity_before=before,
        multiplier_before=jnp.where(is_first, multiplier, r.multiplier_before),
        point=point,
        groups=groups,
        mode=mode,
        is_consistent=~mixed,
    )


def _conclude(
    system: System, w: Array, contact: Contact, slots: Slots, was: Array, last: _Round
) -> tuple[Settled, Array]:
    used, groups, point, mode = slots.used, last.groups, last.point, last.mode
    side = jnp.where(used, mode.state[groups.leader] * groups.sense, 1)
    side = side.astype(jnp.int32)
    slides = used & (side == 0)
    leads = slides & groups.leads
    # Sliders are based on their group's minus side: their multipliers count from there.
    base = jnp.where(side == 0, -groups.sense, side)
    on_plus = ((last.base * groups.sense) > 0)[groups.leader]
    from_minus = mode.multiplier + mode.width * on_plus.astype(w.dtype)
    # Take away the drift off the constraints with the Gram matrix at hand.
    off = jnp.where(leads, slots.gathered(point.z) * point.scale, 0)
    back = jnp.where(leads, solve(mode.factor, off), 0)
    rate = rate_of_change(point, mode.multiplier)
    still = jnp.abs(rate) <= _HELD * jnp.linalg.norm(point.gradient)
    nothing = jnp.zeros_like(contact.at_kink)
    settled = Settled(
        w=w - system.against(point.rows, back * point.scale),
        loss=point.loss,
        side=slots.scattered(contact.side, side, used),
        base=slots.scattered(contact.base, base, used),
        held=slots.scattered(nothing, used & (side != 0) & still, used),
        slots=Slots(slots.pair, slides),
        groups=groups,
        multiplier=jnp.where(leads, from_minus, 0),
        width=jnp.where(slides & groups.leads, mode.width, 0),
        velocity=velocity(system, point, mode.multiplier),
        velocity_before=last.velocity_before,
        largest=jnp.max(jnp.abs(point.z), initial=0),
        overflows=jnp.sum(contact.at_kink) > used.size,
        is_settled=mode.is_settled & last.is_consistent & ~last.again,
        changed=jnp.any(used & (was != side)),
    )
    return settled, side


def _counted(
    counts: Counts, slots: Slots, was: Array, now: Array, last: _Round, starting: Array
) -> Counts:
    used, mode = slots.used, last.mode
    width = mode.width
    share = last.multiplier_before / jnp.where(width != 0, width, 1)
    inside = (share > _INTERIOR) & (share < 1 - _INTERIOR)
    turned = ((width <= 0) & inside)[last.groups.leader] & (was == 0) & (now != 0)
    counts = counts.plus(
        crossings=jnp.where(starting, 0, jnp.sum(used & (was * now == -1))),
        entries=jnp.sum(used & (was != 0) & (now == 0)),
        exits=jnp.sum(used & (was == 0) & (now != 0)),
        non_unique=jnp.sum(used & turned)
        + jnp.where(starting, _repelled(slots, last), 0),
    )
    sliding = jnp.sum(used & (now == 0))
    return counts._replace(
        largest_sliding_set=jnp.maximum(counts.largest_sliding_set, sliding)
    )


def _repelled(slots: Slots, last: _Round) -> Array:
    """How many groups at a concave kink could go on to either side."""
    mode, point = last.mode, last.point
    rate = rate_of_change(point, mode.multiplier)
    # On the other side the multiplier is larger or smaller by the (negative) width.
    other = rate + mode.state.astype(rate.dtype) * mode.width
    both = jnp.where(mode.state < 0, other >= 0, other <= 0)
    concave = mode.width < -1e-9 * jnp.max(jnp.abs(mode.width))
    return jnp.sum(slots.used & last.groups.leads & (mode.state != 0) & concave & both)
