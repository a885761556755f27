"""The exact flow through kinks, from a problem to a trajectory."""

import dataclasses
from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, PyTree

from .._dynamics._base import AbstractDynamics, Descent
from .._jax._compilation import fast_compile_jit
from .._jax._precision import full_matmul_precision
from .._jax._tracing import is_concrete_call
from .._kinks import Solution, System, as_system, integrate, num_pairs
from .._kinks._layers import kink_layers
from .._kinks.filippov._counts import Counts
from .._observe._assemble import make_trajectory
from .._observe._base import Point
from .._observe._recorder import STANDARD, Recorder, Values
from .._observe._time_grid import (
    TimeGrid,
    input_error,
    is_nonfinite_at_start,
    time_reached,
)
from .._problem._problem import Problem
from .._results._events import Events
from .._results._status import RESULTS
from .._results._trajectory import Trajectory
from ._defaults import COARSER_RTOL
from ._error_estimate import with_error_estimate, without_derivatives
from ._save_plan import MAX_STORED
from ._task import Task

#: Up to so many pairs of a sample and a kink in all, few are at their kinks at one time.
FEW_PAIRS = 2_000
#: How many may be, where that is left open, of few pairs in all and of many: to begin with,
#: by what factor it grows, and the most.
FIRST_ACTIVE, GROWTH, MAX_ACTIVE = (32, 64), 4, 960
#: The most where nobody has asked for the exact flow: with hundreds of pairs that slide at
#: a time it takes minutes, and averaging over them takes seconds.
MAX_ACTIVE_BY_DEFAULT = 256
#: The same under jit and vmap, where it cannot grow. Less than `MAX_ON_ONE_THREAD` of the
#: sliding field.
TRACED_ACTIVE = 64, 120
#: The power of the smallest float below which weights are too small: 1e-246 in float64.
_VANISHING = 0.8


class ExactOptions(eqx.Module):
    """How an exact flow is solved: with room that is given, or grows if left open."""

    max_active: int | None = eqx.field(static=True)
    events: int = eqx.field(static=True)
    save_models: bool = eqx.field(static=True)
    meter: dfx.AbstractProgressMeter


class ExactCall(eqx.Module):
    """What is solved, from when to when, and how accurately.

    `atol` bounds the error of each weight, in the mean over all. The dynamics are gradient
    flow, or have a `descent`; their own clock is the grid's.
    """

    problem: Problem
    dynamics: AbstractDynamics
    recorder: Recorder
    rtol: Array
    atol: Array
    max_steps: Array
    grid: TimeGrid

    def coarser(self) -> "ExactCall":
        """The same at a coarser tolerance, to estimate an error with."""
        rtol, atol = COARSER_RTOL * self.rtol, COARSER_RTOL * self.atol
        return dataclasses.replace(self, rtol=rtol, atol=atol)


def _keeps_states(problem: Problem, grid: TimeGrid) -> bool:
    """Whether the weights at all times are kept, to record what is asked for after."""
    return grid.times().size * problem.num_weights <= MAX_STORED


def cannot_observe(task: Task) -> str | None:
    """Why the observables of a task cannot be had, or `None` if they can."""
    assert task.grid is not None
    has_own_clock = task.dynamics.descent(task.given) is not None
    is_hungry = task.recorder.sees_problem or has_own_clock
    if not is_hungry or _keeps_states(task.given, task.grid):
        return None
    what = "logarithmic time" if has_own_clock else "`observe`"
    return (
        f"{what} in the exact flow keeps all weights at all times, and here these are "
        f"more than {MAX_STORED:,} numbers: record at fewer `ts`"
    )


def solve_exactly(
    call: ExactCall, options: ExactOptions, task: Task, most_active: int
) -> Trajectory:
    """One run, or with an error estimate two, with enough room for active pairs.

    `most_active`: how far room that is left open may grow.
    """

    def run(max_active: int) -> Trajectory:
        return _solve(call, dataclasses.replace(options, max_active=max_active))

    max_active = options.max_active
    if max_active is None:
        is_traced = not is_concrete_call((call, options))
        max_active, trajectory = _run_with_room(
            run, call.problem, most_active, is_traced
        )
    else:
        trajectory = run(max_active)
    if not task.estimate_error:
        return trajectory
    # Only a figure is wanted: derivatives need not follow the second solve.
    coarser = without_derivatives(call).coarser()
    quiet = dataclasses.replace(
        options, max_active=max_active, meter=dfx.NoProgressMeter()
    )
    coarse = _solve(coarser, quiet)
    return with_error_estimate(trajectory, coarse, call.problem.mask, task.dynamics)


