"""Dynamics of a problem by one of Diffrax's solvers: smooth, or averaged over kinks."""

from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from .._dynamics._base import AbstractDynamics, GradientFlow
from .._jax._arrays import all_finite
from .._jax._compilation import quickly_compiled
from .._jax._precision import full_matmul_precision
from .._jax._progress import Progress, as_meter
from .._kinks import KinkShare, as_system, evaluations
from .._observe._assemble import recorded_trajectory
from .._observe._observables import Observation
from .._observe._time_grid import Span, fault_of, time_reached
from .._problem._problem import Problem
from .._rescaling import RescalingGroup
from .._results._trajectory import RESULTS, Trajectory, nan_unless, with_facts
from .._solvers import (
    AbstractTolerantSolver,
    ExponentialAdams,
    OnOrbit,
    Remembered,
    Rodas5P,
)
from ._diffrax_options import Method, gradient_evaluations
from ._error_estimate import with_error_estimate, without_derivatives
from ._save_plan import Recorded, recording
from ._vector_field import Equation, equation_of

#: Drift of the laws that waits to be undone, in units of the tolerance: until then it is no
#: larger than what steps may do to the weights, whose error is the same as without waiting.
UNNOTICED = 1.0
#: Where a solver remembers more numbers than this, one more pass through them is what
#: restoring steps costs, each of them: then only what is recorded is restored.
MOST_REMEMBERED = 2**20


class Run(NamedTuple):
    """A trajectory, and what its dynamics watched at the same times: NaN after failure.

    `coarse` is the same as `watched`, of the second solve for an error estimate.
    """

    trajectory: Trajectory
    watched: Any
    coarse: Any = None


def diffrax_flow(
    problem: Problem,
    span: Span,
    method: Method,
    *,
    dynamics: AbstractDynamics = GradientFlow(),  # noqa: B008
    max_steps: int,
    save_models: bool,
    adjoint: dfx.AbstractAdjoint | None,
    estimate_error: bool | None,
    progress: Progress,
) -> Run:
    """Moves `problem`'s weights by `method`, with an error estimate where it averages."""
    options = _Options(
        save_models=save_models,
        adjoint=dfx.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
        max_steps=max_steps,
    )
    coarser = None
    if method.is_averaging if estimate_error is None else estimate_error:
        coarser = _coarser(method)
    facts = (*((("dynamics", dynamics.name),) if dynamics.name else ()), *method.facts)
    method = method.without_facts()
    run = _solve(problem, dynamics, method, span, options, as_meter(progress))
    run = run._replace(trajectory=with_facts(run.trajectory, facts))
    if coarser is None:
        return run
    coarser = coarser.without_facts()

    # Only a figure is wanted: derivatives need not follow these solves.
    def at(method: Method) -> Run:
        still = without_derivatives((problem, dynamics, method, span))
        return _solve(*still, options, dfx.NoProgressMeter())

    coarse, coarsest = at(coarser), None
    if isinstance(method.solver, KinkShare):
        coarsest = at(_coarser(coarser)).trajectory
    estimated = with_error_estimate(
        run.trajectory, coarse.trajectory, problem.mask, coarsest
    )
    return Run(estimated, run.watched, coarse.watched)


class _Options(eqx.Module):
    save_models: bool = eqx.field(static=True)
    adjoint: dfx.AbstractAdjoint
    max_steps: int = eqx.field(static=True)


