"""The exact flow of networks with kinks, from a task to a trajectory."""

import dataclasses
from collections.abc import Callable
from typing import final

import diffrax as dfx
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from .._jax._compilation import fast_compile_jit
from .._jax._precision import full_matmul_precision
from .._jax._progress import as_meter
from .._jax._tracing import is_concrete
from .._jaxpr import nonsmooth_primitives
from .._kinks import Solution, System, as_system, integrate, kinked_function
from .._kinks._layers import kink_layers
from .._kinks.filippov._counts import Counts
from .._observe._assemble import make_trajectory
from .._observe._base import Point
from .._observe._recorder import STANDARD, Recorder, Values
from .._observe._time_grid import TimeGrid, input_error, time_reached
from .._problem._checks import check_tolerance
from .._problem._losses import AbstractLoss, Risk
from .._problem._problem import Problem
from .._problem._smoothness import kinks_of
from .._results._events import Events
from .._results._reason import REQUESTED, Reason
from .._results._status import RESULTS
from .._results._trajectory import Trajectory, with_facts
from ._base import AbstractMethod
from ._defaults import COARSER_RTOL, EXACT_RTOL
from ._diffrax import make_facts
from ._error_estimate import with_error_estimate, without_derivatives
from ._float64 import solve_in_float64, why_not_in_float64
from ._projection_choice import ProjectionPlan
from ._save_plan import MAX_STORED
from ._task import Task

#: Pairs that may be at their kinks at one time, to begin with where that is left open, and
#: to grow to. The first number is less than `MAX_ON_ONE_THREAD` of the sliding field.
FIRST_ACTIVE, MAX_ACTIVE = 120, 960


@final
class Filippov(AbstractMethod):
    """The exact flow of a network with kinks, as `solver` of `homoflow.flow`.

    For ReLU-like networks gradient flow is the differential inclusion ẇ ∈ −∂L(w) with
    Clarke's sub-differential [Du, Hu & Lee 2018, eq. 5]. This solver follows Filippov's
    solution of it [Filippov 1988]: between events the flow is analytic and is
    integrated by the classical Runge–Kutta method; where a pre-activation reaches 0 the
    pair (sample, unit) crosses its kink, or slides along it with a multiplier; it
    leaves when its slope reaches an end of its interval. Cost is set by the number of
    events, hardly by the tolerance.

    **Arguments:**

    - `max_active`: how many pairs may be at their kinks at one time. A run that needs more
        ends with a result that says so. Time and memory grow with its square. By
        default 120, and outside of jit and vmap a run that needs more is done again
        with twice as many, up to 960. Where more than 127 pairs are at their kinks LAPACK
        takes several threads, which on busy cores wait for each other for many times as
        long as they work: set `OPENBLAS_NUM_THREADS=1` there, before Python starts.
    - `events`: how many events to keep for `trajectory.events` (none: no list is made).
        Further ones are counted as dropped. `stats` say how many of each sort there are.

    It computes in float64: also the flow of float32 weights, which is then rounded, so
    that its error is float32's rounding. With JAX's float64 switched off that works
    outside of jit and vmap only. It needs a loss over samples (mean or sum), and a model
    whose kinks it finds, in any Equinox module, dense, convolutional, residual or with
    shared weights:

    - maximum and minimum of two values, or over axes (maxout), and max-pooling, with
        one kink less than there are values; but not over windows that have more than
        one value in common;
    - |z|, relu, leaky relu, relu6, clip, hard tanh, and other continuous
        piecewise-linear functions made by maximum, minimum or by `jnp.where(z > c,
        ...)`: a kink for each knot. `eqx.nn.PReLU`, its slopes fixed or trained;
    - elu with any α, selu. (elu with α = 1 and celu have no kink, only a second
        derivative that jumps.)

    Anything else that is not smooth is refused by name: jumps (sign, round, argmax, a
    discontinuous `where`: they have no such flow), sorting, kinks inside loops or inside
    branches that data choose, and functions with a derivative rule of their own. An error
    estimate is made where `estimate_error=True` asks for a second solve. Laws are not
    projected: they are as accurate as the flow, which keeps them by itself.

    Observables see −dw/dt in place of the gradient: the least element of the
    sub-differential, which `grad_norms` are the norms of.

    **Derivatives.** `jax.jvp` and `jax.jacfwd` work, with respect to weights (also ones
    that are not trained), data, arrays of the loss, `t1` and `ts`, of the final model
    and of everything recorded, under jit and vmap. They are those of the solution along
    the events that it meets, whose times move [saltation matrices: Kong et al. 2023].
    Where the solution itself has no derivative they are NaN: at a start on a kink that
    the direction leaves; where different pairs meet their kinks at one time and the
    direction parts them; where a direction separates kinks that coincide (one of two
    equal inputs moves). They grow without bound where the flow grazes a kink. `stats`
    have none; those of the times in `events` are NaN. Reverse mode (`jax.grad`) and
    second derivatives are refused.

    **Raises:** `ValueError` if `max_active` is not a positive integer, or
    `events` a negative number or not an integer; in reverse mode `NotImplementedError`.

    ```python
    model = hf.MLP((3, 8, 1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    flow = hf.flow(model, (x, x[:, :1]), 5.0, solver=hf.Filippov(max_active=32, events=500))
    print(flow.stats["crossings"], flow.stats["largest_sliding_set"])
    print(flow.events)
    ```
    """

    max_active: int | None = eqx.field(static=True, default=None)
    events: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        _check_count("max_active", self.max_active, least=1, may_be_none=True)
        _check_count("events", self.events, least=0)

    def run(self, task: Task, reason: Reason = REQUESTED) -> Trajectory:
        problem = task.given
        self._refuse_options(task)
        reason_against = obstacle(problem)
        if reason_against is not None:
            raise ValueError(
                f"`homoflow.Filippov` cannot follow this flow: {reason_against}."
            )
        check_tolerance("rtol", task.rtol, problem.dtype)
        assert task.grid is not None

        def solve(problem: Problem, recorder: Recorder, grid: TimeGrid) -> Trajectory:
            rtol = EXACT_RTOL if task.rtol is None else task.rtol
            options = _Options(
                FIRST_ACTIVE if self.max_active is None else self.max_active,
                self.events,
                task.max_steps,
                task.save_models,
                as_meter(task.progress),
            )
            call = _Call(problem, recorder, jnp.asarray(rtol, problem.dtype), grid)
            may_grow = self.max_active is None
            return _solve_and_estimate(call, options, task, may_grow)

        plan = ProjectionPlan((), "the exact flow keeps its laws by itself")
        facts = make_facts(task, "Filippov", reason, kinks_of(problem), plan)
        if problem.dtype == jnp.float64:
            return with_facts(solve(problem, task.recorder, task.grid), facts)
        facts = (*facts, ("computed_in", "float64, and rounded at the end"))
        rounded = solve_in_float64(solve, problem, task.recorder, task.grid)
        return with_facts(rounded, facts)

    def _refuse_options(self, task: Task) -> None:
        if not (task.dynamics.is_gradient_flow and task.dynamics.conserves_laws):
            is_decaying = task.dynamics.is_gradient_flow
            what = "`weight_decay`" if is_decaying else f"the {task.dynamics.name}"
            raise ValueError(
                f"{what} is for Diffrax's solvers: `homoflow.Filippov` follows the "
                "gradient flow alone. `solver=homoflow.Averaged()` averages over kinks."
            )
        if task.project:
            raise ValueError(
                "`project=True` is not possible here: the exact flow "
                "(`homoflow.Filippov`) keeps its laws as accurately as it is solved, and "
                "is not projected. Leave `project` out, lower `rtol`, or take "
                "`solver=homoflow.Averaged()`."
            )


