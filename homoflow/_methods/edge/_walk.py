"""What is known of a flow along the edge while it is being solved."""

import enum
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..._dynamics.edge._edge import Motion, Work
from ..._dynamics.edge._frame import Course, Frame

#: How accurately the time of an event is found, relative to the step, in how many trials.
_TIME_RTOL, _MAX_TRIALS = 1e-9, 40
#: How wide the oscillation is, for the warning, is computed each so many steps.
_STEPS_PER_WIDTH = 4


class Phase(enum.IntEnum):
    """What a turn of the loop does: each looks at one point.

    - `step`: tries a step of the mode.
    - `locate`: looks for the event within it.
    - `record`: records a point on the way to where the step or the event has led.
    - `decide`: finds which eigenvalues stay at the threshold after an event.
    - `part`: takes a small step with close eigenvalues and their gaps in sight.
    - `enter`: moves the weights to where a mode begins.
    """

    step = 0
    locate = 1
    record = 2
    decide = 3
    part = 4
    enter = 5


class State(NamedTuple):
    """A point of the flow.

    - `sums`: integrals of `rates` so far; `slope`: d(weights, sums)/dτ, as one
        vector.
    - `num`: how many eigenvalues are at the threshold.
    - `event`: the event function, positive once the mode has ended.
    - `shift`: how far descent's sharpness will be from the threshold, relatively.
    """

    t: Float[Array, ""]
    w: Float[Array, " size"]
    sums: Float[Array, " sums"]
    slope: Float[Array, " all"]
    motion: Motion
    num: Int[Array, ""]
    event: Float[Array, ""]
    shift: Float[Array, ""]


def between(
    a: State, b: State, part: Float[Array, ""]
) -> tuple[Float[Array, " size"], Float[Array, " sums"]]:
    """Weights and sums at a part of the way, by cubic Hermite interpolation."""
    s, h, size = part, b.t - a.t, a.w.size
    start, end = (jnp.concatenate([x.w, x.sums]) for x in (a, b))
    y = (1 + 2 * s) * (1 - s) ** 2 * start + s**2 * (3 - 2 * s) * end
    y += h * (s * (1 - s) ** 2 * a.slope - s**2 * (1 - s) * b.slope)
    return y[:size], y[size:]


class Bracket(NamedTuple):
    """Parts of a step before and after its event, and the event function there.

    - `side`: 1 if the last trial was after the event, -1 if it was before, 0 at first.
    """

    low: Float[Array, ""]
    high: Float[Array, ""]
    at_low: Float[Array, ""]
    at_high: Float[Array, ""]
    side: Int[Array, ""]
    trials: Int[Array, ""]

    def guess(self) -> Float[Array, ""]:
        """Where the event may be, by false position."""
        rise = self.at_high - self.at_low
        part = (self.low * self.at_high - self.high * self.at_low) / rise
        width = self.high - self.low
        return jnp.clip(part, self.low + 0.01 * width, self.high - 0.01 * width)

    def narrowed(self, part: Array, event: Array) -> "Bracket":
        """With one more value; that of an end that stays again is halved [Illinois]."""
        is_past = event > 0
        side = jnp.where(is_past, 1, -1).astype(self.side.dtype)
        kept = jnp.where(side == self.side, 0.5, 1.0)
        return Bracket(
            low=jnp.where(is_past, self.low, part),
            high=jnp.where(is_past, part, self.high),
            at_low=jnp.where(is_past, kept * self.at_low, event),
            at_high=jnp.where(is_past, event, kept * self.at_high),
            side=side,
            trials=self.trials + 1,
        )

    @property
    def is_narrow(self) -> Bool[Array, ""]:
        return (self.high - self.low <= _TIME_RTOL) | (self.trials >= _MAX_TRIALS)


class Before(NamedTuple):
    """Where the eigenvectors at the threshold were before the present state, and when.

    The present time stands for nothing before it in the same mode.
    """

    t: Float[Array, ""]
    frame: Frame

    @staticmethod
    def at(state: State) -> "Before":
        return Before(state.t, state.motion.frame())


class Ending(NamedTuple):
    """Why a walk ended before its time, if it did."""

    is_infeasible: Bool[Array, ""]
    is_crowded: Bool[Array, ""]
    is_stuck: Bool[Array, ""]
    is_nonfinite: Bool[Array, ""]


class Counts(NamedTuple):
    steps: Int[Array, ""]
    rejected: Int[Array, ""]
    small_steps: Int[Array, ""]
    events: Int[Array, ""]


class Walk(NamedTuple):
    """A walk under way.

    - `before`: where it was; `state`: where it is; `end`, `goal`: the end of the step being
        looked at, and the point of it up to which it is taken.
    - `phase`: what the next turn does; `after`: what follows when all is recorded.
    - `length`: of the next step.
    - `fastest_onset`: the largest `Motion.rise` with which eigenvalues came to the edge
        when none was there.
    - `largest_shift`: the largest of `Edge.shift`, in absolute value, so far.
    """

    before: Before
    state: State
    end: State
    goal: State
    bracket: Bracket
    phase: Int[Array, ""]
    after: Int[Array, ""]
    length: Float[Array, ""]
    fastest_onset: Float[Array, ""]
    largest_shift: Float[Array, ""]
    num_recorded: Int[Array, ""]
    records: PyTree
    ending: Ending
    counts: Counts
    work: Work

    def is_width_due(self) -> Bool[Array, ""]:
        """At recorded times, where a mode begins, and at some of its steps."""
        is_rare = self.counts.steps % _STEPS_PER_WIDTH != 0
        is_step = self.phase == Phase.step
        return (self.phase != Phase.locate) & ~(is_step & is_rare)

    def course(self) -> Course:
        """Where the eigenvectors at the threshold go from here, if they go on."""
        elapsed = self.state.t - self.before.t
        now = self.state.motion.frame()
        return Course.through(self.before.frame, now, elapsed, self.state.num)


class Candidate(NamedTuple):
    """A point to be looked at.

    - `num`: how many eigenvalues are to be at the threshold there; `num_wanted`: how many
        have to be accurate.
    - `oscillation`, `velocity`: those that led there, while eigenvalues part
        (`is_parting`).
    - `length`: of the step that led there.
    """

    t: Float[Array, ""]
    w: Float[Array, " size"]
    sums: Float[Array, " sums"]
    vectors: Float[Array, "rows size"]
    num: Int[Array, ""]
    num_wanted: Int[Array, ""]
    velocity: Float[Array, " size"]
    oscillation: Float[Array, "critical critical"]
    is_parting: Bool[Array, ""]
    length: Float[Array, ""]