def _run_with_room(
    run: Callable[[int], Trajectory],
    problem: Problem,
    most_active: int,
    is_traced: bool,
) -> tuple[int, Trajectory]:
    """A run with as much room as it needs, by compiling again with more.

    Under jit and vmap it cannot grow: what happens there is not seen here.
    """
    are_many = num_pairs(problem) > FEW_PAIRS
    if is_traced:
        max_active = TRACED_ACTIVE[are_many]
        return max_active, run(max_active)
    max_active = FIRST_ACTIVE[are_many]
    while True:
        trajectory = run(max_active)
        is_full = bool(trajectory.result == RESULTS.kink_slots_exceeded)
        if not is_full or max_active >= most_active:
            return max_active, trajectory
        max_active = min(GROWTH * max_active, most_active)


@fast_compile_jit
@full_matmul_precision()
def _solve(call: ExactCall, options: ExactOptions) -> Trajectory:
    problem, grid = call.problem, call.grid
    assert options.max_active is not None
    error = input_error(problem, grid, call.rtol)
    vanishes = (error == RESULTS.successful) & _vanish(problem.weights)
    error = RESULTS.where(vanishes, RESULTS.vanishing_weights, error)
    # Faulty input must not be integrated: nothing would be learned, slowly.
    is_sound = error == RESULTS.successful
    span = grid.emptied_unless(is_sound)
    descent = call.dynamics.descent(problem)
    system = as_system(problem, descent, span.t0)
    w0, unravel = jax.flatten_util.ravel_pytree(problem.weights)
    keeps_states = _keeps_states(problem, grid)

    def record(recorder, w, loss, velocity):
        if keeps_states:
            return w, loss, velocity
        point = _point(problem, span.t0, unravel(w), loss, unravel(velocity))
        values = recorder.record_apart(point, recorder.start(lambda: point), STANDARD)
        return values, (w if options.save_models else None)

    solution = integrate(
        system,
        call.recorder,
        w0,
        span.t1 - span.t0,
        span.times() - span.t0,
        record,
        rtol=call.rtol,
        atol=call.atol * jnp.sqrt(jnp.asarray(w0.size, w0.dtype)),
        capacity=min(options.max_active, system.low.size),
        max_steps=call.max_steps,
        log_capacity=options.events,
        meter=options.meter,
    )
    if keeps_states:
        solution = _on_clock(call, descent, solution)
        values, saved = _observe_states(call, solution, unravel, options.save_models)
    else:
        values, saved = solution.records
    return _assemble(call, error, system, solution, values, saved, unravel)


def _vanish(weights: PyTree) -> Bool[Array, ""]:
    """Whether products of weights, steps and tolerances are 0 in floating point."""
    flat, _ = jax.flatten_util.ravel_pytree(weights)
    largest = jnp.max(jnp.abs(flat))
    return (largest > 0) & (largest < jnp.finfo(flat.dtype).tiny ** _VANISHING)


def _point(
    problem: Problem, t: Array, weights: PyTree, loss: Array, velocity: PyTree
) -> Point:
    gradient = jax.tree.map(jnp.negative, velocity)
    return Point(t, problem, weights, loss, gradient, weights, lambda: velocity)


def _on_clock(call: ExactCall, descent: Descent | None, solution: Solution) -> Solution:
    """The solution with losses and velocities of L's own flow in its records."""
    if descent is None:
        return solution
    states, values, velocities = solution.records
    paces = jax.vmap(jax.grad(call.dynamics.clock))(call.grid.times())
    # A pace of inf belongs to a velocity of 0: of a loss too small for a float.
    velocities = velocities / paces[:, None]
    return solution._replace(records=(states, descent.loss(values), velocities))


def _start(call: ExactCall) -> Point:
    """The start of the run, with L's gradient there."""
    problem = call.problem
    loss, gradient = jax.value_and_grad(problem.loss)(problem.weights)
    velocity = jax.tree.map(jnp.negative, gradient)
    return _point(problem, call.grid.t0, problem.weights, loss, velocity)