@quickly_compiled
@full_matmul_precision()
def _solve(
    problem: Problem,
    dynamics: AbstractDynamics,
    method: Method,
    span: Span,
    options: _Options,
    meter: dfx.AbstractProgressMeter,
) -> Run:
    fault = RESULTS.where(
        dynamics.fault() == RESULTS.successful,
        fault_of(problem, span, method.rtol),
        dynamics.fault(),
    )
    # A faulty problem must not be integrated: nothing would be learned, slowly.
    sound = fault == RESULTS.successful
    t1 = jnp.where(sound, span.t1, 0)
    ts = jnp.where(sound, span.times(), 0)

    equation = equation_of(problem, dynamics, method, options.save_models)
    plain, controller = _solver_and_controller(problem, method, equation, t1)
    solver, orbit = plain, equation.orbit
    if orbit is not None and not _remembers_much(plain, equation):
        solver = OnOrbit(plain, orbit, _unnoticed(method, t1))
    records = recording(
        equation, ts, t1, options.adjoint, has_memory=_tells_more(method)
    )
    solution = dfx.diffeqsolve(
        dfx.ODETerm(equation.field),
        solver,
        jnp.zeros_like(t1),
        t1,
        method.dt0,
        equation.start,
        args=equation.args,
        saveat=records.saveat,
        stepsize_controller=controller,
        adjoint=options.adjoint,
        event=_event(options.adjoint, method),
        max_steps=options.max_steps,
        throw=False,
        progress_meter=meter,
    )
    recorded = records.read(solution)
    seen, watched, saved = recorded.seen
    # Of a faulty problem nothing is recorded, not even the start.
    reached = jnp.where(sound, recorded.reached, -jnp.inf)
    removed = None
    if orbit is not None:
        removed = _removed(orbit, recorded, solution.solver_state)
    final = equation.weights(recorded.final)
    result = _result(fault, solution.result, seen, final)
    valid = _valid(span, seen, reached, result)
    times = span.times()
    numbers = {
        "steps": solution.stats["num_accepted_steps"],
        "rejected_steps": solution.stats["num_rejected_steps"],
        "time_reached": time_reached(result, times, valid, reached, span.t1),
        **_costs(problem, plain, solution, times.shape[0]),
    }
    if removed is not None:
        numbers["law_drift_removed"] = removed
    trajectory = recorded_trajectory(
        problem,
        times,
        seen,
        valid,
        final=final,
        saved=saved,
        result=result,
        numbers=numbers,
        facts=(("clock", "flow time"),),
    )
    return Run(trajectory, nan_unless(valid, watched))


def _solver_and_controller(
    problem: Problem, method: Method, equation: Equation, t1: Array
):
    if method.controller is not None:
        return method.solver, method.controller
    assert method.rtol is not None
    size = _scale(problem.weights)
    atol = method.rtol * size if method.atol is None else method.atol
    # Steps that the clock cannot resolve lead nowhere: weights blow up in finite time.
    dtmin = jnp.finfo(t1.dtype).eps * t1
    forced = method.most_steps is not None
    if method.most_steps is not None:
        dtmin = t1 / method.most_steps
    if isinstance(method.solver, AbstractTolerantSolver):
        solver = method.solver.at(method.rtol, atol)
        if isinstance(solver, ExponentialAdams) and equation.curvature is not None:
            solver = solver.informed(equation.curvature)
        return solver, solver.controller(dtmin=dtmin, force_dtmin=forced)
    controller = dfx.PIDController(
        rtol=method.rtol, atol=atol, dtmin=dtmin, force_dtmin=forced
    )
    return method.solver, controller


def _scale(weights: PyTree) -> Float[Array, ""]:
    """Root mean square of the weights; 1 where they are all zero."""
    leaves = jax.tree.leaves(jax.lax.stop_gradient(weights))
    square = jnp.sum(jnp.stack([jnp.sum(w**2) for w in leaves]))
    mean = square / sum(w.size for w in leaves)
    return jnp.sqrt(jnp.where(mean > 0, mean, 1))


def _unnoticed(method: Method, t1: Array) -> Float[Array, ""]:
    """The drift, relative to ‖w‖², that may wait for the next step to be undone."""
    if method.rtol is None:
        return jnp.zeros_like(t1)
    return UNNOTICED * method.rtol


def _remembers_much(solver: dfx.AbstractSolver, equation: Equation) -> bool:
    if not isinstance(solver, ExponentialAdams):
        return False
    return 2 * (solver.most_order + 1) * equation.start.size > MOST_REMEMBERED


