"""The exact flow of a problem with kinks, from a user's arguments to a trajectory."""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
from jaxtyping import Array

from .._jax._compilation import quickly_compiled
from .._jax._precision import full_matmul_precision
from .._jax._progress import Progress, as_meter
from .._jax._tracing import is_concrete
from .._jaxpr import nonsmooth_primitives
from .._kinks import Filippov, Solution, System, as_system, integrate, kinked_function
from .._kinks._layers import kink_layers
from .._observe._assemble import recorded_trajectory
from .._observe._observables import observe
from .._observe._time_grid import Span, fault_of, time_reached
from .._problem._checks import check_tolerance
from .._problem._losses import AbstractLoss, Risk
from .._problem._problem import Problem
from .._results._events import Events
from .._results._trajectory import RESULTS, Trajectory, with_facts
from ._diffrax_options import COARSER_RTOL, kinks_of
from ._error_estimate import with_error_estimate, without_derivatives
from ._float64 import in_float64, why_not_in_float64

#: Relative tolerance used when none is given.
EXACT_RTOL = 1e-8


#: Slots to begin with where their number is left open, and to grow to. The first number
#: is less than `MOST_ON_ONE_THREAD` in `_kinks/filippov/_sliding_field.py`.
FIRST_SLOTS, MOST_SLOTS = 120, 960


def exact_flow(
    problem: Problem,
    solver: Filippov,
    span: Span,
    *,
    rtol: Any,
    max_steps: int,
    save_models: bool,
    estimate_error: bool = False,
    why: str = "asked for",
    progress: Progress = False,
) -> Trajectory:
    """The flow of `problem` as a differential inclusion.

    A float32 problem is followed in float64, and what is found rounded. Raises
    `ValueError` for a problem that the solver cannot do, naming the reason.
    """
    reason = obstacle(problem)
    if reason is not None:
        raise ValueError(f"`homoflow.Filippov` cannot follow this flow: {reason}.")
    check_tolerance("rtol", rtol, problem.dtype)
    facts = (
        ("solver", "Filippov"),
        ("why", why),
        ("kinks", ", ".join(kinks_of(problem))),
    )

    def solved(problem: Problem, span: Span) -> Trajectory:
        goal = jnp.asarray(EXACT_RTOL if rtol is None else rtol, problem.dtype)
        options = _Options(
            FIRST_SLOTS, solver.events, max_steps, save_models, as_meter(progress)
        )
        trajectory = _solved(problem, span, goal, solver.slots, options, estimate_error)
        return with_facts(trajectory, facts)

    if problem.dtype == jnp.float64:
        return solved(problem, span)
    facts = (*facts, ("computed_in", "float64, and rounded at the end"))
    return in_float64(solved, problem, span)


def _solved(
    problem: Problem,
    span: Span,
    rtol: Array,
    slots: int | None,
    options: "_Options",
    estimate_error: bool,
) -> Trajectory:
    """One run, or with an error estimate two, with enough slots if left open."""

    def run(slots: int) -> Trajectory:
        return _solve(problem, rtol, span, dataclasses.replace(options, slots=slots))

    slots, trajectory = _with_room(run) if slots is None else (slots, run(slots))
    if not estimate_error:
        return trajectory
    # Only a figure is wanted: derivatives need not follow the second solve.
    still, until = without_derivatives((problem, span))
    options = dataclasses.replace(options, slots=slots, meter=dfx.NoProgressMeter())
    coarse = _solve(still, COARSER_RTOL * rtol, until, options)
    return with_error_estimate(trajectory, coarse, problem.mask)


def _with_room(solved: Callable[[int], Trajectory]) -> tuple[int, Trajectory]:
    """A run with as many slots as it needs, by compiling again with more.

    Inside jit or vmap it has `FIRST_SLOTS`: what happens there is not seen from here.
    """
    slots = FIRST_SLOTS
    while True:
        trajectory = solved(slots)
        result = trajectory.result
        enough = is_concrete(result) and result != RESULTS.kink_slots_exceeded
        if not is_concrete(result) or enough or slots >= MOST_SLOTS:
            return slots, trajectory
        slots *= 2


class _Options(eqx.Module):
    slots: int = eqx.field(static=True)
    events: int = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    save_models: bool = eqx.field(static=True)
    meter: dfx.AbstractProgressMeter


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


def exact_pairs(problem: Problem) -> int:
    """How many pairs of a sample and a kink the exact flow of a problem follows."""
    samples = jax.tree.leaves(problem.data)[0].shape[0]
    return samples * kinked_function(problem).count


