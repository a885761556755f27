"""A task by one of Diffrax's solvers: smooth, or averaged over kinks."""

from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from .._dynamics._base import AbstractDynamics
from .._jax._arrays import all_finite
from .._jax._compilation import fast_compile_jit
from .._jax._precision import full_matmul_precision
from .._jax._progress import as_meter
from .._jax._runtime_checks import without_time_checks
from .._jax._tracing import is_concrete_call
from .._observe._assemble import make_trajectory
from .._observe._recorder import STANDARD, Recorder, Values
from .._observe._time_grid import (
    TimeGrid,
    input_error,
    is_nonfinite_at_start,
    time_reached,
)
from .._problem._problem import Problem
from .._rescaling import RescalingGroup
from .._results._status import RESULTS
from .._results._trajectory import Trajectory
from .._solvers import ProjectedState, as_flow_solver
from ._error_estimate import with_error_estimate, without_derivatives
from ._forward_mode import named_forward_mode
from ._save_plan import Records, make_save_plan
from ._settings import Settings
from ._solve_equation import Options, Solve, make_solver, solve_equation
from ._task import Task
from ._vector_field import Equation, make_equation

#: A run from which more drift was removed, relative to ‖w‖², was not accurate.
_MAX_REMOVED_DRIFT = 0.05
#: By how many tolerances, relative to ‖w‖², the gradient itself may change a law.
_MAX_BROKEN, _USUAL_TOLERANCE = 10.0, 1e-6
#: The drift of a few steps, in tolerances, that is theirs and not the law's.
_MAX_STEP_DRIFT = 1000.0


def integrate(
    task: Task, settings: Settings, adjoint: dfx.AbstractAdjoint | None
) -> Trajectory:
    """Solve once, or with an error estimate once more at a coarser tolerance."""
    assert task.grid is not None
    is_reduced = task.given is not task.problem
    shown = task.given if is_reduced and task.recorder.sees_problem else None
    wants_estimate = task.estimate_error
    if wants_estimate is None:
        wants_estimate = settings.is_averaging
    coarser = settings.coarser() if wants_estimate else None
    given = (task.problem, shown, task.dynamics, task.recorder, settings, task.grid)
    options = Options(
        save_models=task.save_models,
        adjoint=dfx.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
        max_steps=task.max_steps,
        may_be_differentiated=not is_concrete_call(given),
    )
    with named_forward_mode(options.adjoint):
        trajectory = _solve(*given, options, as_meter(task.progress))
    if coarser is None:
        return trajectory
    # Only a figure is wanted: derivatives need not follow these solves.
    still = without_derivatives(given)

    def solve_at(settings: Settings) -> Trajectory:
        settings = without_derivatives(settings)
        return _solve(*still[:4], settings, still[5], options, dfx.NoProgressMeter())

    coarse, coarsest = solve_at(coarser), None
    has_third = as_flow_solver(settings.solver).num_coarse_solves > 1
    if has_third:
        coarsest = solve_at(coarser.coarser())
    # Over kinks two solves may take the same few steps, whose error then does not show.
    at_least = settings.rtol if settings.is_averaging and not has_third else None
    return with_error_estimate(
        trajectory, coarse, task.problem.mask, task.dynamics, coarsest, at_least
    )


