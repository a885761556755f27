"""One step of the flow in a fixed mode: predict its end, take it, look for events.

The step is the classical Runge–Kutta method's. Its continuous extension has order 3
inside the step and order 4 at the end: so the step is first predicted, from forward
passes alone, to end where the next event is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._active_pairs import Slots
from .._system import System
from ._active_set import Way
from ._event_location import (
    BRACKET_PASSES,
    Bracket,
    Path,
    first_bracket,
    first_exit,
    locate,
    watch,
)
from ._resolve_event import Target

_STAGES = np.array([[0, 0, 0, 0], [0.5, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 1, 0]])
#: Stage i has the weight Σ_j _WEIGHTS[i, j] θ^(j+1) at θ.
_WEIGHTS = np.array(
    [[1, -1.5, 2 / 3], [0, 1, -2 / 3], [0, 1, -2 / 3], [0, -0.5, 2 / 3]]
)
STAGES = len(_STAGES)
_POWERS = _WEIGHTS.shape[1]
#: Stages from which multipliers are interpolated, and where in the step they are.
_SEEN, _AT = np.array([0, 2, 3]), np.array([0, 0.5, 1])
#: How far past its end a step may be followed to an event.
_BEYOND = 1.05
#: An exit is taken when the multiplier is this part of the width outside: the field is
#: continuous at an exit, so one taken late costs nothing, one taken early is no event.
_EXIT_SLACK = 1e-5
_LEAST_SLACK = 1e-9
#: How far the weights are taken, relative to their size, past a point whose mode is not
#: found: the kinks that meet there are then met one by one.
LEAP = 3e-8
#: A predicted event shortens a step to no less than this part.
_SHORTEST = 1e-3


class State(NamedTuple):
    """A point on the flow with its mode.

    - `base`: side of the base slope of every pair; `side`: 0 while it slides.
    - `held`: pairs at their kink that are not to be watched.
    - `multiplier`, `width`, `leads`, `slots`: of the sliding pairs.
    - `multiplier_rate`, `width_rate`: time derivatives at the end of the last step, as
        tables over pairs; `acceleration`: of w. For predictions only.
    - `step`: what the error control allows next.
    - `largest`: the scale of z.
    - `torn`: dormant pairs whose side depends on which of the sliders below opens first.
    - `near`, `dormant`: pairs with z = 0, and those of them that nothing reaches.
    - `choices`: the kind of event where the side is one of two that are possible.
    - `again`: the point has to be settled once more; `leaps`: a little further on, as no
        way on was found here.
    """

    t: Float[Array, ""]
    w: Float[Array, " weights"]
    loss: Float[Array, ""]
    velocity: Float[Array, " weights"]
    acceleration: Float[Array, " weights"]
    side: Int[Array, "samples kinks"]
    base: Int[Array, "samples kinks"]
    held: Bool[Array, "samples kinks"]
    slots: Slots
    leads: Bool[Array, " slots"]
    multiplier: Float[Array, " slots"]
    width: Float[Array, " slots"]
    multiplier_rate: Float[Array, "samples kinks"]
    width_rate: Float[Array, "samples kinks"]
    step: Float[Array, ""]
    largest: Float[Array, ""]
    torn: Bool[Array, "samples kinks"]
    near: Bool[Array, "samples kinks"]
    dormant: Bool[Array, "samples kinks"]
    choices: Int[Array, "samples kinks"]
    again: Bool[Array, ""]
    leaps: Bool[Array, ""]

    @property
    def way(self) -> Way:
        """How the flow goes on from here."""
        return Way(self.again, self.velocity, self.near, self.dormant, self.held)


class Pending(NamedTuple):
    """A point that a step has reached, before its mode is known.

    The point is at θ = `theta` on `path`, a step of length `step`; `pair` is the one
    that left its side there (none: the number of pairs).
    """

    t: Float[Array, ""]
    path: Path
    theta: Float[Array, ""]
    step: Float[Array, ""]
    pair: Int[Array, ""]
    multiplier_rate: Float[Array, "samples kinks"]
    width_rate: Float[Array, "samples kinks"]


class Ahead(NamedTuple):
    """A step in the making: how it goes on, up to which event.

    - `velocities`, `multipliers`, `widths`: of the Runge–Kutta stages.
    - `step`, and the event's `theta`, `pair`, whether it `has_left` its side.
    - `rates`: of multipliers and widths at the end, in units of the step.
    """

    path: Path
    velocities: Float[Array, "4 weights"]
    multipliers: Float[Array, "4 slots"]
    widths: Float[Array, "4 slots"]
    step: Float[Array, ""]
    theta: Float[Array, ""]
    pair: Int[Array, ""]
    has_left: Bool[Array, ""]
    rates: Float[Array, "2 slots"]
    passes: Int[Array, ""]


def stage_target(state: State, ahead: Ahead, number: Array, end: Array) -> Target:
    """Where the stage `number` wants the field; -1 wants it at the step's `end`."""
    stages = jnp.asarray(_STAGES, ahead.step.dtype)
    w = state.w + ahead.step * (stages[number] @ ahead.velocities)
    w = jnp.where(number < 0, end, w)
    was = jnp.where(state.slots.used, 0, -1).astype(jnp.int32)
    known = jnp.asarray(False)
    nothing = jnp.zeros_like(state.slots.used)
    wakes = state.slots.beside(state.dormant)
    return Target(
        w, state.side, state.base, state.slots, was, nothing, wakes,
        state.torn, state.near, state.dormant, known,
    )  # fmt: skip


