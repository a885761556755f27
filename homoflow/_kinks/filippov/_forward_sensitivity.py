"""The exact flow with its forward-mode derivative.

The derivative ξ = ∂w/∂p (see `_saltation.py`) is carried along the steps that the flow
takes anyway: steps, events and modes are the flow's own. The Runge–Kutta steps of ξ are
as long as the flow's, or are parts of them where the error of ξ is too large.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..._jax._forward_mode_only import differentiated_once, forward_only
from .._active_pairs import ActivePairs
from .._system import System
from ._active_set import LIFT
from ._loop import Carry, Loop, make_loop
from ._progress import Goal, Solution
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

Record = Callable[[Any, Array, Array, Array], Any]


def integrate(
    system: System,
    given: PyTree,
    w0: Float[Array, " weights"],
    t1: Float[Array, ""],
    ts: Float[Array, " times"],
    record: Record,
    *,
    rtol: Float[Array, ""],
    capacity: int,
    max_steps: int,
    log_capacity: int,
    meter: dfx.AbstractProgressMeter,
) -> Solution:
    """Follow the flow from `w0` to `t1`, with steps that end on the times `ts`.

    `record(given, w, loss, velocity)` is recorded at those times. `capacity` bounds how
    many pairs may be at their kinks at one time; `max_steps` counts accepted and rejected
    steps. The first `log_capacity` events are kept. The `meter` shows how far it has got,
    unless derivatives are taken.

    It has first-order forward-mode derivatives with respect to all floating-point
    arguments but `rtol`. They are NaN where they do not exist; reverse mode is an error.
    """
    arrays, static = eqx.partition((system, given), eqx.is_inexact_array)
    setting = _Setting(static, record, max_steps, capacity, log_capacity)

    @jax.custom_jvp
    def solve(arrays, w0, t1, ts, rtol):
        return _run(setting.make_loop(arrays, w0, t1, ts, rtol), t1, meter)

    @solve.defjvp
    def solve_with_derivative(primals, tangents):
        return _run_with_derivative(setting, differentiated_once(primals), tangents)

    return solve(arrays, w0, t1, ts, rtol)


class _Setting(NamedTuple):
    """What does not change along a family: `static` is the rest of system and given."""

    static: PyTree
    record: Record
    max_steps: int
    capacity: int
    log_capacity: int

    def make_loop(
        self, arrays: PyTree, w0: Array, t1: Array, ts: Array, rtol: Array
    ) -> Loop:
        system, given = eqx.combine(arrays, self.static)
        return make_loop(
            system,
            w0,
            Goal(t1, ts, rtol, self.max_steps),
            lambda w, loss, velocity: self.record(given, w, loss, velocity),
            capacity=self.capacity,
            log_capacity=self.log_capacity,
        )


def _run(loop: Loop, t1: Array, meter: dfx.AbstractProgressMeter) -> Solution:
    def advance(carry):
        run, bar = carry
        run = loop.advance(run)
        reached = (run.progress.state.t / t1).astype(jnp.float32)
        return run, meter.step(bar, reached)

    # With t1 = 0 not even the start is recorded: the problem is not to be solved.
    last, bar = lax.while_loop(
        lambda carry: loop.goes_on(carry[0]), advance, (loop.start, meter.init())
    )
    meter.close(bar)
    return loop.solution(last)


def _run_with_derivative(
    setting: _Setting, primals: tuple, tangents: tuple
) -> tuple[Solution, Solution]:
    arrays, w0, t1, _, rtol = primals
    d_arrays, dw0, dt1, dts, _ = tangents
    static_system, static_given = setting.static
    family = ParameterFamily(arrays[0], d_arrays[0], static_system)

    def differentiate_record(dt, state: State, xi):
        """The record's derivative, where its time has the derivative `dt`."""
        point = state.point
        along = differentiate_field(
            family,
            point.w,
            xi + point.velocity * dt,
            state.tables.base,
            state.sliding.pairs,
        )
        return jax.jvp(
            lambda given, *seen: setting.record(
                eqx.combine(given, static_given), *seen
            ),
            (arrays[1], point.w, point.loss, point.velocity),
            (d_arrays[1], along.xi, along.d_loss, along.d_velocity),
        )[1]

    loop = _DerivativeLoop(
        setting.make_loop(*primals), family, rtol, dts, differentiate_record
    )
    last = lax.while_loop(
        lambda c: loop.flow.goes_on(c.run), loop.advance, loop.start(w0, dw0)
    )
    return loop.solution(last, t1, dt1)


