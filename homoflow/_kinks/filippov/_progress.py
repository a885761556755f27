"""How far an exact flow has got, what it has counted, and how it ended."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._counts import Counts, count_true
from ._event_log import Log
from ._state import State


class Ending(eqx.Module):
    """What went wrong, if anything did. Running out of steps is not among it."""

    flags: Bool[Array, "4"]

    @staticmethod
    def create(*, overflows, mode_unsettled, stuck, nonfinite) -> "Ending":
        return Ending(jnp.stack([overflows, mode_unsettled, stuck, nonfinite]))

    @staticmethod
    def none() -> "Ending":
        return Ending(jnp.zeros(4, bool))

    @property
    def any(self) -> Bool[Array, ""]:
        return jnp.any(self.flags)

    @property
    def overflows(self) -> Bool[Array, ""]:
        return self.flags[0]

    @property
    def mode_unsettled(self) -> Bool[Array, ""]:
        return self.flags[1]

    @property
    def stuck(self) -> Bool[Array, ""]:
        return self.flags[2]

    @property
    def nonfinite(self) -> Bool[Array, ""]:
        return self.flags[3]


class StepCounts(NamedTuple):
    """How many steps were accepted and rejected, and how many in a row have stalled.

    `accepted` is −1 until the event at the start of the flow has been resolved.
    """

    accepted: Int[Array, ""]
    rejected: Int[Array, ""]
    stalled: Int[Array, ""]

    @property
    def is_start(self) -> Bool[Array, ""]:
        return self.accepted < 0


class Tally(NamedTuple):
    """What has happened so far.

    - `is_nonunique`: the pairs that had a choice at some time.
    - `first_nonunique_time`: the first time of a choice or a forced step; inf if none.
    """

    counts: Counts
    log: Log | None
    is_nonunique: Bool[Array, "samples kinks"]
    first_nonunique_time: Float[Array, ""]

    @staticmethod
    def start(state: State, log_capacity: int) -> "Tally":
        return Tally(
            counts=Counts.zeros(),
            log=Log.empty(log_capacity, state.t) if log_capacity else None,
            is_nonunique=jnp.zeros(state.tables.side.shape, bool),
            first_nonunique_time=jnp.full_like(state.t, jnp.inf),
        )


class Progress(NamedTuple):
    """How far the flow has got.

    - `is_accepted`: whether the last step was.
    - `is_due`: whether it ended on the next of the times to record, of which
        `num_recorded` have been reached.
    """

    state: State
    is_accepted: Bool[Array, ""]
    is_due: Bool[Array, ""]
    num_recorded: Int[Array, ""]
    ending: Ending
    tally: Tally
    steps: StepCounts

    @staticmethod
    def start(state: State, log_capacity: int) -> "Progress":
        zero, no = jnp.asarray(0), jnp.asarray(False)
        return Progress(
            state=state,
            is_accepted=no,
            is_due=no,
            num_recorded=zero,
            ending=Ending.none(),
            tally=Tally.start(state, log_capacity),
            steps=StepCounts(accepted=zero - 1, rejected=zero, stalled=zero),
        )


class Tolerances(NamedTuple):
    """A step may err by `rtol` · ‖w‖ + `atol`."""

    rtol: Float[Array, ""]
    atol: Float[Array, ""]


class Goal(NamedTuple):
    """What is asked for: the flow until t1, with steps that end on the times `ts`."""

    t1: Float[Array, ""]
    ts: Float[Array, " times"]
    tolerances: Tolerances
    max_steps: Int[Array, ""]

    def is_ahead(self, p: Progress) -> Bool[Array, ""]:
        num_tried = p.steps.accepted + p.steps.rejected
        return (p.state.t < self.t1) & ~p.ending.any & (num_tried < self.max_steps)

    def next_time(self, num_recorded: Int[Array, ""]) -> Float[Array, ""]:
        """The next time to stop at."""
        later = self.ts[jnp.minimum(num_recorded, self.ts.size - 1)]
        return jnp.where(num_recorded < self.ts.size, later, self.t1)


class Solution(NamedTuple):
    """Where the flow ended, what was recorded at the first times of `ts`, and how.

    `is_finite` tells it for each record. See `Tally` for `first_nonunique_time`.
    """

    w: Float[Array, " weights"]
    t: Float[Array, ""]
    records: PyTree
    is_finite: Bool[Array, " times"]
    num_recorded: Int[Array, ""]
    ending: Ending
    counts: Counts
    log: Log | None
    num_nonunique_pairs: Int[Array, ""]
    first_nonunique_time: Float[Array, ""]
    steps: Int[Array, ""]
    rejected: Int[Array, ""]

    @staticmethod
    def create(
        p: Progress, records: PyTree, is_finite: Bool[Array, " times"]
    ) -> "Solution":
        return Solution(
            w=p.state.point.w,
            t=p.state.t,
            records=records,
            is_finite=is_finite,
            num_recorded=p.num_recorded,
            ending=p.ending,
            counts=p.tally.counts,
            log=p.tally.log,
            num_nonunique_pairs=count_true([p.tally.is_nonunique])[0],
            first_nonunique_time=p.tally.first_nonunique_time,
            steps=jnp.maximum(p.steps.accepted, 0),
            rejected=p.steps.rejected,
        )
