"""A log of the events of a run, of fixed capacity, which is written inside the loop."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..._results._event_kind import EventKind
from ._counts import count_true

_CROSSINGS = (EventKind.crossing_up, EventKind.crossing_down)
_EXITS = (EventKind.exit_up, EventKind.exit_down)
#: The entry of a table of kinds where there is no event.
NO_EVENT = -1


class Log(NamedTuple):
    """The first events, in order of time.

    - `pair`: its index among all pairs, sample · kinks + kink.
    - `seen`: how many events there were, whether they are in the log or not.
    - `overflowed_at`: the time of the first that is not in the log; inf if all are.
    """

    time: Float[Array, " capacity"]
    pair: Int[Array, " capacity"]
    kind: Int[Array, " capacity"]
    seen: Int[Array, ""]
    overflowed_at: Float[Array, ""]

    @staticmethod
    def empty(capacity: int, t: Float[Array, ""]) -> "Log":
        return Log(
            time=jnp.full(capacity, jnp.nan, t.dtype),
            pair=jnp.full(capacity, -1),
            kind=jnp.full(capacity, NO_EVENT, jnp.int32),
            seen=jnp.asarray(0),
            overflowed_at=jnp.full_like(t, jnp.inf),
        )

    def append(self, t: Float[Array, ""], kinds: Int[Array, "samples kinks"]) -> "Log":
        """The log with the events of time t, given by their kinds for all pairs."""
        capacity, happened = self.pair.size, kinds.ravel() != NO_EVENT
        seen = self.seen + jnp.sum(happened)
        place = self.seen + jnp.cumsum(happened) - 1
        place = jnp.where(happened, place, capacity)
        places = jnp.arange(capacity)
        is_new = (places >= self.seen) & (places < seen)
        overflows = (seen > capacity) & (self.seen <= capacity)
        return Log(
            time=jnp.where(is_new, t, self.time),
            pair=self.pair.at[place].set(jnp.arange(happened.size), mode="drop"),
            kind=self.kind.at[place].set(kinds.ravel(), mode="drop"),
            seen=seen,
            overflowed_at=jnp.where(overflows, t, self.overflowed_at),
        )


def classify_side_changes(
    before: Int[Array, "samples kinks"],
    after: Int[Array, "samples kinks"],
    is_start: Bool[Array, ""],
) -> Int[Array, "samples kinks"]:
    """The kind of event, or `NO_EVENT`, that takes each pair from side to side.

    A pair that starts on its kink crosses nothing when it is put on a side.
    """
    kinds = jnp.full_like(after, NO_EVENT)
    up, down = after > 0, after < 0
    for kind, happened in (
        (EventKind.crossing_up, (before < 0) & up & ~is_start),
        (EventKind.crossing_down, (before > 0) & down & ~is_start),
        (EventKind.entry, (before != 0) & (after == 0)),
        (EventKind.exit_up, (before == 0) & up),
        (EventKind.exit_down, (before == 0) & down),
    ):
        kinds = jnp.where(happened, int(kind), kinds)
    return kinds


def count_events(changes: Int[Array, "samples kinks"]) -> dict[str, Int[Array, ""]]:
    """How many crossings, entries and exits there are in a table of kinds."""
    up, down = (changes == int(kind) for kind in _CROSSINGS)
    left_up, left_down = (changes == int(kind) for kind in _EXITS)
    entries = changes == int(EventKind.entry)
    masks = [up | down, entries, left_up | left_down]
    names = "crossings", "entries", "exits"
    return dict(zip(names, count_true(masks), strict=True))
