"""The events of a run, written down inside the loop in room for a fixed number."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..._results._event_kind import EventKind
from ._counts import how_many

_CROSSINGS = (EventKind.crossing_up, EventKind.crossing_down)
_EXITS = (EventKind.exit_up, EventKind.exit_down)
#: Where a table of kinds has no event.
NOTHING = -1


class Log(NamedTuple):
    """The first events, in order of time.

    - `pair`: its number among all pairs, sample · kinks + kink.
    - `seen`: how many events there were, kept or not.
    - `overflowed_at`: the time of the first that was not kept; inf if all were.
    """

    time: Float[Array, " room"]
    pair: Int[Array, " room"]
    kind: Int[Array, " room"]
    seen: Int[Array, ""]
    overflowed_at: Float[Array, ""]

    def written(self, t: Float[Array, ""], kinds: Int[Array, "samples kinks"]) -> "Log":
        """The log with what happened at time t, for each pair."""
        room, happened = self.pair.size, kinds.ravel() != NOTHING
        seen = self.seen + jnp.sum(happened)
        place = self.seen + jnp.cumsum(happened) - 1
        place = jnp.where(happened, place, room)
        numbers = jnp.arange(room)
        is_new = (numbers >= self.seen) & (numbers < seen)
        overflows = (seen > room) & (self.seen <= room)
        return Log(
            time=jnp.where(is_new, t, self.time),
            pair=self.pair.at[place].set(jnp.arange(happened.size), mode="drop"),
            kind=self.kind.at[place].set(kinds.ravel(), mode="drop"),
            seen=seen,
            overflowed_at=jnp.where(overflows, t, self.overflowed_at),
        )


def empty_log(room: int, t: Float[Array, ""]) -> Log:
    return Log(
        time=jnp.full(room, jnp.nan, t.dtype),
        pair=jnp.full(room, -1),
        kind=jnp.full(room, NOTHING, jnp.int32),
        seen=jnp.asarray(0),
        overflowed_at=jnp.full_like(t, jnp.inf),
    )


def side_changes(
    before: Int[Array, "samples kinks"],
    after: Int[Array, "samples kinks"],
    starting: Bool[Array, ""],
) -> Int[Array, "samples kinks"]:
    """The kind of event, or `NOTHING`, that takes each pair from side to side.

    A pair that starts on its kink crosses nothing when it is put on a side.
    """
    kinds = jnp.full_like(after, NOTHING)
    up, down = after > 0, after < 0
    for kind, happened in (
        (EventKind.crossing_up, (before < 0) & up & ~starting),
        (EventKind.crossing_down, (before > 0) & down & ~starting),
        (EventKind.entry, (before != 0) & (after == 0)),
        (EventKind.exit_up, (before == 0) & up),
        (EventKind.exit_down, (before == 0) & down),
    ):
        kinds = jnp.where(happened, int(kind), kinds)
    return kinds


def numbers_of(changes: Int[Array, "samples kinks"]) -> dict[str, Int[Array, ""]]:
    """How many changes of side of what sort there are in the table."""
    up, down = (changes == int(kind) for kind in _CROSSINGS)
    left_up, left_down = (changes == int(kind) for kind in _EXITS)
    entries = changes == int(EventKind.entry)
    masks = [up | down, entries, left_up | left_down]
    names = "crossings", "entries", "exits"
    return dict(zip(names, how_many(masks), strict=True))
