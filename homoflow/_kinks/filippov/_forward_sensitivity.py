"""The exact flow with its forward-mode derivative.

The derivative ξ = ∂w/∂p (see `_saltation.py`) is carried along the steps that the flow
takes anyway: steps, events and modes are the flow's own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from ..._jax._forward_mode_only import forbid_reverse_mode, forbid_second_derivatives
from ..._jax._vmap_as_loop import vmap_as_loop_on_cpu
from .._system import System
from ._loop import Carry, Loop, make_loop
from ._progress import Goal, Solution, Tolerances
from ._saltation import (
    ParameterFamily,
    differentiate_field,
)
from ._state import State
from ._step_sensitivity import exists_at_start, propagate

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
    atol: Float[Array, ""],
    capacity: int,
    max_steps: Int[Array, ""],
    log_capacity: int,
    meter: dfx.AbstractProgressMeter,
) -> Solution:
    """Follow the flow from `w0` to `t1`, with steps that end on the times `ts`.

    `record(given, w, loss, velocity)` is recorded at those times. A step may err by
    `rtol`·‖w‖ + `atol`. `capacity` bounds how many pairs may be at their kinks at one
    time; `max_steps` counts accepted and rejected steps. The first `log_capacity` events
    are kept. The `meter` shows how far it has got, unless derivatives are taken.

    It has first-order forward-mode derivatives with respect to all floating-point
    arguments but the tolerances. They are NaN where they do not exist; reverse mode is an
    error.
    """
    arrays, rest = eqx.partition((system, given), eqx.is_inexact_array)
    others, static = eqx.partition(rest, eqx.is_array)
    # A new bound compiles nothing again.
    others = others, max_steps
    setting = _Setting(static, record, capacity, log_capacity)

    @vmap_as_loop_on_cpu
    def run(others, primals):
        t1 = primals[2]
        return _run(setting.make_loop(others, *primals), t1, meter)

    # All arrays are arguments: its rule is applied when the trace that it was made in has
    # ended.
    @jax.custom_jvp
    def solve(others, primals):
        return run(others, primals)

    @solve.defjvp
    def _(given, changes):
        if system.descent is not None:
            raise NotImplementedError(
                "The exact flow has no derivatives in logarithmic time: differentiate "
                "`homoflow.flow` with a finite `t1` below 1e8."
            )
        others, primals = given[0], forbid_second_derivatives(given[1])
        tangents = changes[1]
        # Not one after the other: all directions of a Jacobian follow one flow.
        solution, change = _run_with_derivative(setting, others, primals, tangents)
        return solution, forbid_reverse_mode(change.as_tangent(solution))

    return solve(others, (arrays, w0, t1, ts, Tolerances(rtol, atol)))


class _Setting(NamedTuple):
    """What is the same for all of a batch: `static` is the rest of system and given."""

    static: PyTree
    record: Record
    capacity: int
    log_capacity: int

    def make_loop(
        self,
        others: PyTree,
        arrays: PyTree,
        w0: Array,
        t1: Array,
        ts: Array,
        tolerances: Tolerances,
    ) -> Loop:
        numbers, max_steps = others
        system, given = eqx.combine(arrays, numbers, self.static)
        return make_loop(
            system,
            w0,
            Goal(t1, ts, tolerances, max_steps),
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
    setting: _Setting, others: PyTree, primals: tuple, tangents: tuple
) -> tuple[Solution, "_Change"]:
    arrays, w0, t1, _, tolerances = primals
    d_arrays, dw0, dt1, dts, _ = tangents
    static_system, static_given = eqx.combine(others[0], setting.static)
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
        setting.make_loop(others, *primals),
        family,
        tolerances.rtol,
        dts,
        differentiate_record,
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
        exists = exists_at_start(self.family, run.progress.state, dw0)
        shapes = jax.eval_shape(self.flow.solution, run).records
        records = jax.tree.map(lambda s: jnp.full(s.shape, jnp.nan, s.dtype), shapes)
        return _Carry(run, jnp.where(exists, dw0, jnp.nan), records)

    def advance(self, c: _Carry) -> _Carry:
        run = self.flow.advance(c.run)
        old, new = c.run.progress, run.progress
        xi = lax.cond(
            new.is_accepted & ~old.steps.is_start,
            lambda: propagate(
                self.family, self.rtol, old.state, run.arrival, new.state, c.xi
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

    def solution(self, c: _Carry, t1: Array, dt1: Array) -> "tuple[Solution, _Change]":
        solution, progress = self.flow.solution(c.run), c.run.progress
        state = progress.state
        is_finished = (state.t >= t1) & ~progress.steps.is_start
        dw = jnp.where(is_finished, c.xi + state.point.velocity * dt1, jnp.nan)
        return solution, _Change(dw, dt1, c.records)


class _Change(NamedTuple):
    """Derivatives of the end, of its time, and of what was recorded."""

    w: Float[Array, " weights"]
    t: Float[Array, ""]
    records: PyTree

    def as_tangent(self, solution: Solution) -> Solution:
        no_change = jax.tree.map(_zero_tangent, solution)
        # Event times do move, but by how much is not recorded: NaN, not 0.
        log = jax.tree.map(_unknown_tangent, solution.log)
        return no_change._replace(w=self.w, t=self.t, records=self.records, log=log)


def _zero_tangent(a: Array) -> Any:
    if jnp.issubdtype(a.dtype, jnp.inexact):
        return jnp.zeros_like(a)
    return np.zeros(a.shape, jax.dtypes.float0)


def _unknown_tangent(a: Array) -> Any:
    tangent = _zero_tangent(a)
    return tangent if tangent.dtype == jax.dtypes.float0 else tangent * jnp.nan
