"""Flows to a stationary point: `t1=inf`."""

import dataclasses
from typing import Any, final

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import numpy as np

from .._dynamics._log_time import degree_of
from .._jax._arguments import as_times
from .._kinks import num_pairs
from .._observe._time_grid import make_time_grid
from .._problem._log_risk import against_log_risk
from .._problem._problem import Problem
from .._problem._smoothness import kinks_of
from .._results._failure import TrajectoryInterrupt
from .._results._reason import REQUESTED, Reason
from .._results._stationary_kind import StationaryKind
from .._results._status import RESULTS
from .._results._trajectory import Trajectory, with_facts
from ._averaged import Averaged
from ._base import AbstractMethod
from ._choose import Auto
from ._defaults import STEADY_STATE_RTOL
from ._diffrax import Diffrax, make_facts, settings_of
from ._exact import MAX_ACTIVE, MAX_ACTIVE_BY_DEFAULT
from ._filippov import Filippov
from ._integrate import integrate
from ._projection_choice import choose_projection
from ._sample_reduction import reduce_samples
from ._settings import Settings
from ._task import Task, is_finite_at_start
from ._vanishing import run_to_rest, starts_from_nothing
from .margin import (
    CREEPS_FROM,
    SMOOTH_STAGES,
    LogClock,
    follow_kinks_to_limit_direction,
    follow_to_limit_direction,
    why_no_limit,
    with_limit_direction,
)
from .stationary import Outcome, Segment, numbers_of, solve_to_stationary_point


@final
class SteadyState(AbstractMethod):
    """The flow by another method, in segments, until it is at a stationary point."""

    method: AbstractMethod

    def run(self, task: Task, reason: Reason = REQUESTED) -> Trajectory:
        method = self.method
        self._refuse_options(task)
        if kinks_of(task.given):
            return _run_on_kinks(task, method)
        if isinstance(method, Auto) and not method.has_options:
            at_rest = run_to_rest(task) if starts_from_nothing(task) else None
            if at_rest is not None:
                return at_rest
        task = reduce_samples(task)
        rtol = task.rtol
        is_default = isinstance(method, Auto)
        if isinstance(method, Auto):
            has_controller = method.stepsize_controller is not None
            selection = method.select_for(task)
            reason = selection.reason
            is_dense = reason.code == "few_weights_steady_state"
            rtol = STEADY_STATE_RTOL if is_dense and rtol is None else rtol
            is_default = not has_controller
            method = selection.method
        assert isinstance(method, Diffrax)
        if not bool(is_finite_at_start(task.given)):
            # A flow of any length ends at once, and says so.
            grid = make_time_grid(0, 1, None, task.given.dtype)
            return method.run(dataclasses.replace(task, grid=grid), reason)
        plan = choose_projection(task, is_default_solver=is_default)
        task = dataclasses.replace(task, rtol=rtol)
        settings = settings_of(task, method, plan, has_kinks=False)
        trajectory = solve_to_stationary_point(
            task, settings, report=_print if task.progress else lambda segment: None
        )
        trajectory = _with_direction(trajectory, task, settings)
        name = type(method.solver).__name__
        return with_facts(trajectory, make_facts(task, name, reason, (), plan))

    def _refuse_options(self, task: Task) -> None:
        _refuse_problem(task)
        method = self.method
        _refuse_names(task)
        _refuse_thinned(task)
        if kinks_of(task.given):
            _refuse_on_kinks(task, method)
            return
        if isinstance(method, Filippov | Averaged):
            raise ValueError(
                f"`homoflow.{type(method).__name__}` is for models with kinks; this one "
                "has none. Leave `solver` out."
            )
        if not isinstance(method, Auto | Diffrax):
            raise ValueError(
                f"`homoflow.{type(method).__name__}` does not know `t1=inf`: give a "
                "finite `t1`, or one of Diffrax's solvers."
            )
        wishes = (
            ("adjoint", method.adjoint),
            ("estimate_error", task.estimate_error or method.error_estimate),
        )
        for name, given in wishes:
            if given:
                raise ValueError(
                    f"`{name}` is for flows of finite length: with `t1=inf` leave it out."
                )
        if isinstance(task.progress, dfx.AbstractProgressMeter):
            raise ValueError(
                "A flow with `t1=inf` has no end to measure progress by: `progress=True` "
                "prints how far it is."
            )


def _with_direction(
    trajectory: Trajectory, task: Task, settings: Settings
) -> Trajectory:
    """The trajectory; if it separates the data, with the limit of its direction."""
    if trajectory.stats["stationary_kind"] != StationaryKind.diverges:
        return trajectory
    weights = eqx.filter(trajectory.model, task.given.mask)
    problem = eqx.tree_at(lambda p: p.weights, task.given, weights)
    if settings.controller is not None or why_no_limit(problem) is not None:
        return trajectory
    elapsed = float(trajectory.stats["time_reached"])
    clock = LogClock(elapsed, elapsed, degree_of(problem))
    used = int(trajectory.stats["steps"] + trajectory.stats["rejected_steps"])
    settings = dataclasses.replace(settings, dt0=None)

    def follow(task: Task, steps: int) -> Trajectory:
        del steps  # Another bound would compile another program.
        return integrate(task, settings, adjoint=None)

    try:
        late = follow_to_limit_direction(
            task, follow, problem, clock, SMOOTH_STAGES, used, CREEPS_FROM
        )
    except KeyboardInterrupt as interrupt:
        partial = dataclasses.replace(trajectory, result=RESULTS.interrupted)
        raise TrajectoryInterrupt(partial) from interrupt
    if late.certificate is None:
        return trajectory
    is_free = task.ts is None
    return with_limit_direction(trajectory, late, problem, records=is_free)