def with_stage(
    ahead: Ahead, number: Array, velocity: Array, multiplier: Array, width: Array
) -> Ahead:
    """With the field at the stage `number`."""
    return ahead._replace(
        velocities=ahead.velocities.at[number].set(velocity),
        multipliers=ahead.multipliers.at[number].set(multiplier),
        widths=ahead.widths.at[number].set(width),
    )


def follow(
    system: System,
    state: State,
    ahead: Ahead,
    until: Float[Array, ""],
    predicts: Bool[Array, ""],
) -> Ahead:
    """Up to the first event, to time `until`, or one step on.

    Without its stages yet the step is predicted, to find how long it should be.
    """
    left = until - state.t
    step = jnp.where(predicts, jnp.minimum(state.step, left), ahead.step)
    ahead = ahead._replace(step=step)
    path, lams, betas = lax.cond(predicts, _predicted, _stepped, state, ahead)
    beyond = jnp.minimum(jnp.asarray(_BEYOND, left.dtype), left / step)
    end = jnp.where(predicts, 1, beyond)
    ahead = ahead._replace(path=path)
    return _followed(system, state, ahead, lams, betas, end, predicts)


def as_pending(state: State, ahead: Ahead, until: Float[Array, ""]) -> Pending:
    """The point at the end of a step, or at its start to be settled once more.

    Or, if that leaps, a little further on.
    """
    left = until - state.t
    speed = jnp.linalg.norm(state.velocity)
    far = LEAP * jnp.linalg.norm(state.w) / jnp.where(speed > 0, speed, 1)
    turning = jnp.where(state.leaps, jnp.minimum(far / ahead.step, 1), 0)
    theta = jnp.where(state.again, turning, ahead.theta)
    ends = theta * ahead.step >= left * (1 - 1e-15)
    zeros = jnp.zeros(state.side.shape, left.dtype)
    lam_rate, width_rate = (
        state.slots.scattered(zeros, rate / ahead.step, state.leads)
        for rate in ahead.rates
    )
    return Pending(
        t=jnp.where(ends, until, state.t + theta * ahead.step),
        path=ahead.path,
        theta=theta,
        step=ahead.step,
        pair=jnp.where(ahead.has_left & ~state.again, ahead.pair, state.side.size),
        multiplier_rate=lam_rate,
        width_rate=width_rate,
    )


def blank_path(w: Array) -> Path:
    return Path(w, jnp.zeros((_POWERS, w.size), w.dtype))


