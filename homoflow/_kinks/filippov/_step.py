"""One step of the flow in a fixed mode: predict its end, take it, look for events.

The step is that of the classical Runge–Kutta method. Its continuous extension has order 3
inside the step and order 4 at the end. So the step is predicted first, from forward
passes alone, and then taken with a length that ends it near the next event.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..._jax._arrays import unit_if_tiny
from .._system import System
from ._event_location import (
    BRACKET_PASSES,
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
#: The forward passes of a prediction.
PREDICTION_PASSES = len(_THETAS)
#: A predicted event shortens a step to no less than this part.
_MIN_SHORTENING = 1e-3


class Arrival(NamedTuple):
    """The point that a step has reached, before its event is resolved.

    - The point is at θ = `theta` on `path`, a step of length `step`.
    - `pair`: the pair that left its side there; the number of pairs if none did.
    - `multiplier_rate`, `width_rate`: time derivatives there, of the pairs that slid.
    """

    t: Float[Array, ""]
    path: Path
    theta: Float[Array, ""]
    step: Float[Array, ""]
    pair: Int[Array, ""]
    multiplier_rate: Float[Array, " slots"]
    width_rate: Float[Array, " slots"]

    @staticmethod
    def start(state: State) -> "Arrival":
        """At the start of the flow, as if a step had led there."""
        one, rates = jnp.ones_like(state.t), state.extrapolation
        return Arrival(
            t=state.t,
            path=Path(state.point.w, _no_powers(state.point.w)),
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


def _no_powers(w: Array) -> Float[Array, "powers weights"]:
    return jnp.zeros((_NUM_POWERS, w.size), w.dtype)


class Stages(NamedTuple):
    """The field at the stages of a Runge–Kutta step."""

    velocities: Float[Array, "4 weights"]
    multipliers: Float[Array, "4 slots"]
    widths: Float[Array, "4 slots"]

    @staticmethod
    def first(state: State) -> "Stages":
        """With the first one, which is the field at the state."""
        sliding, later = state.sliding, ((0, NUM_STAGES - 1), (0, 0))
        values = state.point.velocity, sliding.multiplier, sliding.width
        return Stages(*(jnp.pad(value[None], later) for value in values))

    def insert(
        self, number: Int[Array, ""], velocity: Array, multiplier: Array, width: Array
    ) -> "Stages":
        """With the field at the stage `number`, if there is one."""
        return Stages(
            self.velocities.at[number].set(velocity),
            self.multipliers.at[number].set(multiplier),
            self.widths.at[number].set(width),
        )


class Step(NamedTuple):
    """A step whose stages are known, and the first event on it.

    - `length`: in time.
    - `event`: where it ends; a `pair` leaves its side there if `is_found`.
    - `rates`: derivatives of multipliers and widths with θ at the end.
    """

    path: Path
    length: Float[Array, ""]
    event: Crossing
    rates: Float[Array, "2 slots"]


def stage_of_step(
    state: State, stages: Stages, length: Float[Array, ""], number: Int[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, " weights"]]:
    """The time and the weights of a stage of the step from a state."""
    shares = jnp.asarray(_STAGES, length.dtype)[number]
    w = state.point.w + length * (shares @ stages.velocities)
    return state.t + length * jnp.sum(shares), w


def predict_length(
    system: System, state: State, until: Float[Array, ""]
) -> Float[Array, ""]:
    """How long the next step should be to end near its first event.

    From a path of second order, on which z and multipliers are interpolated by parabolas.
    """
    point, rates = state.point, state.extrapolation
    h = jnp.minimum(state.step, until - state.t)
    path = Path(
        point.w, jnp.stack([h * point.velocity, 0.5 * h**2 * rates.acceleration])
    )
    thetas = jnp.asarray(_THETAS, h.dtype)
    monitor = _monitor(system, state)
    distances = jax.vmap(lambda theta: monitor.distances(path(theta)))(thetas)
    slack = jnp.maximum(-distances[0], 0) + monitor.noise
    times = thetas[:, None] * h
    multipliers = state.sliding.multiplier + times * rates.multiplier_rate
    widths = state.sliding.width + times * rates.width_rate
    exits, _ = _find_exits(state, multipliers, widths)
    first = jnp.minimum(_first_root(*(distances + slack)), jnp.min(exits))
    return jnp.clip(first, _MIN_SHORTENING, 1) * h


def _first_root(
    start: Float[Array, " pairs"],
    middle: Float[Array, " pairs"],
    end: Float[Array, " pairs"],
) -> Float[Array, ""]:
    """The least positive θ at which a parabola through three points falls below 0.

    All start above 0. The inverse of the root costs one division, and no pair a branch.
    """
    bend = 2 * (start - 2 * middle + end)
    slope = end - start - bend
    discriminant = slope**2 - 4 * bend * start
    inverse = (jnp.sqrt(jnp.maximum(discriminant, 0)) - slope) / (2 * start)
    fastest = jnp.max(jnp.where(discriminant >= 0, inverse, 0))
    return jnp.where(fastest > 0, 1 / jnp.where(fastest > 0, fastest, 1), jnp.inf)


def take_step(
    system: System,
    state: State,
    stages: Stages,
    length: Float[Array, ""],
    until: Float[Array, ""],
) -> Step:
    """The step with these stages up to the first event, to time `until`, or to its end."""
    weights = jnp.asarray(_WEIGHTS.T, length.dtype)
    path = Path(state.point.w, length * (weights @ stages.velocities))
    end = jnp.minimum(
        jnp.asarray(_MAX_EXTRAPOLATION, length.dtype), (until - state.t) / length
    )
    exits, rates = _find_exits(
        state, stages.multipliers[_INTERPOLATED], stages.widths[_INTERPOLATED]
    )
    exit_ = jnp.min(exits)
    bracket, monitor = bracket_first_crossing(_monitor(system, state), path, end)
    is_found = bracket.is_found & (bracket.low <= exit_)
    # Without a crossing to go to, the end is checked for pairs that the scan missed.
    stop = jnp.where(exit_ <= end, exit_, jnp.minimum(1, end))
    high = jnp.where(is_found, bracket.high, stop)
    found = locate_crossing(
        monitor, path, bracket._replace(is_found=is_found, high=high)
    )
    is_exit = (exit_ <= end) & ~(found.is_found & (found.theta <= exit_))
    event = Crossing(
        theta=jnp.where(is_exit, exit_, found.theta),
        pair=found.pair,
        is_found=found.is_found & ~is_exit,
        passes=found.passes + BRACKET_PASSES,
    )
    return Step(path, length, event, jnp.stack([rates[0], rates[0] + rates[1]]))


def _monitor(system: System, state: State) -> SideMonitor:
    """What tells whether pairs leave their sides on a step from a state."""
    tables = state.tables
    # Ambiguous pairs keep their sides until other pairs have an event. With all sliding
    # units raised such a pair might be on the other side, and cross with every step.
    is_ignored = tables.constrained | tables.ambiguous
    side = jnp.where(is_ignored, 0, tables.side)
    slopes, slides = system.slope(tables.base), tables.side == 0
    return SideMonitor.create(system, slopes, side, slides, state.point.max_abs_z)


def _find_exits(
    state: State,
    multipliers: Float[Array, "3 slots"],
    widths: Float[Array, "3 slots"],
) -> tuple[Float[Array, "2 slots"], Float[Array, "2 slots"]]:
    """Where multipliers leave their intervals, below and above, and rates at θ = 1.

    Multipliers and widths are given at three points of a step. The rates are those of
    the distances from both ends.
    """
    sliding = state.sliding
    # No less than what the search for the mode can tell from rounding.
    min_slack = _MIN_SLACK * jnp.max(jnp.abs(sliding.width), initial=0)
    slack = jnp.maximum(_EXIT_SLACK * sliding.width, min_slack)
    return jax.vmap(
        lambda excess: find_first_exit(excess, _THETAS, slack, sliding.leads)
    )(jnp.stack([multipliers, widths - multipliers]))


def arrive(state: State, step: Step, until: Float[Array, ""]) -> Arrival:
    """The point at the end of a step.

    At a retry it is the start of the step; at a forced step a point shortly after.
    """
    left = until - state.t
    unit = unit_if_tiny(state.point.w)
    speed = jnp.linalg.norm(state.point.velocity / unit)
    forced = FORCED_STEP * jnp.linalg.norm(state.point.w / unit)
    forced = forced / jnp.where(speed > 0, speed, 1)
    retried = jnp.where(state.is_forced, jnp.minimum(forced / step.length, 1), 0)
    theta = jnp.where(state.is_retry, retried, step.event.theta)
    is_at_end = theta * step.length >= left * (1 - 1e-15)
    has_left = step.event.is_found & ~state.is_retry
    rates = jnp.where(state.sliding.leads, step.rates / step.length, 0)
    return Arrival(
        t=jnp.where(is_at_end, until, state.t + theta * step.length),
        path=step.path,
        theta=theta,
        step=step.length,
        pair=jnp.where(has_left, step.event.pair, state.tables.side.size),
        multiplier_rate=rates[0],
        width_rate=rates[1],
    )
