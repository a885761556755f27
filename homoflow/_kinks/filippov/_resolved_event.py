"""The state of the flow after an event."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ..._results._event_kind import EventKind
from ._counts import Counts, count_true
from ._event_log import NO_EVENT
from ._event_point import EventPoint
from ._iterate import Iterate
from ._state import FlowPoint, PairTables, Sliding


class ResolvedEvent(NamedTuple):
    """A point with the mode in which the flow goes on from there.

    - `point`: its weights are moved back onto the kinks of sliding pairs, by rounding's
        worth.
    - `is_resolved`: false if no mode was found that fits.
    - `is_retry`: pairs changed sides below disconnected ones, which may be connected now:
        the event must be resolved again.
    - `leaves`: whether some pair leaves its kink.
    """

    point: FlowPoint
    tables: PairTables
    sliding: Sliding
    is_resolved: Bool[Array, ""]
    is_retry: Bool[Array, ""]
    leaves: Bool[Array, ""]


def finish(
    event: EventPoint,
    last: Iterate,
    counts: Counts,
    *,
    ambiguous_before: Bool[Array, "samples kinks"],
    was_retry: Bool[Array, ""],
) -> tuple[ResolvedEvent, Counts]:
    """The event as it is resolved by the last iterate, and the counts with its work.

    `ambiguous_before` marks the pairs that were ambiguous already, and `was_retry` tells
    that the event had been resolved before.
    """
    pairs, is_used, groups = event.pairs, event.pairs.is_used, last.groups
    mode, field, before = last.mode, last.field, event.tables
    side = last.sides(event)
    slides = is_used & (side == 0)
    leads = slides & groups.is_leader
    on_plus = last.is_base_on_plus[groups.leader]
    from_minus = mode.multiplier + mode.width * on_plus.astype(mode.width.dtype)
    leaves = is_used & (side != 0)
    constrained = leaves & last.marks.is_still
    nowhere = jnp.zeros(before.side.shape, bool)
    tables = before._replace(
        side=pairs.scatter(before.side, side, is_used),
        base=pairs.scatter(before.base, groups.base_side(side), is_used),
        constrained=pairs.scatter(nowhere, constrained, is_used),
        choice=_find_choices(event, last, side, ambiguous_before, was_retry),
    )
    num_used, num_sliding = count_true([is_used, slides])
    resolved = ResolvedEvent(
        point=FlowPoint(
            event.w + field.correction, field.loss, field.velocity, event.max_abs_z
        ),
        tables=tables,
        sliding=Sliding(
            pairs=pairs._replace(is_used=slides),
            groups=groups,
            leads=leads,
            multiplier=jnp.where(leads, from_minus, 0),
            width=jnp.where(leads, mode.width, 0),
        ),
        is_resolved=mode.is_settled & ~last.next.is_needed,
        is_retry=jnp.any(event.may_reconnect & (side != event.side_before)),
        leaves=jnp.any(leaves & ~last.marks.is_still),
    )
    counts = counts.add(gradients=last.number, rows=last.number * num_used, forward=2)
    return resolved, counts.record_sliding(num_sliding)


def _find_choices(
    event: EventPoint,
    last: Iterate,
    side: Int[Array, " slots"],
    ambiguous_before: Bool[Array, "samples kinks"],
    was_retry: Bool[Array, ""],
) -> Int[Array, "samples kinks"]:
    """The kind of event of every pair whose side is one of several possible ones.

    A change of side at a retry may be a choice: it depends on which kinks are taken to
    close first. So may be the sides of pairs on which it depends whether a group parts.
    """
    pairs, marks, is_used = event.pairs, last.marks, event.pairs.is_used
    changes_at_retry = was_retry & is_used & (side != event.side_before)
    # With dependent rows each sliding pair is kept in its own interval, which may be too
    # strict.
    is_dependent = event.arrives & is_used & (side == 0) & ~last.mode.is_unique
    is_choice = marks.nonunique | marks.decouples | marks.may_keep_sliding
    is_choice = is_choice | changes_at_retry | is_dependent
    up, down = int(EventKind.choice_up), int(EventKind.choice_down)
    newly_ambiguous = event.tables.ambiguous & ~ambiguous_before
    table = jnp.where(newly_ambiguous, down, NO_EVENT).astype(jnp.int32)
    choice = jnp.where(side > 0, up, down).astype(jnp.int32)
    return pairs.scatter(table, choice, is_choice)