def blank_ahead(w: Array, room: int) -> Ahead:
    one = jnp.ones((), w.dtype)
    none = jnp.zeros((STAGES, room), w.dtype)
    return Ahead(
        path=blank_path(w),
        velocities=jnp.zeros((STAGES, w.size), w.dtype),
        multipliers=none,
        widths=none,
        step=one,
        theta=one,
        pair=jnp.asarray(0),
        has_left=jnp.asarray(False),
        rates=none[:2],
        passes=jnp.asarray(0),
    )


def _predicted(state: State, ahead: Ahead) -> tuple[Path, Array, Array]:
    """Second-order path and linear multipliers, from the end of the last step."""
    step = ahead.step
    rows = jnp.zeros((_POWERS - 2, state.w.size), state.w.dtype)
    taylor = jnp.stack([step * state.velocity, 0.5 * step**2 * state.acceleration])
    times = jnp.asarray(_AT, step.dtype)[:, None] * step
    lams, betas = (
        now + times * state.slots.gathered(rate)
        for now, rate in (
            (state.multiplier, state.multiplier_rate),
            (state.width, state.width_rate),
        )
    )
    return Path(state.w, jnp.concatenate([taylor, rows])), lams, betas


def _stepped(state: State, ahead: Ahead) -> tuple[Path, Array, Array]:
    """The Runge–Kutta step from its stages."""
    weights = jnp.asarray(_WEIGHTS.T, ahead.step.dtype)
    path = Path(state.w, ahead.step * (weights @ ahead.velocities))
    return path, ahead.multipliers[_SEEN], ahead.widths[_SEEN]


def _followed(
    system: System,
    state: State,
    ahead: Ahead,
    lams: Array,
    betas: Array,
    end: Array,
    predicts: Array,
) -> Ahead:
    """A path up to its first event, or to its end."""
    path = ahead.path
    slides = state.side == 0
    # A torn pair keeps its side until others have an event: lifted with all sliders it
    # might be on the other one, and cross to it with every step.
    side = jnp.where(state.held | state.torn, 0, state.side)
    slopes = system.slope(state.base)
    watched = watch(system, slopes, side, slides, state.largest)
    # Not less than what the search for the mode tells from rounding.
    least = _LEAST_SLACK * jnp.max(jnp.abs(state.width), initial=0)
    slack = jnp.maximum(_EXIT_SLACK * state.width, least)
    # Distances of the multipliers from both ends of their intervals.
    exits, rates = jax.vmap(lambda excess: first_exit(excess, _AT, slack, state.leads))(
        jnp.stack([lams, betas - lams])
    )
    exit_ = jnp.min(exits)
    bracket, watched = first_bracket(watched, path, end)
    found = bracket.found & (bracket.low <= exit_)
    # Without a crossing to go to, the end is checked for pairs that the scan missed.
    stop = jnp.where(exit_ <= end, exit_, jnp.minimum(1, end))
    high = jnp.where(found, bracket.high, stop)
    bracket = bracket._replace(found=found, high=high)
    theta, pair, found, passes = lax.cond(
        predicts, _guessed, lambda b: locate(watched, path, b), bracket
    )
    leaves = (exit_ <= end) & ~(found & (theta <= exit_))
    theta = jnp.where(leaves, exit_, theta)
    shorter = jnp.maximum(theta, _SHORTEST) * ahead.step
    return ahead._replace(
        step=jnp.where(predicts, shorter, ahead.step),
        theta=theta,
        pair=pair,
        has_left=found & ~leaves,
        rates=jnp.stack([rates[0], rates[0] + rates[1]]),
        passes=ahead.passes + passes + BRACKET_PASSES,
    )


def _guessed(bracket: Bracket) -> tuple[Array, Array, Array, Array]:
    """What `locate` would find, from the scan alone."""
    guess = jnp.minimum(bracket.guess, bracket.high)
    theta = jnp.where(bracket.found, guess, bracket.high)
    return theta, bracket.pair, bracket.found, jnp.asarray(0)
