"""The central flow, as a method."""

import dataclasses
from typing import Any, NamedTuple, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from ..._dynamics._central import Central, CentralState, Rates
from ..._dynamics.edge._edge import Motion
from ..._jax._compilation import fast_compile_jit
from ..._jax._precision import full_matmul_precision
from ..._jax._refuse_derivatives import refuse_derivatives
from ..._observe._assemble import make_trajectory
from ..._observe._base import Point
from ..._observe._recorder import Recorder, Values
from ..._observe._sharpness import random_vectors
from ..._observe._time_grid import (
    TimeGrid,
    input_error,
    is_nonfinite_at_start,
    time_reached,
)
from ..._problem._checks import check_tolerance
from ..._problem._problem import Problem
from ..._problem._smoothness import kinks_of
from ..._results._reason import REQUESTED, Reason
from ..._results._status import RESULTS
from ..._results._trajectory import Trajectory, with_facts
from .._base import AbstractMethod
from .._defaults import COARSER_RTOL
from .._diffrax import make_facts
from .._error_estimate import with_error_estimate, without_derivatives
from .._float64 import solve_in_float64, why_not_in_float64
from .._projection_choice import ProjectionPlan
from .._task import Task
from ._setting import Setting
from ._walk import State, Walk
from ._walker import Walker

#: The tolerance of a step's error by default.
EDGE_RTOL = 1e-5
#: Eigenvectors' residuals, relative to the norm of the Hessian: a part of the tolerance,
#: and no larger than what a value of 1e-8 needs.
_RESIDUAL, _MAX_RESIDUAL = 1.0, 1e-4
#: An eigenvalue whose residual is larger than this many of those was not found.
_BELIEVED = 10
#: The onset of an oscillation starts from rounding: ln(1/ε) of float64.
_LOG_ROUNDING = 36.0


@final
class AlongEdge(AbstractMethod):
    """The solver of `homoflow.central_flow`: Runge–Kutta–Chebyshev steps, mode by mode.

    As long as a number k of eigenvalues are at the threshold the central flow is a smooth
    gradient flow on a manifold, whose Jacobian has a real spectrum: steps of the
    second-order stabilized method follow it, and Newton's method brings each back to the
    manifold. Between modes are events, when an eigenvalue comes to the threshold or its
    oscillation dies out: they are located within a step, and the complementarity problem
    there decides how it goes on. Only products of the Hessian with vectors are computed,
    and the memory is that of some 140 vectors of weights, with room for four eigenvalues.

    It computes in float64: also the flow of float32 weights, which is then rounded. With
    JAX's float64 switched off that works outside of jit and vmap only. Derivatives through
    it are refused.

    ```python
    model = hf.MLP((3, 8, 1), activation=jnp.tanh, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    dynamics = hf.Central(learning_rate=0.5)
    run = hf.flow(model, (x, x[:, :1]), 5.0, dynamics=dynamics, solver=hf.AlongEdge())
    ```
    """

    def run(self, task: Task, reason: Reason = REQUESTED) -> Trajectory:
        problem, dynamics = task.given, task.dynamics
        self._refuse_options(task)
        assert isinstance(dynamics, Central)
        assert task.grid is not None
        check_tolerance("rtol", task.rtol, problem.dtype)
        obstacle = dynamics.obstacle(problem)
        if obstacle is not None:
            raise ValueError(obstacle)

        def solve(problem: Problem, recorder: Recorder, grid: TimeGrid) -> Trajectory:
            rtol = jnp.asarray(
                EDGE_RTOL if task.rtol is None else task.rtol, problem.dtype
            )
            steps = jnp.asarray(task.max_steps)
            call = _Call(problem, dynamics, recorder, grid, rtol, steps)
            call = refuse_derivatives(call, _NO_DERIVATIVES)
            trajectory = _solve(call, task.save_models)
            if task.estimate_error is False:
                return trajectory
            coarser = dataclasses.replace(call, rtol=COARSER_RTOL * call.rtol)
            coarse = _solve(without_derivatives(coarser), task.save_models)
            return with_error_estimate(trajectory, coarse, problem.mask, dynamics)

        plan = ProjectionPlan((), "the central flow does not conserve laws")
        facts = make_facts(task, "AlongEdge", reason, kinks_of(problem), plan)
        if problem.dtype == jnp.float64:
            return with_facts(solve(problem, task.recorder, task.grid), facts)
        facts = (*facts, ("computed_in", "float64, and rounded at the end"))
        rounded = solve_in_float64(solve, problem, task.recorder, task.grid)
        return with_facts(rounded, facts)

    def _refuse_options(self, task: Task) -> None:
        if not task.dynamics.has_edge:
            raise ValueError(
                f"`homoflow.AlongEdge` follows the central flow alone, not the "
                f"{task.dynamics.name}: call `homoflow.central_flow`."
            )
        if task.project:
            raise ValueError(
                "`project=True` is not possible here: the central flow does not conserve "
                "laws. Leave `project` out."
            )
        if task.progress:
            raise ValueError("`progress` is not shown by the central flow.")
        if task.given.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"The central flow is computed in float64; the weights are "
                f"{task.given.dtype}."
            )
        if task.given.dtype == jnp.float32:
            reason = why_not_in_float64(task.given)
            if reason is not None:
                raise ValueError(f"The central flow cannot be solved here: {reason}.")