def _run_on_kinks(task: Task, method: AbstractMethod) -> Trajectory:
    """The exact flow, to the limit of its direction on separable data."""
    room, reason = MAX_ACTIVE, REQUESTED
    if isinstance(method, Auto):
        room = MAX_ACTIVE_BY_DEFAULT
        pairs = f"{num_pairs(task.given):,} pairs of a sample and a kink"
        reason = Reason("nonsmooth_exact", f"{pairs}: each is followed")
        method = Filippov(atol=method.atol)
    assert isinstance(method, Filippov)

    def follow(part: Task, steps: int) -> Trajectory:
        short = dataclasses.replace(part, max_steps=steps)
        run = method.run_in_room(short, reason, room)
        if task.progress:
            print(f"t = e^{np.log(run.stats['time_reached']):.4g}", flush=True)
        return run

    nowhere = numbers_of(Outcome(RESULTS.no_stationary_point, StationaryKind.diverges))
    return follow_kinks_to_limit_direction(task, follow, nowhere)


def _refuse_on_kinks(task: Task, method: AbstractMethod) -> None:
    """`ValueError` where a flow with kinks has no end that is looked for."""
    problem, kinks = task.given, ", ".join(kinks_of(task.given))
    begin = f"The gradient jumps at {kinks}: a flow with kinks comes to rest on them"
    why = against_log_risk(problem)
    if why is not None:
        raise ValueError(
            f"{begin}, where there is no Hessian to tell minima from saddles. Give a "
            "finite `t1`. (On separable data the limit of the direction is looked for "
            f"where the loss allows it: {why}.)"
        )
    if isinstance(method, Auto):
        grid = make_time_grid(0, 1, None, problem.dtype)
        exact = method.select_for(dataclasses.replace(task, grid=grid))
        why = None if isinstance(exact.method, Filippov) else exact.reason.text
    elif not isinstance(method, Filippov):
        why = "that is looked for by the exact flow: leave `solver` out"
    elif method.events:
        why = "`events` are kept of flows with a finite `t1`"
    why = why or why_no_limit(problem)
    if why is None and task.estimate_error:
        why = "`estimate_error` is for flows of finite length: leave it out"
    if why is not None:
        raise ValueError(
            f"{begin}, or goes on in a direction, whose limit is not found here: {why}."
        )


def _refuse_thinned(task: Task) -> None:
    thinned = [name for name, n in task.recorder.every.items() if n > 1]
    if thinned:
        raise ValueError(
            "With `t1=inf` the flow chooses its times itself: "
            f"`observe[{thinned[0]!r}]` must have `every=1`."
        )


def _refuse_names(task: Task) -> None:
    taken = {"log_ts", "log_losses"} & task.recorder.observables.keys()
    if taken and against_log_risk(task.given) is None:
        raise ValueError(
            f"{min(taken)!r} is recorded in any case where the data are separable: choose "
            "another name in `observe`."
        )


def _refuse_problem(task: Task) -> None:
    problem: Problem = task.given
    if not task.is_untraced:
        raise ValueError(
            "`t1=inf` decides between segments of the flow whether it is at its end, in "
            "Python: it cannot be inside of jit, vmap or grad. Loop over seeds in Python "
            "(nothing is compiled again), or give a finite `t1`."
        )
    if not task.dynamics.is_gradient_flow:
        raise ValueError(
            f"`t1=inf` is for the gradient flow: give the {task.dynamics.name} a finite "
            "`t1`."
        )
    if problem.dtype != jnp.float64:
        raise ValueError(
            f"The weights are {problem.dtype.name}: what a stationary point is can be "
            "decided in float64 only. Run `jax.config.update('jax_enable_x64', True)` "
            "before anything else and make the weights float64, or give a finite `t1`."
        )


def steady_state_times(ts: Any, dtype: Any) -> np.ndarray | None:
    """Times that a flow to a stationary point passes; `ValueError` if they are none."""
    if ts is None:
        return None
    times = np.asarray(as_times(ts), float)
    last = float(times.ravel()[-1]) if times.size else np.nan
    if not (np.isfinite(last) and last > 0):
        raise ValueError(
            "With `t1=inf`, `ts` must be finite times that end after 0: the flow passes "
            "them on its way."
        )
    return np.asarray(make_time_grid(0, last, times, dtype).ts)


def _print(segment: Segment) -> None:
    flow = segment.trajectory
    known = np.flatnonzero(np.isfinite(np.asarray(flow.losses)))
    if len(known):
        loss, slope = flow.losses[known[-1]], flow.grad_norms[known[-1]]
        print(f"t = {segment.end:.4g}: loss {loss:.6g}, ‖∇L‖ {slope:.3g}", flush=True)
