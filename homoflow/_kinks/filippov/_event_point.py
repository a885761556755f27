"""A point at which the field is wanted: at an event, or at a stage of a step."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._active_pairs import ActivePairs
from .._system import System
from ._active_set import classify_pairs
from ._counts import count_true
from ._sliding_field import Groups
from ._state import ContinuationHint, PairTables, State


class EventPoint(NamedTuple):
    """A point at which the field is wanted, at the time `t`.

    - `tables`: as the step arrives there, with the pairs at zero classified. What they
        say of `constrained` pairs and of choices is from before.
    - `pairs`: the active pairs; `side_before`: their sides, 0 for those that slid.
    - `arrives`: active pairs that were not constrained before.
    - `may_reconnect`: active pairs with disconnected pairs in their sample.
    - `groups`: those of parallel rows, as far as they are known; at an event they are not.
    - `max_abs_z`: the largest |z| of all pairs; at a stage, that from where it began.
    - `is_event`: whether the mode is to be found. Else it is known: all active pairs slide.
    """

    t: Float[Array, ""]
    w: Float[Array, " weights"]
    tables: PairTables
    pairs: ActivePairs
    side_before: Int[Array, " slots"]
    arrives: Bool[Array, " slots"]
    may_reconnect: Bool[Array, " slots"]
    groups: Groups
    max_abs_z: Float[Array, ""]
    is_event: Bool[Array, ""]

    def replaced_unless(
        self, is_event: Bool[Array, ""], make_stage: Callable[[], "EventPoint"]
    ) -> "EventPoint":
        """This point or, unless an event is wanted, another one.

        Only the tables that tell the field are the other's: XLA copies each table that
        comes out of a branch.
        """

        def parts(point: EventPoint):
            tables = point.tables
            return tables.base, tables.disconnected, point._replace(tables=None)

        base, disconnected, point = lax.cond(
            is_event, lambda: parts(self), lambda: parts(make_stage())
        )
        tables = self.tables._replace(base=base, disconnected=disconnected)
        return point._replace(tables=tables)


def event_point(
    system: System,
    t: Float[Array, ""],
    w: Float[Array, " weights"],
    tables: PairTables,
    trigger: Bool[Array, "samples kinks"],
    max_abs_z: Float[Array, ""],
    hint: ContinuationHint,
    capacity: int,
) -> tuple[EventPoint, Bool[Array, ""]]:
    """The point w as an event, and whether more pairs are active than there is room for.

    `tables` are those with which the step arrived; `trigger` marks the pair that ended
    it; `hint` tells how the flow went on from where the step began.
    """
    active_set = classify_pairs(system, w, tables, trigger, max_abs_z, hint)
    active, after = active_set.active, active_set.tables
    was_disconnected = hint.is_retry & tables.disconnected
    pairs = ActivePairs.from_mask(active, capacity)
    event = EventPoint(
        t=t,
        w=w,
        tables=after,
        pairs=pairs,
        side_before=jnp.where(pairs.is_used, pairs.gather(after.side), -1),
        arrives=pairs.is_used & ~pairs.gather(tables.constrained),
        may_reconnect=pairs.in_samples_with(after.disconnected | was_disconnected),
        groups=Groups.apart(capacity),
        max_abs_z=active_set.max_abs_z,
        is_event=jnp.asarray(True),
    )
    return event, jnp.sum(active) > capacity


def stage_point(
    state: State, t: Float[Array, ""], w: Float[Array, " weights"]
) -> EventPoint:
    """The point w at the time t, in the mode of a state."""
    pairs = state.sliding.pairs
    return EventPoint(
        t=t,
        w=w,
        tables=state.tables,
        pairs=pairs,
        side_before=jnp.where(pairs.is_used, 0, -1).astype(jnp.int32),
        arrives=jnp.zeros_like(pairs.is_used),
        may_reconnect=pairs.in_samples_with(state.tables.disconnected),
        groups=state.sliding.groups,
        max_abs_z=state.point.max_abs_z,
        is_event=jnp.asarray(False),
    )


def loses_sliders(event: EventPoint, sliding: ActivePairs) -> Bool[Array, ""]:
    """Whether pairs that slid on the way are disconnected at the event.

    Their constraints are gone there, so the velocity before the event is not that of the
    old mode.
    """
    still_active, before = count_true(
        [event.pairs.is_used & (event.side_before == 0), sliding.is_used]
    )
    return still_active < before