def _check_count(name: str, value: object, *, least: int, may_be_none: bool = False):
    if value is None and may_be_none:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = "a positive integer" if least else "a whole number, 0 or more"
        raise ValueError(f"`{name}` must be {kind}; got {value!r}.")


def obstacle(problem: Problem) -> str | None:
    """Why the exact flow of a problem cannot be had, or `None` if it can."""
    if problem.dtype not in (jnp.float32, jnp.float64):
        return (
            f"the weights are {problem.dtype}, and it takes float64, or float32 whose "
            "flow it follows in float64"
        )
    objective = problem.objective
    if not isinstance(objective, Risk):
        return (
            "it follows the kinks of every sample, which a custom `objective` does not "
            "show; give a `loss` over samples"
        )
    function = kinked_function(problem)
    named = (*function.unsupported, *_loss_kinks(problem, objective))
    if named:
        return (
            f"it has {', '.join(named)}, and the kinks that can be followed are those "
            "of maximum and minimum, |z|, continuous piecewise-linear activations and "
            "max-pooling without overlap, outside of loops. `homoflow.Averaged()` "
            "averages over kinks of any kind"
        )
    if function.count == 0:
        return "the model has no kinks; leave `solver` out"
    return why_not_in_float64(problem) if problem.dtype == jnp.float32 else None


def num_pairs(problem: Problem) -> int:
    """How many pairs of a sample and a kink the exact flow of a problem follows."""
    assert problem.num_samples is not None
    return problem.num_samples * kinked_function(problem).count


def _loss_kinks(problem: Problem, objective: Risk) -> tuple[str, ...]:
    if isinstance(objective.loss, AbstractLoss):
        return ()  # Those have continuous gradients.
    x, y = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), problem.data
    )
    prediction = eqx.filter_eval_shape(problem.model, x)
    return nonsmooth_primitives(objective.loss, prediction, y)


class _Options(eqx.Module):
    max_active: int = eqx.field(static=True)
    events: int = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    save_models: bool = eqx.field(static=True)
    meter: dfx.AbstractProgressMeter


class _Call(eqx.Module):
    """What is solved, from when to when, and how accurately."""

    problem: Problem
    recorder: Recorder
    rtol: Array
    grid: TimeGrid


