"""One step of the flow in a fixed mode: predict its end, take it, look for events.

The step is that of the classical Runge–Kutta method. Its continuous extension has order 3
inside the step and order 4 at the end. So the step is predicted first, from forward
passes alone, and then taken with a length that ends it near the next event.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._system import System
from ._event_location import (
    BRACKET_PASSES,
    Bracket,
    Crossing,
    Path,
    SideMonitor,
    bracket_first_crossing,
    find_first_exit,
    locate_crossing,
)
from ._state import State

#: Row i has the weights of the stages before it in the point of stage i.
_STAGES = np.array([[0, 0, 0, 0], [0.5, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 1, 0]])
#: Stage i has the weight Σ_j _WEIGHTS[i, j] θ^(j+1) at θ.
_WEIGHTS = np.array(
    [[1, -1.5, 2 / 3], [0, 1, -2 / 3], [0, 1, -2 / 3], [0, -0.5, 2 / 3]]
)
NUM_STAGES = len(_STAGES)
_NUM_POWERS = _WEIGHTS.shape[1]
#: Stages from whose multipliers those along the step are interpolated, and their θ.
_INTERPOLATED, _THETAS = np.array([0, 2, 3]), np.array([0, 0.5, 1])
#: How far past its end a step may be extrapolated to an event, as a factor.
_MAX_EXTRAPOLATION = 1.05
#: An exit is taken when the multiplier is outside by this part of the width. The field is
#: continuous at an exit: one taken late costs nothing, one taken early is no event.
_EXIT_SLACK = 1e-5
#: And by no less than this part of the largest width.
_MIN_SLACK = 1e-9
#: The length of a forced step relative to the weights. It is taken where no way on is
#: found; the kinks that meet there are then met one by one.
FORCED_STEP = 3e-8
#: A predicted event shortens a step to no less than this part.
_MIN_SHORTENING = 1e-3


class Arrival(NamedTuple):
    """The point that a step has reached, before its event is resolved.

    - The point is at θ = `theta` on `path`, a step of length `step`.
    - `pair`: the pair that left its side there; the number of pairs if none did.
    - `multiplier_rate`, `width_rate`: their time derivatives there, as tables over pairs.
    """

    t: Float[Array, ""]
    path: Path
    theta: Float[Array, ""]
    step: Float[Array, ""]
    pair: Int[Array, ""]
    multiplier_rate: Float[Array, "samples kinks"]
    width_rate: Float[Array, "samples kinks"]

    @staticmethod
    def start(state: State) -> "Arrival":
        """At the start of the flow, as if a step had led there."""
        one, rates = jnp.ones_like(state.t), state.extrapolation
        return Arrival(
            t=state.t,
            path=blank_path(state.point.w),
            theta=one,
            step=one,
            pair=jnp.asarray(state.tables.side.size),
            multiplier_rate=rates.multiplier_rate,
            width_rate=rates.width_rate,
        )

    @property
    def w(self) -> Float[Array, " weights"]:
        return self.path(self.theta)

    @property
    def duration(self) -> Float[Array, ""]:
        return self.theta * self.step


class Stages(NamedTuple):
    """The field at the stages of a Runge–Kutta step."""

    velocities: Float[Array, "4 weights"]
    multipliers: Float[Array, "4 slots"]
    widths: Float[Array, "4 slots"]

    @staticmethod
    def blank(w: Float[Array, " weights"], capacity: int) -> "Stages":
        none = jnp.zeros((NUM_STAGES, capacity), w.dtype)
        return Stages(jnp.zeros((NUM_STAGES, w.size), w.dtype), none, none)

    def insert(
        self, number: Int[Array, ""], velocity: Array, multiplier: Array, width: Array
    ) -> "Stages":
        """With the field at the stage `number`."""
        return Stages(
            self.velocities.at[number].set(velocity),
            self.multipliers.at[number].set(multiplier),
            self.widths.at[number].set(width),
        )


class Step(NamedTuple):
    """A step in the making, and the first event on it.

    - `length`: in time.
    - `event`: where it ends; a `pair` leaves its side there if `is_found`.
    - `rates`: derivatives of multipliers and widths with θ at the end.
    """

    path: Path
    stages: Stages
    length: Float[Array, ""]
    event: Crossing
    rates: Float[Array, "2 slots"]

    @staticmethod
    def blank(w: Float[Array, " weights"], capacity: int) -> "Step":
        stages, one = Stages.blank(w, capacity), jnp.ones((), w.dtype)
        event = Crossing(one, jnp.asarray(0), jnp.asarray(False), jnp.asarray(0))
        return Step(blank_path(w), stages, one, event, stages.multipliers[:2])

    def stage_point(
        self, w: Float[Array, " weights"], number: Int[Array, ""]
    ) -> Float[Array, " weights"]:
        """The weights of a stage of the step from w."""
        weights = jnp.asarray(_STAGES, self.length.dtype)
        return w + self.length * (weights[number] @ self.stages.velocities)


def blank_path(w: Float[Array, " weights"]) -> Path:
    return Path(w, jnp.zeros((_NUM_POWERS, w.size), w.dtype))


def advance(
    system: System,
    state: State,
    step: Step,
    until: Float[Array, ""],
    is_prediction: Bool[Array, ""],
) -> Step:
    """The step up to the first event, to time `until`, or to its end.

    Before its stages are known it is predicted, to find how long it should be.
    """
    left = until - state.t
    length = jnp.where(is_prediction, jnp.minimum(state.step, left), step.length)
    step = step._replace(length=length)
    path, multipliers, widths = lax.cond(
        is_prediction, _predict, _interpolate, state, step
    )
    limit = jnp.minimum(jnp.asarray(_MAX_EXTRAPOLATION, left.dtype), left / length)
    end = jnp.where(is_prediction, 1, limit)
    step = step._replace(path=path)
    return _stop_at_event(system, state, step, multipliers, widths, end, is_prediction)


def arrive(state: State, step: Step, until: Float[Array, ""]) -> Arrival:
    """The point at the end of a step.

    At a retry it is the start of the step; at a forced step a point shortly after.
    """
    left = until - state.t
    speed = jnp.linalg.norm(state.point.velocity)
    forced = FORCED_STEP * jnp.linalg.norm(state.point.w)
    forced = forced / jnp.where(speed > 0, speed, 1)
    retried = jnp.where(state.is_forced, jnp.minimum(forced / step.length, 1), 0)
    theta = jnp.where(state.is_retry, retried, step.event.theta)
    is_at_end = theta * step.length >= left * (1 - 1e-15)
    has_left = step.event.is_found & ~state.is_retry
    tables = state.tables
    zeros = jnp.zeros(tables.side.shape, left.dtype)
    multiplier_rate, width_rate = (
        state.sliding.pairs.scatter(zeros, rate / step.length, state.sliding.leads)
        for rate in step.rates
    )
    return Arrival(
        t=jnp.where(is_at_end, until, state.t + theta * step.length),
        path=step.path,
        theta=theta,
        step=step.length,
        pair=jnp.where(has_left, step.event.pair, tables.side.size),
        multiplier_rate=multiplier_rate,
        width_rate=width_rate,
    )


def _predict(state: State, step: Step) -> tuple[Path, Array, Array]:
    """Second-order path and linear multipliers, from the end of the last step."""
    h, point, rates = step.length, state.point, state.extrapolation
    rows = jnp.zeros((_NUM_POWERS - 2, point.w.size), point.w.dtype)
    taylor = jnp.stack([h * point.velocity, 0.5 * h**2 * rates.acceleration])
    times = jnp.asarray(_THETAS, h.dtype)[:, None] * h
    multipliers, widths = (
        now + times * state.sliding.pairs.gather(rate)
        for now, rate in (
            (state.sliding.multiplier, rates.multiplier_rate),
            (state.sliding.width, rates.width_rate),
        )
    )
    return Path(point.w, jnp.concatenate([taylor, rows])), multipliers, widths


def _interpolate(state: State, step: Step) -> tuple[Path, Array, Array]:
    """The Runge–Kutta step from its stages."""
    weights, stages = jnp.asarray(_WEIGHTS.T, step.length.dtype), step.stages
    path = Path(state.point.w, step.length * (weights @ stages.velocities))
    return path, stages.multipliers[_INTERPOLATED], stages.widths[_INTERPOLATED]


def _stop_at_event(
    system: System,
    state: State,
    step: Step,
    multipliers: Float[Array, "3 slots"],
    widths: Float[Array, "3 slots"],
    end: Float[Array, ""],
    is_prediction: Bool[Array, ""],
) -> Step:
    """The step up to its first event, or up to θ = `end`.

    Multipliers and widths are given at three points of the step.
    """
    path, tables, sliding = step.path, state.tables, state.sliding
    # Ambiguous pairs keep their sides until other pairs have an event. With all sliding
    # units raised such a pair might be on the other side, and cross with every step.
    is_ignored = tables.constrained | tables.ambiguous
    side = jnp.where(is_ignored, 0, tables.side)
    slopes, slides = system.slope(tables.base), tables.side == 0
    monitor = SideMonitor.create(system, slopes, side, slides, state.point.max_abs_z)
    # No less than what the search for the mode can tell from rounding.
    min_slack = _MIN_SLACK * jnp.max(jnp.abs(sliding.width), initial=0)
    slack = jnp.maximum(_EXIT_SLACK * sliding.width, min_slack)
    # Distances of the multipliers from both ends of their intervals.
    exits, rates = jax.vmap(
        lambda excess: find_first_exit(excess, _THETAS, slack, sliding.leads)
    )(jnp.stack([multipliers, widths - multipliers]))
    exit_ = jnp.min(exits)
    bracket, monitor = bracket_first_crossing(monitor, path, end)
    is_found = bracket.is_found & (bracket.low <= exit_)
    # Without a crossing to go to, the end is checked for pairs that the scan missed.
    stop = jnp.where(exit_ <= end, exit_, jnp.minimum(1, end))
    high = jnp.where(is_found, bracket.high, stop)
    bracket = bracket._replace(is_found=is_found, high=high)
    found = lax.cond(
        is_prediction,
        _guess_crossing,
        lambda bracket: locate_crossing(monitor, path, bracket),
        bracket,
    )
    is_exit = (exit_ <= end) & ~(found.is_found & (found.theta <= exit_))
    theta = jnp.where(is_exit, exit_, found.theta)
    shortened = jnp.maximum(theta, _MIN_SHORTENING) * step.length
    event = Crossing(
        theta=theta,
        pair=found.pair,
        is_found=found.is_found & ~is_exit,
        passes=step.event.passes + found.passes + BRACKET_PASSES,
    )
    return step._replace(
        length=jnp.where(is_prediction, shortened, step.length),
        event=event,
        rates=jnp.stack([rates[0], rates[0] + rates[1]]),
    )


def _guess_crossing(bracket: Bracket) -> Crossing:
    """What `locate_crossing` would find, from the scan alone."""
    guess = jnp.minimum(bracket.guess, bracket.high)
    theta = jnp.where(bracket.is_found, guess, bracket.high)
    return Crossing(theta, bracket.pair, bracket.is_found, jnp.asarray(0))
