"""The exact flow with its forward-mode derivative.

The derivative is carried along the steps that the flow takes anyway: what is discrete
(steps, events, modes) is the flow's own, and event times move by their own rule. The
Runge–Kutta steps of the derivative are as long as the flow's, or a part of them where
its error asks for it.
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

from ..._jax._forward_mode_only import forbid_reverse_mode, forbid_second_derivatives
from .._system import System
from ._active_set import LIFT
from ._loop import Carry, Loop, Solution, loop
from ._saltation import Family, event_time_change, is_jump, vary
from ._step import Pending, State

#: The classical method's stages, then its end.
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
#: The local error is about this times step · |the last stage's derivative − the end's|.
_DEFECT_WEIGHT = 0.1
#: Most parts that a step is cut into.
_MOST_PARTS = 2**14
#: |z| and |dz| up to this times the largest count as 0.
_ON_KINK, _RESTS = 1e-10, 1e-12

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
    room: int,
    max_steps: int,
    events: int,
    meter: dfx.AbstractProgressMeter,
) -> Solution:
    """Follow the flow from `w0` to `t1`, with steps that end on the times `ts`.

    `record(given, w, loss, velocity)` is what is kept at those times. `room` bounds how
    many pairs may be at their kinks at one time, `max_steps` counts accepted and
    rejected steps. The first `events` events are kept. The `meter` shows how far it has
    got, unless derivatives are taken.

    It has forward-mode derivatives of first order with respect to everything that
    moves, but for `rtol`; NaN where they do not exist, an error in reverse mode.
    """
    moving, fixed = eqx.partition((system, given), eqx.is_inexact_array)

    def prepared(moving, w0, t1, ts, rtol) -> Loop:
        system, given = eqx.combine(moving, fixed)

        def kept(w, loss, velocity):
            return record(given, w, loss, velocity)

        return loop(
            system, w0, t1, ts, kept,
            rtol=rtol, room=room, max_steps=max_steps, events=events,
        )  # fmt: skip

    @jax.custom_jvp
    def solve(*arguments):
        steps, t1 = prepared(*arguments), arguments[2]

        def one(carry):
            run, bar = carry
            run = steps.one(run)
            reached = (run.progress.state.t / t1).astype(jnp.float32)
            return run, meter.step(bar, reached)

        # No time, no start: nothing is recorded of a problem that is not to be solved.
        last, bar = lax.while_loop(
            lambda carry: steps.running(carry[0]), one, (steps.start, meter.init())
        )
        meter.close(bar)
        return steps.solution(last)

    @solve.defjvp
    def solve_with_derivative(primals, tangents):
        moving, w0, t1, _, rtol = primals = forbid_second_derivatives(primals)
        change, dw0, dt1, dts, _ = tangents
        family = Family(moving[0], change[0], fixed[0])

        def recorded(due, state, xi):
            """The record's derivative, where its time has the derivative `due`."""
            dw = xi + state.velocity * due
            along = vary(family, state.w, dw, state.base, state.slots)
            return jax.jvp(
                lambda given, *seen: record(eqx.combine(given, fixed[1]), *seen),
                (moving[1], state.w, state.loss, state.velocity),
                (change[1], along.xi, along.d_loss, along.d_velocity),
            )[1]

        derivative = _Derivative(prepared(*primals), family, rtol, dts, recorded)
        start = derivative.start(w0, dw0)
        last = lax.while_loop(
            lambda c: derivative.steps.running(c.run), derivative.one, start
        )
        return derivative.solution(last, t1, dt1)

    return solve(moving, w0, t1, ts, rtol)


class _Carry(NamedTuple):
    """The flow's carry, ξ at its time, and the derivatives of its records."""

    run: Carry
    xi: Float[Array, " weights"]
    records: PyTree