def _solve_and_estimate(
    call: _Call, options: _Options, task: Task, may_grow: bool
) -> Trajectory:
    """One run, or with an error estimate two, with enough room for active pairs."""

    def run(max_active: int) -> Trajectory:
        return _solve(call, dataclasses.replace(options, max_active=max_active))

    max_active = options.max_active
    if may_grow:
        max_active, trajectory = _run_with_room(run, max_active)
    else:
        trajectory = run(max_active)
    if not task.estimate_error:
        return trajectory
    # Only a figure is wanted: derivatives need not follow the second solve.
    still = without_derivatives(call)
    coarser = dataclasses.replace(still, rtol=COARSER_RTOL * still.rtol)
    quiet = dataclasses.replace(
        options, max_active=max_active, meter=dfx.NoProgressMeter()
    )
    coarse = _solve(coarser, quiet)
    return with_error_estimate(trajectory, coarse, call.problem.mask, task.dynamics)


def _run_with_room(
    run: Callable[[int], Trajectory], max_active: int
) -> tuple[int, Trajectory]:
    """A run with as much room as it needs, by compiling again with more.

    Inside jit or vmap it has what it begins with: what happens there is not seen here.
    """
    while True:
        trajectory = run(max_active)
        result = trajectory.result
        is_known = is_concrete(result)
        is_full = is_known and bool(result == RESULTS.kink_slots_exceeded)
        if not is_full or max_active >= MAX_ACTIVE:
            return max_active, trajectory
        max_active *= 2


@fast_compile_jit
@full_matmul_precision()
def _solve(call: _Call, options: _Options) -> Trajectory:
    problem, grid = call.problem, call.grid
    error = input_error(problem, grid, call.rtol)
    # Faulty input must not be integrated: nothing would be learned, slowly.
    is_sound = error == RESULTS.successful
    span = grid.emptied_unless(is_sound)
    system = as_system(problem)
    w0, unravel = jax.flatten_util.ravel_pytree(problem.weights)
    keeps_states = span.times().size * w0.size <= MAX_STORED

    def record(recorder, w, loss, velocity):
        if keeps_states:
            return w, loss, velocity
        point = _point(problem, span.t0, unravel(w), loss, unravel(velocity))
        return recorder.record_alone(point, STANDARD), (
            w if options.save_models else None
        )

    if not keeps_states and call.recorder.sees_problem:
        raise ValueError(
            f"`observe` in the exact flow keeps all weights at all times, and here these "
            f"are more than {MAX_STORED:,} numbers: record at fewer `ts`."
        )
    solution = integrate(
        system,
        call.recorder,
        w0,
        span.t1 - span.t0,
        span.times() - span.t0,
        record,
        rtol=call.rtol,
        capacity=min(options.max_active, system.low.size),
        max_steps=options.max_steps,
        log_capacity=options.events,
        meter=options.meter,
    )
    if keeps_states:
        values, saved = _observe_states(call, solution, unravel, options.save_models)
    else:
        values, saved = solution.records
    return _assemble(call, error, system, solution, values, saved, unravel)


def _point(
    problem: Problem, t: Array, weights: PyTree, loss: Array, velocity: PyTree
) -> Point:
    gradient = jax.tree.map(jnp.negative, velocity)
    return Point(t, problem, weights, loss, gradient, weights, lambda: velocity)


def _observe_states(
    call: _Call,
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

    at = (ts, states, losses, velocities)
    carries = recorder.init(point_at(*(a[0] for a in at)))
    _, values = lax.scan(observe_next, carries, (jnp.arange(ts.size), *at))
    return recorder.thin_out(values), states if save_models else None


def _assemble(
    call: _Call,
    error: RESULTS,
    system: System,
    solution: Solution,
    values: Values,
    saved: Array | None,
    unravel: Callable[[Array], PyTree],
) -> Trajectory:
    problem, grid = call.problem, call.grid
    is_sound = error == RESULTS.successful
    result = RESULTS.where(is_sound, _result(solution, grid), error)
    ts = grid.times()
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
            jnp.isfinite(first), grid.t0 + first, jnp.nan
        ),
        "gradient_evaluations": _in_gradients(problem, counts),
        "forward_passes": counts["forward"],
        "time_reached": time_reached(result, valid, reached, grid),
    }
    return make_trajectory(
        problem,
        call.recorder,
        ts,
        values,
        valid,
        final=unravel(solution.w),
        saved=None if saved is None else jax.vmap(unravel)(saved),
        result=result,
        numbers=numbers,
        events=_events(call, system, is_sound, solution),
    )


def _events(
    call: _Call, system: System, is_sound: Array, solution: Solution
) -> Events | None:
    log, kinks, t0 = solution.log, system.num_kinks, call.grid.t0
    if log is None:
        return None
    room = log.pair.size
    reached = jnp.where(is_sound, solution.t, 0)
    is_event = log.pair >= 0
    return Events(
        times=t0 + log.time,
        samples=jnp.where(is_event, log.pair // kinks, -1),
        kinks=jnp.where(is_event, log.pair % kinks, -1),
        kinds=log.kind,
        count=jnp.minimum(log.seen, room),
        dropped=jnp.maximum(log.seen - room, 0),
        complete_until=t0 + jnp.minimum(log.overflowed_at, reached),
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