_NO_DERIVATIVES = (
    "The central flow cannot be differentiated here: its events move with what it depends "
    "on, which derivatives through its steps leave out. Use finite differences."
)


class _Call(eqx.Module):
    problem: Problem
    dynamics: Central
    recorder: Recorder
    grid: TimeGrid
    rtol: Array
    max_steps: Array


class _Kept(NamedTuple):
    """What is kept of a recorded point."""

    w: Array
    velocity: Array
    values: Array
    oscillation: Array
    num: Array
    traces: dict[str, Array]
    mean_gradient: Array
    shift: Array
    sums: Array


@fast_compile_jit
@full_matmul_precision()
def _solve(call: _Call, save_models: bool) -> Trajectory:
    problem, dynamics, grid = call.problem, call.dynamics, call.grid
    laws = call.recorder.laws.whole
    error = input_error(problem, grid, call.rtol)
    of_dynamics = dynamics.input_error()
    error = RESULTS.where(error == RESULTS.successful, of_dynamics, error)
    is_sound = error == RESULTS.successful
    span = grid.emptied_unless(is_sound)
    w0, unravel = ravel_pytree(dynamics.init(problem))
    residual = jnp.minimum(_RESIDUAL * call.rtol, _MAX_RESIDUAL)
    edge = dynamics.edge(problem, residual)
    rows = dynamics.num_rows(problem)
    guess = random_vectors(problem.weights, rows)
    still = dynamics.rates(problem, laws, edge.unknown_motion(w0, guess))
    sums, as_rates = ravel_pytree(still)

    def rates(motion: Motion) -> Array:
        return ravel_pytree(dynamics.rates(problem, laws, motion))[0]

    def record(state: State) -> _Kept:
        motion = state.motion
        spectrum = motion.spectrum
        largest = jnp.maximum(jnp.max(jnp.abs(spectrum.values)), edge.threshold)
        is_known = jnp.arange(rows) <= state.num
        is_accurate = spectrum.residuals <= _BELIEVED * edge.rtol * largest
        values = jnp.where(is_known & is_accurate, spectrum.values, jnp.nan)
        return _Kept(
            state.w,
            motion.velocity,
            values[: dynamics.room(problem) + 1],
            motion.oscillation,
            state.num,
            dynamics.traces(problem, laws, motion),
            jnp.linalg.norm(motion.mean_gradient),
            state.shift,
            state.sums,
        )

    setting = Setting(
        edge,
        rates,
        record,
        span.times() - span.t0,
        span.t1 - span.t0,
        call.rtol,
        call.max_steps,
    )
    walk = Walker(setting).walk(w0, guess, sums.size)
    values = _observe(call, walk.records, unravel, as_rates)
    return _assemble(call, error, walk, values, unravel, save_models)


