"""Whether a step is accepted, how long the next may be, and whether the flow ends."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..._jax._arrays import unit_if_tiny
from ._progress import Ending, Goal, StepCounts, Tolerances
from ._resolved_event import ResolvedEvent
from ._state import State
from ._step import Arrival

_ORDER = 4
_SAFETY, _MIN_FACTOR, _MAX_FACTOR = 0.9, 0.2, 3.0
#: A step stalls if it is shorter than this part of the allowed step. After so many stalled
#: steps in a row the flow is stuck.
_STALLED, _MAX_STALLED_STEPS = 1e-12, 30
#: How often in a row a step is shortened whose end is not finite.
_MAX_NONFINITE = 20
#: How often one event is resolved again.
_MAX_RETRIES = 8


class Decision(NamedTuple):
    """The verdict on a step.

    - `step`: the allowed length of the next one.
    - `is_forced`: whether that must be a forced step.
    """

    is_accepted: Bool[Array, ""]
    step: Float[Array, ""]
    is_forced: Bool[Array, ""]
    ending: Ending
    num_stalled: Int[Array, ""]

    @property
    def happens(self) -> Bool[Array, ""]:
        """Whether the flow goes on from the end of the step."""
        return self.is_accepted & ~self.ending.any


def judge(
    state: State,
    steps: StepCounts,
    arrival: Arrival,
    resolved: ResolvedEvent,
    velocity_before: Float[Array, " weights"],
    overflows: Bool[Array, ""],
    goal: Goal,
) -> Decision:
    """Accept the step if its defect allows.

    The defect is the difference between the slope of the path at its end and the velocity
    there in the old mode, `velocity_before`.
    """
    is_start, duration = steps.is_start, arrival.duration
    norms = _Norms.create(state, arrival, resolved, velocity_before)
    is_finite = jnp.isfinite(norms.w_after + norms.defect + resolved.point.loss)
    is_shorter_possible = ~(is_start | state.is_forced)
    error = _error(norms, duration, goal.tolerances)
    error = jnp.where(is_shorter_possible, error, 0)
    # Too long a step may have left where the field is a number.
    error = jnp.where(is_shorter_possible & ~is_finite, jnp.inf, error)
    allowed = jnp.where(
        is_start,
        _first_step(norms, goal.tolerances.rtol, goal.t1),
        _next_step(state, duration, error),
    )
    is_stalled = (duration < _STALLED * state.step) | ~is_finite
    num_stalled = jnp.where(is_stalled, steps.stalled + 1, 0)
    num_stalled = jnp.where(is_start, 0, num_stalled)
    # There is no way on, or one retry after the other. From a little further on there is
    # one.
    is_lost = ~resolved.is_resolved & ~overflows
    never_ends = resolved.is_retry & resolved.leaves & (num_stalled > _MAX_RETRIES)
    ending = Ending.create(
        overflows=overflows,
        mode_unsettled=is_lost & state.is_forced,
        stuck=num_stalled > _MAX_STALLED_STEPS,
        nonfinite=~is_finite & ((error <= 1) | (num_stalled > _MAX_NONFINITE)),
    )
    return Decision(error <= 1, allowed, is_lost | never_ends, ending, num_stalled)


class _Norms(NamedTuple):
    """Norms of w before and after a step, of the new velocity, and of the defect."""

    w_before: Float[Array, ""]
    w_after: Float[Array, ""]
    velocity: Float[Array, ""]
    defect: Float[Array, ""]

    @staticmethod
    def create(
        state: State, arrival: Arrival, resolved: ResolvedEvent, velocity_before: Array
    ) -> "_Norms":
        slope = arrival.path.slope(arrival.theta) / arrival.step
        defect = slope - velocity_before
        point = resolved.point
        vectors = state.point.w, point.w, point.velocity, defect
        # Squares of weights below 1e-154 are no numbers.
        unit = unit_if_tiny(state.point.w)
        # Products, because XLA compiles two kernels for each sum.
        squares = jnp.stack([(v / unit) @ (v / unit) for v in vectors])
        return _Norms(*(unit * jnp.sqrt(squares)))


def _error(norms: _Norms, duration: Array, allowed: Tolerances) -> Float[Array, ""]:
    """The step's error in units of what is allowed, from its defect at its end."""
    most = allowed.rtol * norms.w_before + allowed.atol
    return jnp.where(
        most > 0, duration * norms.defect / jnp.where(most > 0, most, 1), 0
    )


def _first_step(norms: _Norms, rtol: Array, t1: Array) -> Float[Array, ""]:
    """A step in which the weights change by about rtol^(1/4) of their size."""
    speed = norms.velocity
    time = norms.w_after / jnp.where(speed > 0, speed, 1)
    step = jnp.where(speed > 0, rtol ** (1 / _ORDER) * time, t1)
    return jnp.clip(step, 1e-9 * t1, t1)


def _next_step(state: State, duration: Array, error: Array) -> Float[Array, ""]:
    factor = _SAFETY * jnp.maximum(error, 1e-10) ** (-1 / _ORDER)
    proposal = jnp.clip(factor, _MIN_FACTOR, _MAX_FACTOR) * duration
    # A step that an event cut short says little about longer ones: it may only raise
    # what is allowed.
    is_informative = (error > 0.3) | (proposal > state.step)
    return jnp.where(is_informative, proposal, state.step)