def _removed(
    orbit: RescalingGroup, recorded: Recorded, memory: PyTree
) -> Float[Array, ""]:
    """The largest of the drifts that were removed, relative to ‖w‖²."""
    ends = map(orbit.values, (recorded.last, recorded.final))
    drifts = jax.tree.map(jnp.subtract, *ends)
    if isinstance(memory, Remembered):
        drifts = jax.tree.map(jnp.add, memory.removed, drifts)
    size = orbit.size(recorded.final)
    most = jnp.max(jnp.stack([jnp.max(jnp.abs(drift)) for drift in drifts]))
    return jax.lax.stop_gradient(most / jnp.where(size > 0, size, 1))


def _tells_more(method: Method) -> bool:
    """Whether the solver's memory says more of a run than Diffrax counts."""
    return bool(method.kept) or isinstance(method.solver, ExponentialAdams)


def _event(adjoint, method: Method) -> dfx.Event | None:
    # Where steps can be rejected those that are not finite are; and an event has what is
    # interpolated with copied in each step.
    rejects = method.controller is None and method.most_steps is None
    if isinstance(adjoint, dfx.BacksolveAdjoint) or rejects:
        return None

    def nonfinite(t, y, args, **kwargs):
        del t, args, kwargs
        return ~all_finite(y)

    return dfx.Event(nonfinite)


def _result(
    fault: RESULTS, solved: dfx.RESULTS, seen: Observation, final: PyTree
) -> RESULTS:
    finite = all_finite((seen, final))
    result = RESULTS.where(finite, RESULTS.successful, RESULTS.nonfinite)
    known = (
        (dfx.RESULTS.max_steps_reached, RESULTS.max_steps_reached),
        (dfx.RESULTS.dt_min_reached, RESULTS.step_size_too_small),
        (dfx.RESULTS.event_occurred, RESULTS.nonfinite),
    )
    failed = RESULTS.where(
        solved == dfx.RESULTS.successful, result, RESULTS.solver_failed
    )
    for theirs, ours in known:
        failed = RESULTS.where(solved == theirs, ours, failed)
    return RESULTS.where(fault == RESULTS.successful, failed, fault)


def _valid(
    span: Span, seen: Observation, reached: Array, result: RESULTS
) -> Bool[Array, " times"]:
    ok = result == RESULTS.successful
    finite = jax.vmap(all_finite)(seen)
    # Times the solver never came to were left at inf by Diffrax.
    return finite & (ok | (span.times() <= reached)) & (jnp.cumsum(~finite) == 0)


def _costs(
    problem: Problem, solver, solution: dfx.Solution, recorded: int
) -> dict[str, Array]:
    """Evaluations as far as they are known, with those for what is `recorded`."""
    costs = _costs_of_steps(problem, solver, solution)
    if "gradient_evaluations" in costs:
        costs["gradient_evaluations"] += recorded
    return costs


def _costs_of_steps(problem: Problem, solver, solution) -> dict[str, Array]:
    steps, memory = solution.stats["num_steps"], solution.solver_state
    if isinstance(solver, KinkShare):
        return {"gradient_evaluations": evaluations(as_system(problem), steps)}
    if isinstance(solver, ExponentialAdams):
        # `BacksolveAdjoint` keeps no memory.
        if memory is None:
            return {}
        if isinstance(memory, Remembered):
            memory = memory.inner
        accepted = solution.stats["num_accepted_steps"]
        return solver.counted(accepted, solution.stats["num_rejected_steps"], memory)
    count = gradient_evaluations(solver, steps)
    costs = {} if count is None else {"gradient_evaluations": count}
    if isinstance(solver, Rodas5P):
        costs["jacobian_evaluations"] = steps
    return costs


def _coarser(method: Method) -> Method:
    coarser = method.coarser()
    if coarser is None:
        raise ValueError(
            "`estimate_error` compares two tolerances, which are your "
            "`stepsize_controller`'s to choose: run the flow twice and `homoflow.compare` "
            "the two."
        )
    return coarser