@fast_compile_jit
@full_matmul_precision()
@without_time_checks()
def _solve(
    problem: Problem,
    shown: Problem | None,
    dynamics: AbstractDynamics,
    recorder: Recorder,
    settings: Settings,
    grid: TimeGrid,
    options: Options,
    meter: dfx.AbstractProgressMeter,
) -> Trajectory:
    error = _input_error(problem, dynamics, settings, grid)
    # Faulty input must not be integrated: nothing would be learned, slowly.
    span = grid.emptied_unless(error == RESULTS.successful)
    equation = make_equation(problem, shown, dynamics, recorder, settings, span)
    given = Solve(problem, dynamics, equation, settings, grid, span, meter)
    solver = make_solver(given)
    plan = make_save_plan(
        equation,
        recorder,
        span,
        options.adjoint,
        save_models=options.save_models,
        needs_solver_state=as_flow_solver(solver).uses_memory,
    )
    solution = solve_equation(given, plan.saveat, options)
    records = plan.read(solution)
    costs = _costs(solver, solution, equation, grid.times().size)
    costs |= _removed_drift(equation.orbit, records, solution, settings)
    final = equation.weights(records.final)
    result, valid, reached = _ending(grid, error, solution, records, final)
    if equation.orbit is not None:
        result = _judge_projection(result, costs, records, grid, dynamics, settings)
        result = _judge_single_steps(result, solution, settings)
    numbers = costs | {"time_reached": dynamics.clock(reached)}
    return make_trajectory(
        problem,
        recorder,
        dynamics.clock(grid.times()),
        records.values,
        valid,
        final=final,
        saved=records.saved,
        result=result,
        numbers=numbers | dynamics.stats(numbers, records.values),
    )


def _input_error(
    problem: Problem, dynamics: AbstractDynamics, settings: Settings, grid: TimeGrid
) -> RESULTS:
    of_dynamics = dynamics.input_error()
    is_fine = of_dynamics == RESULTS.successful
    others = input_error(problem, grid, settings.rtol)
    error = RESULTS.where(is_fine, others, of_dynamics)
    if settings.dt0 is None:
        return error
    is_step = (settings.dt0 > 0) & jnp.isfinite(settings.dt0)
    return RESULTS.where(is_step, error, RESULTS.bad_step)


def _removed_drift(
    orbit: RescalingGroup | None,
    records: Records,
    solution: dfx.Solution,
    settings: Settings,
) -> dict[str, Float[Array, ""]]:
    """The largest of the drifts that were removed, relative to ‖w‖², for `stats`."""
    if orbit is None:
        return {}
    solver_state = solution.solver_state
    ends = map(orbit.values, (records.last, records.final))
    drifts = jax.tree.map(jnp.subtract, *ends)
    if isinstance(solver_state, ProjectedState) and settings.restores_steps:
        drifts = jax.tree.map(jnp.add, solver_state.removed_drift, drifts)
    size = orbit.size(records.final)
    most = jnp.max(jnp.stack([jnp.max(jnp.abs(drift)) for drift in drifts]))
    removed = jax.lax.stop_gradient(most / jnp.where(size > 0, size, 1))
    return {"projected_drift": removed}


def _judge_projection(
    result: RESULTS,
    costs: dict[str, Array],
    records: Records,
    grid: TimeGrid,
    dynamics: AbstractDynamics,
    settings: Settings,
) -> RESULTS:
    """The result, or an error code where restoring laws has hidden that it is none.

    The gradient changes a law of size ‖w‖² by at most (2‖w‖ + 1)·‖∇L‖·`law_violation` in
    a unit of time, of which `pace` pass in one of the grid. Summed over the run that is
    rounding for a law.
    """
    values = records.values
    pace = jax.vmap(jax.grad(dynamics.clock))(grid.times())
    squares = sum(values["squared_norms"].values())
    lengths = 2 * jnp.sqrt(squares) + 1
    rates = values["law_violation"] * values["grad_norms"] * pace * lengths
    rates = jnp.where(jnp.isfinite(rates), rates, 0)
    steps = jnp.diff(grid.times(), prepend=grid.t0)
    before = jnp.concatenate([rates[:1], rates[:-1]])
    largest = jnp.max(jnp.where(jnp.isfinite(squares), squares, 0))
    broken = jnp.sum(steps * (rates + before) / 2) / jnp.where(largest > 0, largest, 1)
    tolerance = _USUAL_TOLERANCE if settings.rtol is None else settings.rtol
    is_law = broken <= _MAX_BROKEN * tolerance
    judged = RESULTS.where(is_law, RESULTS.successful, RESULTS.law_broken)
    is_near = costs["projected_drift"] <= _MAX_REMOVED_DRIFT
    judged = RESULTS.where(is_law & ~is_near, RESULTS.inaccurate, judged)
    return RESULTS.where(result == RESULTS.successful, judged, result)