def _observe(call: _Call, records: _Kept, unravel: Any, as_rates: Any) -> Values:
    """All observables of the states that were kept, one after the other."""
    problem, recorder, ts = call.problem, call.recorder, call.grid.times()

    def point_at(t: Array, kept: _Kept) -> Point:
        weights = unravel(kept.w)
        loss, gradient = jax.value_and_grad(problem.loss)(weights)
        rates: Rates = as_rates(kept.sums)
        state = CentralState(
            weights,
            kept.values,
            kept.oscillation,
            kept.num,
            kept.traces,
            kept.mean_gradient,
            kept.shift,
            *rates,
        )
        velocity = unravel(kept.velocity)
        return Point(t, problem, weights, loss, gradient, state, lambda: velocity)

    def observe_next(carries, inputs):
        index, t, kept = inputs
        values, carries = recorder.record_next(point_at(t, kept), index, carries)
        return carries, values

    first = jax.tree.map(lambda a: a[0], records)
    carries = recorder.start(lambda: point_at(ts[0], first))
    inputs = jnp.arange(ts.size), ts, records
    _, values = lax.scan(observe_next, carries, inputs)
    return recorder.thin_out(values)


def _assemble(
    call: _Call,
    error: RESULTS,
    walk: Walk,
    values: Values,
    unravel: Any,
    save_models: bool,
) -> Trajectory:
    problem, grid = call.problem, call.grid
    is_sound = error == RESULTS.successful
    result = RESULTS.where(is_sound, _result(walk, grid), error)
    ts = grid.times()
    valid = is_sound & (jnp.arange(ts.size) < walk.num_recorded)
    at_start = is_nonfinite_at_start(grid, values) & valid[0]
    result = RESULTS.where(is_sound & at_start, RESULTS.nonfinite_at_start, result)
    valid = valid & jnp.isfinite(values["losses"])
    reached = jnp.where(is_sound, grid.t0 + walk.state.t, -jnp.inf)
    work, counts = walk.work, walk.counts
    threshold = call.dynamics.edge(problem, call.rtol).threshold
    onset = jnp.sqrt(2 * _LOG_ROUNDING * walk.fastest_onset) / threshold
    numbers = {
        "steps": counts.steps,
        "rejected_steps": counts.rejected,
        "gradient_evaluations": work.gradients,
        "hessian_vector_products": work.products,
        "eigenvalue_searches": work.searches,
        "third_derivatives": work.slopes,
        "edge_events": counts.events,
        "edge_overshoot": onset,
        "edge_shift": walk.largest_shift,
        "edge_lag": call.dynamics.lag(problem, unravel(walk.state.w)),
        "time_reached": time_reached(result, valid, reached, grid),
    }
    numbers |= call.dynamics.stats(numbers, values)
    saved = jax.vmap(unravel)(walk.records.w) if save_models else None
    return make_trajectory(
        problem,
        call.recorder,
        ts,
        values,
        valid,
        final=unravel(walk.state.w),
        saved=saved,
        result=result,
        numbers=numbers,
    )


def _result(walk: Walk, grid: TimeGrid) -> RESULTS:
    is_finished = walk.state.t >= grid.t1 - grid.t0
    result = RESULTS.where(is_finished, RESULTS.successful, RESULTS.max_steps_reached)
    ending = walk.ending
    for happened, member in (
        (ending.is_stuck, RESULTS.edge_lost),
        (ending.is_crowded, RESULTS.edge_crowded),
        (ending.is_infeasible, RESULTS.beyond_edge),
        (ending.is_nonfinite, RESULTS.nonfinite),
    ):
        result = RESULTS.where(happened, member, result)
    return result