class _Carry(NamedTuple):
    """The flow's carry, ξ at its time, and the derivatives of its records."""

    run: Carry
    xi: Float[Array, " weights"]
    records: PyTree


class _DerivativeLoop(NamedTuple):
    """The loop of the flow, with the derivative beside it."""

    flow: Loop
    family: ParameterFamily
    rtol: Float[Array, ""]
    dts: Float[Array, " times"]
    differentiate_record: Callable[[Array, State, Array], PyTree]

    def start(self, w0: Array, dw0: Array) -> _Carry:
        run = self.flow.start
        exists = _exists_at_start(self.family, run.progress.state, dw0)
        shapes = jax.eval_shape(self.flow.solution, run).records
        records = jax.tree.map(lambda s: jnp.full(s.shape, jnp.nan, s.dtype), shapes)
        return _Carry(run, jnp.where(exists, dw0, jnp.nan), records)

    def advance(self, c: _Carry) -> _Carry:
        run = self.flow.advance(c.run)
        old, new = c.run.progress, run.progress
        xi = lax.cond(
            new.is_accepted & ~old.steps.is_start,
            lambda: _propagate(
                self.family, self.rtol, old.state, c.run.arrival, new.state, c.xi
            ),
            lambda: c.xi,
        )

        def insert_record():
            dt = self.dts[old.num_recorded]
            values = self.differentiate_record(dt, new.state, xi)
            return jax.tree.map(
                lambda table, value: table.at[old.num_recorded].set(value),
                c.records,
                values,
            )

        records = lax.cond(new.is_due, insert_record, lambda: c.records)
        return _Carry(run, xi, records)

    def solution(self, c: _Carry, t1: Array, dt1: Array) -> tuple[Solution, Solution]:
        solution, progress = self.flow.solution(c.run), c.run.progress
        state = progress.state
        is_finished = (state.t >= t1) & ~progress.steps.is_start
        no_change = jax.tree.map(_zero_tangent, solution)
        dw = jnp.where(is_finished, c.xi + state.point.velocity * dt1, jnp.nan)
        # Event times do move, but by how much is not recorded: NaN, not 0.
        log = jax.tree.map(_unknown_tangent, solution.log)
        change = no_change._replace(w=dw, t=dt1, records=c.records, log=log)
        return solution, forward_only(change)


def _zero_tangent(a: Array) -> Any:
    if jnp.issubdtype(a.dtype, jnp.inexact):
        return jnp.zeros_like(a)
    return np.zeros(a.shape, jax.dtypes.float0)


def _unknown_tangent(a: Array) -> Any:
    tangent = _zero_tangent(a)
    return tangent if tangent.dtype == jax.dtypes.float0 else tangent * jnp.nan


def _exists_at_start(
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


def _propagate(
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
    d_exit = _differentiate_exit_time(old, arrival, new, end)
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
    w = new.point.w
    offsets = LIFT * (side == 0).astype(w.dtype)
    change, exists = differentiate_event_time(
        family, w, end.xi, end.velocity, old.tables.base, offsets, meets
    )
    return change, meets, ~exists


def _differentiate_exit_time(
    old: State, arrival: Arrival, new: State, end: _StepEnd
) -> Float[Array, ""]:
    """dτ/dp of the exit that ended the step, from dλ + λ̇ dτ = 0.

    The field is continuous there, but the exit is taken a little late. The velocity jumps
    by as little, and this accounts for it.
    """
    pairs = old.sliding.pairs
    side = pairs.gather(new.tables.side)
    leaves = pairs.is_used & old.sliding.leads & (side != 0)
    rate = pairs.gather(arrival.multiplier_rate)
    width_rate = pairs.gather(arrival.width_rate)
    rate = jnp.where(side > 0, rate - width_rate, rate)
    late = jnp.where(rate != 0, end.multiplier, 0) / jnp.where(rate != 0, rate, 1)
    last = jnp.argmax(jnp.where(leaves, late, -jnp.inf))
    happens = leaves[last] & (late[last] > 0)
    rate = jnp.where(happens, rate[last], 1)
    return jnp.where(happens, -end.d_multiplier[last] / rate, 0)