def _observe_states(
    call: ExactCall,
    solution: Solution,
    unravel: Callable[[Array], PyTree],
    save_models: bool,
) -> tuple[Values, Array | None]:
    """All observables of the states that were kept, one after the other."""
    states, losses, velocities = solution.records
    ts, recorder = call.grid.times(), call.recorder

    def point_at(t, w, loss, velocity):
        return _point(call.problem, t, unravel(w), loss, unravel(velocity))

    def observe_next(carries, inputs):
        index, *at = inputs
        values, carries = recorder.record_next(point_at(*at), index, carries)
        return carries, values

    at = (call.dynamics.clock(ts), states, losses, velocities)
    carries = recorder.start(lambda: _start(call))
    _, values = lax.scan(observe_next, carries, (jnp.arange(ts.size), *at))
    return recorder.thin_out(values), states if save_models else None


def _assemble(
    call: ExactCall,
    error: RESULTS,
    system: System,
    solution: Solution,
    values: Values,
    saved: Array | None,
    unravel: Callable[[Array], PyTree],
) -> Trajectory:
    problem, grid, clock = call.problem, call.grid, call.dynamics.clock
    is_sound = error == RESULTS.successful
    result = RESULTS.where(is_sound, _result(solution, grid), error)
    ts = grid.times()
    at_start = is_nonfinite_at_start(grid, values) & (solution.num_recorded > 0)
    result = RESULTS.where(is_sound & at_start, RESULTS.nonfinite_at_start, result)
    recorded = is_sound & (jnp.arange(ts.size) < solution.num_recorded)
    valid = recorded & solution.is_finite
    reached = jnp.where(is_sound, grid.t0 + solution.t, -jnp.inf)
    first = solution.first_nonunique_time
    counts = solution.counts
    numbers = {
        "steps": solution.steps,
        "rejected_steps": solution.rejected,
        "crossings": counts["crossings"],
        "entries": counts["entries"],
        "exits": counts["exits"],
        "largest_sliding_set": counts["largest_sliding_set"],
        "num_nonunique_pairs": solution.num_nonunique_pairs,
        "forced_steps": counts["forced_steps"],
        "first_nonunique_time": jnp.where(
            jnp.isfinite(first), clock(grid.t0 + first), jnp.nan
        ),
        "gradient_evaluations": _in_gradients(problem, counts),
        "forward_passes": counts["forward"],
        "time_reached": clock(time_reached(result, valid, reached, grid)),
    }
    return make_trajectory(
        problem,
        call.recorder,
        clock(ts),
        values,
        valid,
        final=unravel(solution.w),
        saved=None if saved is None else jax.vmap(unravel)(saved),
        result=result,
        numbers=numbers,
        events=_events(call, system, is_sound, solution),
    )


def _events(
    call: ExactCall, system: System, is_sound: Array, solution: Solution
) -> Events | None:
    log, kinks = solution.log, system.num_kinks
    clock, t0 = call.dynamics.clock, call.grid.t0
    if log is None:
        return None
    room = log.pair.size
    reached = jnp.where(is_sound, solution.t, 0)
    is_event = log.pair >= 0
    return Events(
        times=clock(t0 + log.time),
        samples=jnp.where(is_event, log.pair // kinks, -1),
        kinks=jnp.where(is_event, log.pair % kinks, -1),
        kinds=log.kind,
        count=jnp.minimum(log.seen, room),
        dropped=jnp.maximum(log.seen - room, 0),
        complete_until=clock(t0 + jnp.minimum(log.overflowed_at, reached)),
        layers=kink_layers(call.problem.model, system.function.operations),
        sample_count=system.num_samples,
    )


def _in_gradients(problem: Problem, counts: Counts) -> Array:
    """Evaluations of the whole gradient; a row is the gradient at one sample."""
    assert problem.num_samples is not None
    rows = counts["rows"].astype(problem.dtype) / problem.num_samples
    return counts["gradients"].astype(problem.dtype) + rows


def _result(solution: Solution, grid: TimeGrid) -> RESULTS:
    is_finished = solution.t >= grid.t1 - grid.t0
    result = RESULTS.where(is_finished, RESULTS.successful, RESULTS.max_steps_reached)
    ending = solution.ending
    for happened, member in (
        (ending.stuck, RESULTS.stuck_on_kinks),
        (ending.mode_unsettled, RESULTS.kink_mode_unsettled),
        (ending.overflows, RESULTS.kink_slots_exceeded),
        (ending.nonfinite | ~jnp.all(solution.is_finite), RESULTS.nonfinite),
    ):
        result = RESULTS.where(happened, member, result)
    return result