def _judge_single_steps(
    result: RESULTS, solution: dfx.Solution, settings: Settings
) -> RESULTS:
    """The result, or an error code where a few steps changed a law by more than they err.

    That is seen also between the times that are recorded. Over kinks steps may err more.
    """
    state, rtol = solution.solver_state, settings.rtol
    if settings.is_averaging or rtol is None or not isinstance(state, ProjectedState):
        return result
    is_error = state.largest_drift <= _MAX_STEP_DRIFT * rtol
    judged = RESULTS.where(is_error, RESULTS.successful, RESULTS.law_broken)
    return RESULTS.where(result == RESULTS.successful, judged, result)


def _standard(values: Values) -> Values:
    """What decides whether a run is sound; a user's observables may be NaN."""
    return {name: values[name] for name in STANDARD}


def _ending(
    grid: TimeGrid,
    error: RESULTS,
    solution: dfx.Solution,
    records: Records,
    final: PyTree,
) -> tuple[RESULTS, Bool[Array, " times"], Float[Array, ""]]:
    """How the solve ended, which records are known, and up to what time."""
    # Of faulty input nothing is recorded, not even the start.
    is_sound = error == RESULTS.successful
    reached = jnp.where(is_sound, records.reached, -jnp.inf)
    result = _result(error, solution.result, records.values, final)
    at_start = is_sound & is_nonfinite_at_start(grid, records.values)
    result = RESULTS.where(at_start, RESULTS.nonfinite_at_start, result)
    valid = _valid(grid, records.values, reached, result)
    return result, valid, time_reached(result, valid, reached, grid)


def _result(
    error: RESULTS, solved: dfx.RESULTS, values: Values, final: PyTree
) -> RESULTS:
    is_finite = all_finite((_standard(values), final))
    result = RESULTS.where(is_finite, RESULTS.successful, RESULTS.nonfinite)
    known: tuple[tuple[Any, RESULTS], ...] = (
        (dfx.RESULTS.max_steps_reached, RESULTS.max_steps_reached),
        (dfx.RESULTS.dt_min_reached, RESULTS.step_size_too_small),
        (dfx.RESULTS.event_occurred, RESULTS.nonfinite),
    )
    failed = RESULTS.where(
        solved == dfx.RESULTS.successful, result, RESULTS.solver_failed
    )
    for theirs, ours in known:
        failed = RESULTS.where(solved == theirs, ours, failed)
    return RESULTS.where(error == RESULTS.successful, failed, error)


def _valid(
    grid: TimeGrid, values: Values, reached: Array, result: RESULTS
) -> Bool[Array, " times"]:
    is_done = result == RESULTS.successful
    is_finite = jax.vmap(all_finite)(_standard(values))
    # Times the solver never came to were left at inf by Diffrax.
    is_past = is_done | (grid.times() <= reached)
    return is_finite & is_past & (jnp.cumsum(~is_finite) == 0)


def _costs(
    solver: dfx.AbstractSolver,
    solution: dfx.Solution,
    equation: Equation,
    num_times: int,
) -> dict[str, Array]:
    """Steps, and evaluations as far as they are known, with those for what is recorded."""
    accepted = solution.stats["num_accepted_steps"]
    rejected = solution.stats["num_rejected_steps"]
    costs = as_flow_solver(solver).cost(
        num_accepted=accepted,
        num_rejected=rejected,
        num_steps=solution.stats["num_steps"],
        solver_state=solution.solver_state,
        args=equation.args,
    )
    if "gradient_evaluations" in costs:
        costs["gradient_evaluations"] += num_times
    return {"steps": accepted, "rejected_steps": rejected, **costs}
