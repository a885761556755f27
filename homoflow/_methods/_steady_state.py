"""Flows to a stationary point: `t1=inf`."""

import dataclasses
from typing import Any, final

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import numpy as np

from .._jax._arguments import as_times
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
from ._filippov import Filippov
from ._projection_choice import choose_projection
from ._sample_reduction import reduce_samples
from ._settings import Settings
from ._task import Task, is_finite_at_start
from .margin import follow_to_limit_direction, with_limit_direction
from .stationary import Segment, solve_to_stationary_point


@final
class SteadyState(AbstractMethod):
    """The flow by another method, in segments, until it is at a stationary point."""

    method: AbstractMethod

    def run(self, task: Task, reason: Reason = REQUESTED) -> Trajectory:
        method = self.method
        self._refuse_options(task)
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
        _refuse_names(task)
        thinned = [name for name, n in task.recorder.every.items() if n > 1]
        if thinned:
            raise ValueError(
                "With `t1=inf` the flow chooses its times itself: "
                f"`observe[{thinned[0]!r}]` must have `every=1`."
            )


def _with_direction(
    trajectory: Trajectory, task: Task, settings: Settings
) -> Trajectory:
    """The trajectory; if it separates the data, with the limit of its direction."""
    if trajectory.stats["stationary_kind"] != StationaryKind.diverges:
        return trajectory
    weights = eqx.filter(trajectory.model, task.given.mask)
    problem = eqx.tree_at(lambda p: p.weights, task.given, weights)
    elapsed = float(trajectory.stats["time_reached"])
    used = int(trajectory.stats["steps"] + trajectory.stats["rejected_steps"])
    try:
        late = follow_to_limit_direction(task, settings, problem, elapsed, used)
    except KeyboardInterrupt as interrupt:
        partial = dataclasses.replace(trajectory, result=RESULTS.interrupted)
        raise TrajectoryInterrupt(partial) from interrupt
    if late is None or late.certificate is None:
        return trajectory
    is_free = task.ts is None
    return with_limit_direction(trajectory, late, problem, records=is_free)


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
    kinks = kinks_of(problem)
    if kinks:
        raise ValueError(
            f"The gradient jumps at {', '.join(kinks)}: a flow with kinks comes to rest "
            "on them, where there is no Hessian to tell minima from saddles. Give a "
            "finite `t1`."
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