class _Derivative(NamedTuple):
    steps: Loop
    family: Family
    rtol: Float[Array, ""]
    dts: Float[Array, " times"]
    recorded: Callable[[Array, State, Array], PyTree]

    def start(self, w0: Array, dw0: Array) -> _Carry:
        run = self.steps.start
        exists = _exists_at_start(self.family, run.progress.state, dw0)
        shapes = jax.eval_shape(self.steps.solution, run).records
        never = jax.tree.map(lambda s: jnp.full(s.shape, jnp.nan, s.dtype), shapes)
        return _Carry(run, jnp.where(exists, dw0, jnp.nan), never)

    def one(self, c: _Carry) -> _Carry:
        run = self.steps.one(c.run)
        old, new = c.run.progress, run.progress
        xi = lax.cond(
            new.accepted & (old.steps >= 0),
            lambda: _moved(
                self.family, self.rtol, old.state, c.run.pending, new.state, c.xi
            ),
            lambda: c.xi,
        )

        def with_record():
            due = self.dts[old.recorded]
            values = self.recorded(due, new.state, xi)
            return jax.tree.map(
                lambda kept, value: kept.at[old.recorded].set(value), c.records, values
            )

        records = lax.cond(new.due, with_record, lambda: c.records)
        return _Carry(run, xi, records)

    def solution(self, c: _Carry, t1: Array, dt1: Array) -> tuple[Solution, Solution]:
        solution, state = self.steps.solution(c.run), c.run.progress.state
        finished = (state.t >= t1) & (c.run.progress.steps >= 0)
        no_change = jax.tree.map(_no_change, solution)
        dw = jnp.where(finished, c.xi + state.velocity * dt1, jnp.nan)
        # Event times do move, and by how much is not kept: NaN, not 0.
        log = jax.tree.map(_unknown_change, solution.log)
        change = no_change._replace(w=dw, t=dt1, records=c.records, log=log)
        return solution, forbid_reverse_mode(change)


def _no_change(a: Array) -> Any:
    if jnp.issubdtype(a.dtype, jnp.inexact):
        return jnp.zeros_like(a)
    return np.zeros(a.shape, jax.dtypes.float0)


def _unknown_change(a: Array) -> Any:
    change = _no_change(a)
    return change if change.dtype == jax.dtypes.float0 else change * jnp.nan


def _exists_at_start(family: Family, state: State, xi: Array) -> Bool[Array, ""]:
    """Whether no pair that starts on its kink leaves it along the family."""
    still = jnp.zeros_like(family.system.low)
    z, dz = family.derivative(
        lambda system, w: system.preactivations(w, system.slope(state.base), still),
        state.w,
        xi,
    )
    near = jnp.abs(z) <= _ON_KINK * state.largest
    return ~jnp.any(near & (jnp.abs(dz) > _RESTS * jnp.max(jnp.abs(dz))))


def _moved(
    family: Family, rtol: Array, old: State, pending: Pending, new: State, xi: Array
) -> Float[Array, " weights"]:
    """ξ after the step from `old` to `new`, and after the event that ended it."""
    # An exit's multiplier counts from the side to which it leaves.
    base = jnp.where(old.side == 0, new.base, old.base)
    end = _stepped(family, rtol, old, base, new.w, pending.theta * pending.step, xi)
    d_meeting, meets, parts = _meeting(family, old, pending, new, end)
    d_exit = _exit_time_change(old, pending, new, end)
    d_time = jnp.where(jnp.any(meets), d_meeting, d_exit)
    jump = is_jump(end.velocity, new.velocity)
    after = end.xi + jnp.where(jump, d_time, 0) * (end.velocity - new.velocity)
    # What changes where a point is settled once more has no event time of its own.
    exists = end.exists & ~(jump & (parts | old.again))
    return jnp.where(exists, after, jnp.nan)


class _End(NamedTuple):
    """The end of a step, before its event."""

    w: Float[Array, " weights"]
    xi: Float[Array, " weights"]
    velocity: Float[Array, " weights"]
    multiplier: Float[Array, " slots"]
    d_multiplier: Float[Array, " slots"]
    error: Float[Array, ""]
    exists: Bool[Array, ""]


