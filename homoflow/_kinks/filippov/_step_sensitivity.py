"""The derivative of the flow over one step, and at the event that ends it.

ξ = ∂w/∂p is the derivative with a parameter (see `_saltation.py`). The Runge–Kutta steps
of ξ are as long as the flow's, or are parts of them where the error of ξ is too large.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._active_pairs import ActivePairs
from .._system import System
from ._active_set import LIFT
from ._saltation import (
    ParameterFamily,
    differentiate_event_time,
    differentiate_field,
    has_jump,
)
from ._state import State
from ._step import Arrival

#: Stages of the classical Runge–Kutta method, and its end.
_STAGES = np.array(
    [
        [0, 0, 0, 0, 0],
        [0.5, 0, 0, 0, 0],
        [0, 0.5, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [1 / 6, 1 / 3, 1 / 3, 1 / 6, 0],
    ]
)
_LAST = len(_STAGES) - 1
#: The local error is about this times step · ‖ξ̇ at the last stage − ξ̇ at the end‖.
_DEFECT_WEIGHT = 0.1
#: The largest number of parts into which a step is cut.
_MAX_PARTS = 2**14
#: |z| and |dz| up to this times the largest count as 0.
_MAX_ZERO, _MAX_ZERO_CHANGE = 1e-10, 1e-12


def exists_at_start(
    family: ParameterFamily, state: State, xi: Array
) -> Bool[Array, ""]:
    """Whether no pair that starts on its kink leaves it along the family."""
    offsets, base = jnp.zeros_like(family.system.low), state.tables.base
    z, dz = family.derivative(
        lambda system, w: system.preactivations(w, system.slope(base), offsets),
        state.point.w,
        xi,
    )
    is_zero = jnp.abs(z) <= _MAX_ZERO * state.point.max_abs_z
    moves = jnp.abs(dz) > _MAX_ZERO_CHANGE * jnp.max(jnp.abs(dz))
    return ~jnp.any(is_zero & moves)


def propagate(
    family: ParameterFamily,
    rtol: Array,
    old: State,
    arrival: Arrival,
    new: State,
    xi: Array,
) -> Float[Array, " weights"]:
    """ξ after the step from `old` to `new`, and after the event that ended it."""
    # An exit's multiplier counts from the side to which it leaves.
    base = jnp.where(old.tables.side == 0, new.tables.base, old.tables.base)
    mode = _OldMode(base, old.sliding.pairs)
    end = _integrate_step(family, rtol, old, mode, new.point.w, arrival.duration, xi)
    d_meeting, meets, parts = _differentiate_meeting(family, old, arrival, new, end)
    d_exit = _differentiate_exit_time(family, mode, old, new, end)
    d_time = jnp.where(jnp.any(meets), d_meeting, d_exit)
    velocity = new.point.velocity
    jumps = has_jump(end.velocity, velocity)
    after = end.xi + jnp.where(jumps, d_time, 0) * (end.velocity - velocity)
    # What changes at a retry has no event time of its own.
    exists = end.exists & ~(jumps & (parts | old.is_retry))
    return jnp.where(exists, after, jnp.nan)


class _OldMode(NamedTuple):
    """The base sides and the sliding pairs of the mode along a step."""

    base: Int[Array, "samples kinks"]
    pairs: ActivePairs


class _StepEnd(NamedTuple):
    """The end of a step, or of a part of it, before its event.

    `error` is that of ξ in units of what is allowed.
    """

    w: Float[Array, " weights"]
    xi: Float[Array, " weights"]
    velocity: Float[Array, " weights"]
    multiplier: Float[Array, " slots"]
    d_multiplier: Float[Array, " slots"]
    error: Float[Array, ""]
    exists: Bool[Array, ""]


def _integrate_step(
    family: ParameterFamily,
    rtol: Array,
    old: State,
    mode: _OldMode,
    w_end: Array,
    duration: Array,
    xi: Array,
) -> _StepEnd:
    """ξ over a step in the old mode, in as many parts as its error asks for."""
    blank = jnp.zeros_like(old.sliding.multiplier)
    start = _StepEnd(
        w=old.point.w,
        xi=xi,
        velocity=jnp.zeros_like(xi),
        multiplier=blank,
        d_multiplier=blank,
        error=jnp.zeros_like(duration),
        exists=jnp.asarray(True),
    )

    def integrate_in_parts(carry):
        parts, _ = carry
        length = duration / parts.astype(duration.dtype)

        def integrate_part(i, end: _StepEnd) -> _StepEnd:
            is_last = i == parts - 1
            return _integrate_part(family, rtol, mode, end, length, w_end, is_last)

        return 2 * parts, lax.fori_loop(0, parts, integrate_part, start)

    def is_too_coarse(carry):
        parts, end = carry
        return (parts == 1) | ((end.error > 1) & (parts <= _MAX_PARTS))

    _, end = lax.while_loop(is_too_coarse, integrate_in_parts, (jnp.asarray(1), start))
    return end._replace(exists=end.exists & (end.error <= 1))


def _integrate_part(
    family: ParameterFamily,
    rtol: Array,
    mode: _OldMode,
    at: _StepEnd,
    length: Array,
    w_end: Array,
    is_last: Bool[Array, ""],
) -> _StepEnd:
    """One Runge–Kutta step for w and ξ; the last part of a step ends at `w_end`."""
    weights = jnp.asarray(_STAGES, length.dtype)
    blank = jnp.zeros((len(_STAGES), at.w.size), length.dtype)

    def evaluate_stage(i, carry):
        velocities, changes, now = carry
        w = at.w + length * (weights[i] @ velocities)
        w = jnp.where(is_last & (i == _LAST), w_end, w)
        xi = now.xi + length * (weights[i] @ changes)
        along = differentiate_field(family, w, xi, *mode)
        is_end = (i == 0) | (i == _LAST)
        now = _StepEnd(
            w=w,
            xi=jnp.where(is_end, along.xi, now.xi),
            velocity=along.velocity,
            multiplier=along.multiplier,
            d_multiplier=along.d_multiplier,
            error=now.error,
            exists=now.exists & (along.exists | ~is_end),
        )
        velocities = velocities.at[i].set(along.velocity)
        return velocities, changes.at[i].set(along.d_velocity), now

    start = blank, blank, at
    _, changes, end = lax.fori_loop(0, len(_STAGES), evaluate_stage, start)
    defect = _DEFECT_WEIGHT * length * jnp.linalg.norm(changes[-2] - changes[-1])
    size = jnp.maximum(jnp.linalg.norm(at.xi), jnp.linalg.norm(end.xi))
    error = jnp.where(defect > 0, defect / (rtol * size), 0)
    return end._replace(error=jnp.maximum(at.error, error))


def _differentiate_meeting(
    family: ParameterFamily, old: State, arrival: Arrival, new: State, end: _StepEnd
) -> tuple[Float[Array, ""], Bool[Array, "samples kinks"], Bool[Array, ""]]:
    """dτ/dp of pairs that met their kinks, which ones, and whether they part."""
    side = old.tables.side
    index = jnp.arange(side.size).reshape(side.shape)
    turned = (side != 0) & (new.tables.side != side)
    meets = turned | ((index == arrival.pair) & (side != 0))
    meets &= ~_rest_on_kinks(family.system, old, end)
    w = new.point.w
    offsets = LIFT * (side == 0).astype(w.dtype)
    change, exists = differentiate_event_time(
        family, w, end.xi, end.velocity, old.tables.base, offsets, meets
    )
    return change, meets, ~exists


def _rest_on_kinks(
    system: System, old: State, end: _StepEnd
) -> Bool[Array, "samples kinks"]:
    """The pairs whose z was 0 all along the step, though they do not slide.

    Where a unit's weights are pinned at 0 by as many sliding pairs as it has inputs, all
    samples are on its kink. They turn when one of those leaves, and not by themselves.
    """

    def preactivations(w):
        slope = system.slope(old.tables.base)
        return system.preactivations(w, slope, jnp.zeros_like(system.low))

    z = preactivations(old.point.w)
    _, rate = jax.jvp(preactivations, (end.w,), (end.velocity,))
    is_at_kink = jnp.abs(z) <= _MAX_ZERO * jnp.max(jnp.abs(z))
    return is_at_kink & (jnp.abs(rate) <= _MAX_ZERO * jnp.max(jnp.abs(rate)))


def _differentiate_exit_time(
    family: ParameterFamily, mode: _OldMode, old: State, new: State, end: _StepEnd
) -> Float[Array, ""]:
    """dτ/dp of the exit that ended the step, from dλ + λ̇ dτ = 0.

    The field is continuous there, unless pairs that rested on their kinks turn with it.
    The exit is taken a little late: the velocity jumps by as little, and this accounts
    for it.
    """
    pairs = mode.pairs
    side = pairs.gather(new.tables.side)
    leaves = pairs.is_used & old.sliding.leads & (side != 0)
    still = family._replace(tangents=jax.tree.map(jnp.zeros_like, family.tangents))
    rate = lax.cond(
        jnp.any(leaves),
        lambda: differentiate_field(still, end.w, end.velocity, *mode).d_multiplier,
        lambda: jnp.zeros_like(end.multiplier),
    )
    late = jnp.where(rate != 0, end.multiplier, 0) / jnp.where(rate != 0, rate, 1)
    last = jnp.argmax(jnp.where(leaves, late, -jnp.inf))
    happens = leaves[last] & (late[last] > 0)
    rate = jnp.where(happens, rate[last], 1)
    return jnp.where(happens, -end.d_multiplier[last] / rate, 0)
