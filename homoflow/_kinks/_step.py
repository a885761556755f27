"""One step of the flow in a fixed mode: predict its end, take it, look for events.

The step is the classical Runge–Kutta method's. Its continuous extension has order 3
inside the step and order 4 at the end: so the step is first predicted, from forward
passes alone, to end where the next event is.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ._events import (
    BRACKET_PASSES,
    Bracket,
    Path,
    first_bracket,
    first_exit,
    locate,
    watch,
)
from ._field import evaluate, group, multipliers, velocity, widths
from ._settle import Counts
from ._system import Slots, System

_STAGES = np.array([[0, 0, 0, 0], [0.5, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 1, 0]])
#: Stage i has the weight Σ_j _WEIGHTS[i, j] θ^(j+1) at θ.
_WEIGHTS = np.array(
    [[1, -1.5, 2 / 3], [0, 1, -2 / 3], [0, 1, -2 / 3], [0, -0.5, 2 / 3]]
)
_POWERS = _WEIGHTS.shape[1]
#: Stages from which multipliers are interpolated, and where in the step they are.
_SEEN, _AT = np.array([0, 2, 3]), np.array([0, 0.5, 1])
#: How far past its end a step may be followed to an event.
_BEYOND = 1.05
#: An exit is taken when the multiplier is this part of the width outside: the field is
#: continuous at an exit, so one taken late costs nothing, one taken early is no event.
_EXIT_SLACK = 1e-5
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


class _Ahead(NamedTuple):
    """A path ahead, multipliers and widths of the sliders along it, and its end."""

    path: Path
    multipliers: Float[Array, "3 slots"]
    widths: Float[Array, "3 slots"]
    step: Float[Array, ""]
    theta: Float[Array, ""]
    pair: Int[Array, ""]
    has_left: Bool[Array, ""]
    rates: tuple[Array, Array]
    passes: Int[Array, ""]


def advance(
    system: System, state: State, until: Float[Array, ""], counts: Counts
) -> tuple[Pending, Counts]:
    """Step from `state` to the first event, to time `until`, or one step on."""
    left = until - state.t
    longest = jnp.minimum(state.step, left)

    def phase(number, ahead: _Ahead) -> _Ahead:
        """Predict in phase 0, step in phase 1; traced once for both."""
        predicts = number == 0
        path, lams, betas = lax.cond(
            predicts,
            lambda: _predicted(state, ahead.step),
            lambda: _stepped(system, state, ahead.step),
        )
        beyond = jnp.minimum(jnp.asarray(_BEYOND, left.dtype), left / ahead.step)
        end = jnp.where(predicts, 1, beyond)
        return _followed(system, state, path, lams, betas, ahead, end, predicts)

    last = lax.fori_loop(0, 2, phase, _blank(state, longest))
    counts = counts.plus(
        gradients=len(_AT),
        rows=len(_AT) * jnp.sum(state.slots.used),
        forward=last.passes,
    )
    ends = last.theta * last.step >= left * (1 - 1e-15)
    zeros = jnp.zeros_like(system.low)
    lam_rate, width_rate = (
        state.slots.scattered(zeros, rate / last.step, state.leads)
        for rate in last.rates
    )
    pending = Pending(
        t=jnp.where(ends, until, state.t + last.theta * last.step),
        path=last.path,
        theta=last.theta,
        step=last.step,
        pair=jnp.where(last.has_left, last.pair, state.side.size),
        multiplier_rate=lam_rate,
        width_rate=width_rate,
    )
    return pending, counts


def blank_path(w: Array) -> Path:
    return Path(w, jnp.zeros((_POWERS, w.size), w.dtype))


def _blank(state: State, step: Array) -> _Ahead:
    none = jnp.zeros_like(state.width)
    return _Ahead(
        path=blank_path(state.w),
        multipliers=jnp.zeros((len(_AT), none.size), none.dtype),
        widths=jnp.zeros((len(_AT), none.size), none.dtype),
        step=step,
        theta=jnp.ones_like(step),
        pair=jnp.asarray(0),
        has_left=jnp.asarray(False),
        rates=(none, none),
        passes=jnp.asarray(0),
    )


def _predicted(state: State, step: Array) -> tuple[Path, Array, Array]:
    """Second-order path and linear multipliers, from the end of the last step."""
    rows = jnp.zeros((_POWERS - 2, state.w.size), state.w.dtype)
    taylor = jnp.stack([step * state.velocity, 0.5 * step**2 * state.acceleration])
    ahead = jnp.asarray(_AT, step.dtype)[:, None] * step
    lams, betas = (
        now + ahead * state.slots.gathered(rate)
        for now, rate in (
            (state.multiplier, state.multiplier_rate),
            (state.width, state.width_rate),
        )
    )
    return Path(state.w, jnp.concatenate([taylor, rows])), lams, betas


def _stepped(system: System, state: State, step: Array) -> tuple[Path, Array, Array]:
    """The Runge–Kutta step at the state's slopes and sliding set."""
    stages = jnp.asarray(_STAGES, step.dtype)

    def stage(i, carry):
        velocities, lams, betas = carry
        w = state.w + step * (stages[i] @ velocities)
        v, lam, beta = _slide(system, state, w)
        return velocities.at[i].set(v), lams.at[i].set(lam), betas.at[i].set(beta)

    def first(values):
        return jnp.zeros((len(_STAGES), values.size), step.dtype).at[0].set(values)

    start = first(state.velocity), first(state.multiplier), first(state.width)
    velocities, lams, betas = lax.fori_loop(1, len(_STAGES), stage, start)
    weights = jnp.asarray(_WEIGHTS.T, step.dtype)
    path = Path(state.w, step * (weights @ velocities))
    return path, lams[_SEEN], betas[_SEEN]