def _loss_kinks(problem: Problem, objective: Risk) -> tuple[str, ...]:
    if isinstance(objective.loss, AbstractLoss):
        return ()  # Those have continuous gradients.
    x, y = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), problem.data
    )
    prediction = eqx.filter_eval_shape(problem.model, x)
    return nonsmooth_primitives(objective.loss, prediction, y)


@quickly_compiled
@full_matmul_precision()
def _solve(problem: Problem, rtol: Array, span: Span, options: _Options) -> Trajectory:
    fault = fault_of(problem, span, rtol)
    # A faulty problem must not be integrated: nothing would be learned, slowly.
    sound = fault == RESULTS.successful
    t1, ts = jnp.where(sound, span.t1, 0), jnp.where(sound, span.times(), 0)
    system = as_system(problem)
    w0, unravel = jax.flatten_util.ravel_pytree(problem.weights)

    def record(laws, w, loss, velocity):
        seen = observe(laws, unravel(w), loss, unravel(-velocity))
        # A figure about the run, like the others in `stats`.
        violation = jax.lax.stop_gradient(seen.law_violation)
        seen = eqx.tree_at(lambda s: s.law_violation, seen, violation)
        return seen, (w if options.save_models else None)

    solution = integrate(
        system,
        problem.laws,
        w0,
        t1,
        ts,
        record,
        rtol=rtol,
        room=min(options.slots, system.low.size),
        max_steps=options.max_steps,
        events=options.events,
        meter=options.meter,
    )
    return _trajectory(problem, span, options, fault, system, solution, unravel)


def _trajectory(
    problem: Problem,
    span: Span,
    options: _Options,
    fault: RESULTS,
    system: System,
    solution: Solution,
    unravel,
) -> Trajectory:
    seen, saved = solution.records
    final = unravel(solution.w)
    sound = fault == RESULTS.successful
    result = RESULTS.where(sound, _result(solution, span), fault)
    ts = span.times()
    recorded = sound & (jnp.arange(ts.size) < solution.recorded)
    valid = recorded & solution.is_finite
    reached = jnp.where(sound, solution.t, -jnp.inf)
    counts = solution.counts
    numbers = {
        "steps": solution.steps,
        "rejected_steps": solution.rejected,
        "crossings": counts["crossings"],
        "entries": counts["entries"],
        "exits": counts["exits"],
        "largest_sliding_set": counts["largest_sliding_set"],
        "non_unique": solution.non_unique,
        "leaps": counts["leaps"],
        "first_choice": jnp.where(
            jnp.isfinite(solution.first_choice), solution.first_choice, jnp.nan
        ),
        "gradient_evaluations": _in_gradients(problem, counts),
        "forward_passes": counts["forward"],
        "time_reached": time_reached(result, ts, valid, reached, span.t1),
    }
    return recorded_trajectory(
        problem,
        ts,
        seen,
        valid,
        final=final,
        saved=jax.vmap(unravel)(saved) if options.save_models else None,
        result=result,
        numbers=numbers,
        facts=(("clock", "flow time"),),
        events=_events(problem, system, sound, solution),
    )


def _events(
    problem: Problem, system: System, sound: Array, solution: Solution
) -> Events | None:
    log, kinks = solution.log, system.kinks
    if log is None:
        return None
    room = log.pair.size
    reached = jnp.where(sound, solution.t, 0)
    kept = log.pair >= 0
    return Events(
        times=log.time,
        samples=jnp.where(kept, log.pair // kinks, -1),
        kinks=jnp.where(kept, log.pair % kinks, -1),
        kinds=log.kind,
        count=jnp.minimum(log.seen, room),
        dropped=jnp.maximum(log.seen - room, 0),
        complete_until=jnp.minimum(log.overflowed_at, reached),
        layers=kink_layers(problem.model, system.function.operations),
        sample_count=system.samples,
    )


def _in_gradients(problem: Problem, counts) -> Array:
    """Evaluations of the whole gradient; a row is the gradient at one sample."""
    samples = jax.tree.leaves(problem.data)[0].shape[0]
    rows = counts["rows"].astype(problem.dtype) / samples
    return counts["gradients"].astype(problem.dtype) + rows


def _result(solution: Solution, span: Span) -> RESULTS:
    finished = solution.t >= span.t1
    result = RESULTS.where(finished, RESULTS.successful, RESULTS.max_steps_reached)
    ending = solution.ending
    for happened, member in (
        (ending.stuck, RESULTS.stuck_on_kinks),
        (ending.mode_unsettled, RESULTS.kink_mode_unsettled),
        (ending.overflows, RESULTS.kink_slots_exceeded),
        (ending.nonfinite | ~jnp.all(solution.is_finite), RESULTS.nonfinite),
    ):
        result = RESULTS.where(happened, member, result)
    return result
