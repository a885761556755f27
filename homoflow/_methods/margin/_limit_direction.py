"""Late flow on separable data until its direction has come to a limit."""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..._dynamics._log_time import MAX_DEGREE, LogTime, degree_of
from ..._observe._base import FunctionOfPoint, Point
from ..._observe._time_grid import TimeGrid
from ..._problem._log_risk import log_risk
from ..._problem._problem import Problem
from ..._problem._smoothness import kinks_of
from ..._results._margin_certificate import MarginCertificate
from ..._results._status import RESULTS
from ..._results._trajectory import Trajectory
from .._defaults import MAX_DENSE_WEIGHTS
from .._integrate import integrate
from .._settings import Settings
from .._task import Task
from ._certificate import certificate_at, why_no_certificate
from ._margins import flat_weights, margins_at
from ._polish import polish

#: Values of s = log(t/time unit) at which the direction is looked at, and how often it is
#: recorded in between.
_STAGES, _RECORDS = (1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10), 12
#: Two late times tell of one limit where the flow has come this close, and the points next
#: to both have the same margins.
_CLOSE, _SAME = 0.05, 1e-8
#: A distance below which it need not fall further: margins of 1e10 round to that.
_NEAREST = 1e-6
#: A curvature that is not below 0, relative to that of ½‖w‖², which is 1.
_MIN_CURVATURE = -1e-8


class LimitDirection(NamedTuple):
    """The flow in logarithmic time, and the limit of its direction if there is one.

    - `parts`: its trajectories, one after the other, and `log_ts` of each: logarithms of
        the times since it separated the data.
    - `certificate`: of the limit; `moved` is the distance of the last direction from it.
    """

    parts: list[Trajectory]
    log_ts: list[np.ndarray]
    certificate: MarginCertificate | None


def why_no_limit(problem: Problem, settings: Settings) -> str | None:
    """Why the limit of directions is not looked for; `None` if it is."""
    if kinks_of(problem):
        return "the gradient jumps"
    if settings.controller is not None:
        return "steps are not homoflow's to choose"
    if problem.num_weights > MAX_DENSE_WEIGHTS:
        return f"there are more than {MAX_DENSE_WEIGHTS} weights"
    reason = why_no_certificate(problem)
    if reason is not None:
        return reason
    w = flat_weights(problem)
    try:
        degree = margins_at(problem, w).degree(w)
    except ValueError as error:
        return str(error)
    return None if degree <= MAX_DEGREE else f"margins of degree above {MAX_DEGREE:g}"


def follow_to_limit_direction(
    task: Task, settings: Settings, problem: Problem, elapsed: float, steps: int
) -> LimitDirection | None:
    """The flow from `problem`'s weights at the time `elapsed`, when they separate the data.

    `steps`: how many of the task's it has taken before.

    The end is where two late times show the same point of maximal margin, of which the
    flow's direction has come closer from the first to the second. Where that is a saddle of
    the margin, as the curvature says, it goes on: that is believed at the last stage only.
    `None` where the margins are not homogeneous, or the like.
    """
    if why_no_limit(problem, settings) is not None:
        return None
    dynamics = LogTime(jnp.asarray(elapsed), degree_of(problem))
    settings = dataclasses.replace(settings, dt0=None)
    recorder = dataclasses.replace(
        task.recorder,
        observables={
            **task.recorder.observables,
            "log_losses": FunctionOfPoint(function=log_loss_at),
        },
    )
    task = dataclasses.replace(
        task, dynamics=dynamics, recorder=recorder, estimate_error=False, progress=False
    )
    parts: list[Trajectory] = []
    log_ts: list[np.ndarray] = []
    before, saddle, s = None, None, 0.0
    for end in _STAGES:
        part, times = _stage(task, settings, problem, dynamics, s, end)
        steps += int(part.stats["steps"] + part.stats["rejected_steps"])
        if part.result != RESULTS.successful or steps > task.max_steps:
            break
        parts.append(part)
        log_ts.append(np.log(elapsed) + times + np.log(-np.expm1(-times)))
        problem, s = problem_at_end(problem, part), end
        found = polish(problem, certificate_at(problem))
        is_limit = _show_one_limit(before, found)
        if found is not None and is_limit and found.curvature >= _MIN_CURVATURE:
            return LimitDirection(parts, log_ts, found)
        before, saddle = found, found if is_limit else None
    return LimitDirection(parts, log_ts, saddle)


def _show_one_limit(
    before: MarginCertificate | None, now: MarginCertificate | None
) -> bool:
    """Whether two late times, with the points next to them, show one limit."""
    if before is None or now is None:
        return False
    if not now.moved <= min(_CLOSE, max(before.moved, _NEAREST)):
        return False
    change = np.abs(np.asarray(now.margins) / np.asarray(before.margins) - 1)
    return bool(np.max(change) <= _SAME)


def problem_at_end(problem: Problem, part: Trajectory) -> Problem:
    """The problem with the weights at which a run of it has ended."""
    weights = eqx.filter(part.model, problem.mask)
    return eqx.tree_at(lambda p: p.weights, problem, weights)


def log_loss_at(point: Point) -> Float[Array, ""]:
    """log L of an observed point."""
    return log_risk(point.problem, point.weights)


def _stage(
    task: Task,
    settings: Settings,
    problem: Problem,
    dynamics: LogTime,
    start: float,
    end: float,
) -> tuple[Trajectory, np.ndarray]:
    """From s = `start` to `end`; the first of the recorded times comes after the start."""
    s = np.expm1(np.linspace(np.log1p(start), np.log1p(end), _RECORDS + 1))
    s[0], s[-1] = start, end
    sigma = dynamics.sigma_of(jnp.asarray(s))
    grid = TimeGrid(sigma[0], sigma[-1], sigma[1:])
    task = dataclasses.replace(task, problem=problem, given=problem, grid=grid)
    return integrate(task, settings, adjoint=None), s[1:]