def _stepped(
    family: Family,
    rtol: Array,
    old: State,
    base: Int[Array, "samples kinks"],
    w_end: Array,
    step: Array,
    xi: Array,
) -> _End:
    """ξ over a step in the old mode, in as many parts as its error asks for."""
    blank = jnp.zeros_like(old.multiplier)
    start = _End(
        old.w, xi, jnp.zeros_like(xi), blank, blank, jnp.zeros_like(step),
        jnp.asarray(True),
    )  # fmt: skip

    def in_parts(carry):
        parts, _ = carry
        length = step / parts.astype(step.dtype)

        def one(i, end: _End) -> _End:
            return _part(family, rtol, old, base, end, length, w_end, i == parts - 1)

        return 2 * parts, lax.fori_loop(0, parts, one, start)

    def too_coarse(carry):
        parts, end = carry
        return (parts == 1) | ((end.error > 1) & (parts <= _MOST_PARTS))

    _, end = lax.while_loop(too_coarse, in_parts, (jnp.asarray(1), start))
    return end._replace(exists=end.exists & (end.error <= 1))


def _part(
    family: Family,
    rtol: Array,
    old: State,
    base: Int[Array, "samples kinks"],
    at: _End,
    length: Array,
    w_end: Array,
    is_last: Bool[Array, ""],
) -> _End:
    """One Runge–Kutta step for w and ξ; the last of a step ends at `w_end`."""
    stages = jnp.asarray(_STAGES, length.dtype)
    blank = jnp.zeros((len(_STAGES), at.w.size), length.dtype)

    def stage(i, carry):
        velocities, changes, now = carry
        w = at.w + length * (stages[i] @ velocities)
        w = jnp.where(is_last & (i == _LAST), w_end, w)
        along = vary(
            family, w, now.xi + length * (stages[i] @ changes), base, old.slots
        )
        ends = (i == 0) | (i == _LAST)
        now = _End(
            w=w,
            xi=jnp.where(ends, along.xi, now.xi),
            velocity=along.velocity,
            multiplier=along.multiplier,
            d_multiplier=along.d_multiplier,
            error=now.error,
            exists=now.exists & (along.exists | ~ends),
        )
        return (
            velocities.at[i].set(along.velocity),
            changes.at[i].set(along.d_velocity),
            now,
        )

    _, changes, end = lax.fori_loop(0, len(_STAGES), stage, (blank, blank, at))
    defect = _DEFECT_WEIGHT * length * jnp.linalg.norm(changes[-2] - changes[-1])
    size = jnp.maximum(jnp.linalg.norm(at.xi), jnp.linalg.norm(end.xi))
    error = jnp.where(defect > 0, defect / (rtol * size), 0)
    return end._replace(error=jnp.maximum(at.error, error))


def _meeting(
    family: Family, old: State, pending: Pending, new: State, end: _End
) -> tuple[Float[Array, ""], Bool[Array, "samples kinks"], Bool[Array, ""]]:
    """dτ/dp of pairs that met their kinks, which ones, and whether they part."""
    number = jnp.arange(old.side.size).reshape(old.side.shape)
    turned = (old.side != 0) & (new.side != old.side)
    meets = turned | ((number == pending.pair) & (old.side != 0))
    lift = LIFT * (old.side == 0).astype(new.w.dtype)
    change, together = event_time_change(
        family, new.w, end.xi, end.velocity, old.base, lift, meets
    )
    return change, meets, ~together


def _exit_time_change(
    old: State, pending: Pending, new: State, end: _End
) -> Float[Array, ""]:
    """dτ/dp of the exit that ended the step, from dλ + λ̇ dτ = 0.

    The field is continuous there, but the exit is taken a little late: the velocity
    jumps by as little, and this accounts for it.
    """
    state = old.slots.gathered(new.side)
    leaves = old.slots.used & old.leads & (state != 0)
    rate = old.slots.gathered(pending.multiplier_rate)
    width_rate = old.slots.gathered(pending.width_rate)
    rate = jnp.where(state > 0, rate - width_rate, rate)
    late = jnp.where(rate != 0, end.multiplier, 0) / jnp.where(rate != 0, rate, 1)
    last = jnp.argmax(jnp.where(leaves, late, -jnp.inf))
    happens = leaves[last] & (late[last] > 0)
    rate = jnp.where(happens, rate[last], 1)
    return jnp.where(happens, -end.d_multiplier[last] / rate, 0)