def _slide(system: System, state: State, w: Array) -> tuple[Array, Array, Array]:
    """Velocity, multipliers and widths at w in the state's mode."""
    point = evaluate(system, w, state.base, state.slots)
    groups = group(point, state.slots.used)
    leads = state.slots.used & groups.leads
    lam, _ = multipliers(point, leads, jnp.zeros_like(state.width))
    width = widths(system, point, groups, lam, state.slots.used)
    return velocity(system, point, lam), lam, width


def _followed(
    system: System,
    state: State,
    path: Path,
    lams: Array,
    betas: Array,
    ahead: _Ahead,
    end: Array,
    predicts: Array,
) -> _Ahead:
    """A path up to its first event, or to its end."""
    slides = state.side == 0
    side = jnp.where(state.held, 0, state.side)
    slopes = system.slope(state.base)
    watched = watch(system, slopes, side, slides, state.largest)
    slack = _EXIT_SLACK * state.width
    exit_low, lam_rate = first_exit(lams, _AT, slack, state.leads)
    exit_high, gap_rate = first_exit(betas - lams, _AT, slack, state.leads)
    exit_ = jnp.minimum(jnp.min(exit_low), jnp.min(exit_high))
    bracket = first_bracket(watched, path, end)
    found = bracket.found & (bracket.low <= exit_)
    # Without a crossing to go to, the end is checked for pairs that the scan missed.
    stop = jnp.where(exit_ <= end, exit_, jnp.minimum(1, end))
    high = jnp.where(found, bracket.high, stop)
    bracket = bracket._replace(found=found, high=high)
    theta, pair, found, passes = lax.cond(
        predicts, _guessed, lambda b: locate(watched, path, b), bracket
    )
    exits = (exit_ <= end) & ~(found & (theta <= exit_))
    theta = jnp.where(exits, exit_, theta)
    shorter = jnp.maximum(theta, _SHORTEST) * ahead.step
    return _Ahead(
        path=path,
        multipliers=lams,
        widths=betas,
        step=jnp.where(predicts, shorter, ahead.step),
        theta=theta,
        pair=pair,
        has_left=found & ~exits,
        rates=(lam_rate, lam_rate + gap_rate),
        passes=ahead.passes + passes + BRACKET_PASSES,
    )


def _guessed(bracket: Bracket) -> tuple[Array, Array, Array, Array]:
    """What `locate` would find, from the scan alone."""
    guess = jnp.minimum(bracket.guess, bracket.high)
    theta = jnp.where(bracket.found, guess, bracket.high)
    return theta, bracket.pair, bracket.found, jnp.asarray(0)
