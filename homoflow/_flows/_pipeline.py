"""From a user's arguments to a trajectory: make the task, run the method, raise."""

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

from .._dynamics._base import AbstractDynamics
from .._dynamics._gradient_flow import GradientFlow
from .._jax._arguments import as_times, check_flag, check_instance, check_number
from .._jax._progress import Progress, check_progress
from .._laws import Law
from .._laws._as_laws import laws_to_record
from .._methods._base import AbstractMethod
from .._methods._choose import adapt_method
from .._methods._steady_state import SteadyState, steady_state_times
from .._methods._task import Task, is_infinite
from .._observe._base import Observables, as_observables
from .._observe._recorder import STANDARD, Recorder
from .._observe._time_grid import DEFAULT_TIMES, make_time_grid
from .._problem._checks import as_max_steps, check_laws
from .._problem._problem import Problem
from .._results._failure import raise_unless_successful
from .._results._trajectory import Trajectory
from ._judge_run import (
    named_at_start,
    restored_a_broken_law,
    warn_if_far_from_limit,
    warn_if_inaccurate,
)


def make_task(
    problem: Problem,
    times: tuple[Any, Any, Any],
    dynamics: AbstractDynamics,
    *,
    observe: Observables | None,
    laws: Iterable[Law] | None,
    is_continued: bool,
    rtol: Any,
    project: bool | None,
    save_models: bool,
    estimate_error: bool | None,
    max_steps: int,
    progress: Progress,
) -> Task:
    """What a method is asked to compute, checked; `times` are `(t0, t1, ts)`."""
    t0, t1, ts = times
    max_steps = as_max_steps(max_steps)
    check_number("t1", t1)
    if rtol is not None:
        check_number("rtol", rtol)
    check_flag("project", project, may_be_none=True)
    check_flag("save_models", save_models)
    check_flag("estimate_error", estimate_error, may_be_none=True)
    check_progress(progress)
    check_laws(laws)
    dynamics.check(problem)
    if is_continued and dynamics.has_memory:
        raise ValueError(
            f"A run of the {dynamics.name} cannot go on from a trajectory, which keeps "
            "the weights alone: give the model, and the rest of the state."
        )
    recorded = laws_to_record(problem, laws)
    asked = as_observables(observe, STANDARD)
    num_times = DEFAULT_TIMES if ts is None else len(as_times(ts))
    of_dynamics = dynamics.observables(recorded.whole)
    recorder = Recorder.create(recorded, of_dynamics, asked, num_times)
    if is_infinite(t1):
        grid, passed = None, steady_state_times(ts, problem.dtype)
        if is_continued:
            raise ValueError(
                "`t1=inf` starts a clock of its own: pass `previous.model`."
            )
    else:
        grid, passed = make_time_grid(t0, t1, ts, problem.dtype), None
    return Task(
        problem=problem,
        given=problem,
        dynamics=dynamics,
        recorder=recorder,
        grid=grid,
        ts=passed,
        rtol=rtol,
        project=project,
        has_user_laws=laws is not None,
        save_models=save_models,
        estimate_error=estimate_error,
        max_steps=max_steps,
        progress=progress,
    )


def choose_dynamics(dynamics: Any, weight_decay: Any) -> AbstractDynamics:
    """The dynamics that a user's arguments describe."""
    if dynamics is None:
        return GradientFlow(weight_decay)
    what = "one of homoflow's dynamics, such as `homoflow.GradientFlow()`"
    check_instance("dynamics", dynamics, AbstractDynamics, what)
    if weight_decay is not None:
        raise ValueError(
            "`weight_decay` belongs to the gradient flow: give it to your `dynamics`."
        )
    return dynamics


def run(task: Task, method: AbstractMethod, throw: bool) -> Trajectory:
    """The trajectory by a method; an error or a warning where it is no answer."""
    is_steady = task.grid is None
    method = SteadyState(method) if is_steady else adapt_method(method, task)
    trajectory = method.run(task)
    if restored_a_broken_law(trajectory, task):
        warnings.warn(
            "A law that holds at random weights is broken where this flow goes: it was "
            "solved again without restoring laws.",
            stacklevel=3,
        )
        trajectory = method.run(dataclasses.replace(task, project=False))
    trajectory = named_at_start(trajectory, task)
    task.dynamics.warn(trajectory)
    if throw:
        trajectory = raise_unless_successful(trajectory)
    warn_if_inaccurate(trajectory, task)
    warn_if_far_from_limit(trajectory)
    return trajectory
