"""Late flow on separable data until its direction has come to a limit."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..._dynamics._log_time import MAX_DEGREE, LogTime
from ..._observe._base import FunctionOfPoint, Point
from ..._observe._time_grid import TimeGrid
from ..._problem._log_risk import log_risk
from ..._problem._problem import Problem
from ..._results._margin_certificate import MarginCertificate
from ..._results._status import RESULTS
from ..._results._trajectory import Trajectory
from .._defaults import MAX_DENSE_WEIGHTS
from .._task import Task
from ._certificate import certificate_at, why_no_certificate
from ._creep import creep_to_limit
from ._margins import flat_weights, margins_at
from ._polish import polish

#: Values of s = log(t/time unit) at which the direction of a smooth flow is looked at.
SMOOTH_STAGES = (0.0, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10)
#: From there on of a direction that is not near a limit it is asked where it would go.
CREEPS_FROM = 1e5
#: How often it is recorded in between.
_RECORDS = 12
#: What does not separate the data at this s never will: the flow has stopped elsewhere.
_HOPELESS = 50.0
#: Two late times tell of one limit where the flow has come this close, and the points next
#: to both have the same margins.
_CLOSE, _SAME = 0.05, 1e-8
#: So far it may be from the point where the flow's own limit leads.
_FAR = 0.5
#: A distance below which it need not fall further: margins of 1e10 round to that.
_NEAREST = 1e-6
#: A curvature that is not below 0, relative to that of ½‖w‖², which is 1.
_MIN_CURVATURE = -1e-8
#: So far away, relative to the weights' size, it is asked whether margins are homogeneous.
_AWAY = 0.1


class LimitDirection(NamedTuple):
    """The flow in logarithmic time, and the limit of its direction if there is one.

    - `parts`: its trajectories, one after the other, and `log_ts` of each: logarithms of
        its times.
    - `certificate`: of the limit; `moved` is the distance of the last direction from it.
    - `is_separated`: whether the last direction separates the data; `None` where it was
        not asked.
    - `result`: how the last part ended.
    """

    parts: list[Trajectory]
    log_ts: list[np.ndarray]
    certificate: MarginCertificate | None
    is_separated: bool | None = None
    result: RESULTS = RESULTS.successful


@dataclasses.dataclass(frozen=True)
class LogClock:
    """Times `since` + `unit`·(eˢ − 1) of a flow that is followed in s.

    `degree`: of the margins.
    """

    since: float
    unit: float
    degree: Array

    @property
    def dynamics(self) -> LogTime:
        return LogTime(jnp.asarray(self.unit), self.degree)

    def log_times(self, s: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            rest = np.log1p((self.since / self.unit - 1) * np.exp(-s))
        return np.log(self.unit) + s + rest


def why_no_limit(problem: Problem) -> str | None:
    """Why the limit of directions is not looked for; `None` if it is."""
    if problem.num_weights > MAX_DENSE_WEIGHTS:
        return f"there are more than {MAX_DENSE_WEIGHTS} weights"
    reason = why_no_certificate(problem)
    if reason is not None:
        return reason
    w = flat_weights(problem)
    # Where all biases are 0 a network may look homogeneous that is not.
    size = float(np.linalg.norm(w)) / np.sqrt(w.size) or 1.0
    w = w + _AWAY * size * np.random.default_rng(0).standard_normal(w.size)
    try:
        degree = margins_at(problem, w).degree(w)
    except ValueError as error:
        return str(error)
    return None if degree <= MAX_DEGREE else f"margins of degree above {MAX_DEGREE:g}"


def follow_to_limit_direction(
    task: Task,
    follow: Callable[[Task, int], Trajectory],
    problem: Problem,
    clock: LogClock,
    stages: Sequence[float],
    steps: int,
    creeps_from: float,
) -> LimitDirection:
    """The flow from `problem`'s weights at s = `stages[0]`, until it shows a limit.

    `follow(task, steps)` solves a task over its grid, of which `steps` are left; `steps`:
    how many of the task's it has taken before.

    The end is where two late times show the same point of maximal margin, of which the
    flow's direction has come closer from the first to the second. From s = `creeps_from` on
    that may be the point where the flow's own limit goes from there, where none is near.
    Where the point is a saddle of the margin, as the curvature says, it goes on: that is
    believed at the last stage only.
    """
    task = late_task(task, clock)
    parts: list[Trajectory] = []
    log_ts: list[np.ndarray] = []
    before, saddle, is_separated = None, None, None
    for start, end in itertools.pairwise(stages):
        s = stage_times(start, end)[1:]
        part = follow(on_grid(task, problem, clock, start, s), task.max_steps - steps)
        steps += int(part.stats["steps"] + part.stats["rejected_steps"])
        if part.result != RESULTS.successful or steps > task.max_steps:
            return LimitDirection(parts, log_ts, saddle, is_separated, part.result)
        parts.append(part)
        log_ts.append(clock.log_times(s))
        problem = problem_at_end(problem, part)
        is_separated = bool(
            np.min(margins_at(problem, flat_weights(problem)).values) > 0
        )
        if not is_separated and end >= _HOPELESS:
            break
        creeps = end >= creeps_from
        found = _candidate(problem, creeps=creeps) if is_separated else None
        saddle = None
        if found is not None and _show_one_limit(before, found):
            saddle = found.point
            if saddle.curvature >= _MIN_CURVATURE:
                return LimitDirection(parts, log_ts, saddle, True)
        before = found
    return LimitDirection(parts, log_ts, saddle, is_separated)


class _Candidate(NamedTuple):
    """A point of maximal margin near a late direction, and how near it may have to be."""

    point: MarginCertificate
    closest: float


def _candidate(problem: Problem, *, creeps: bool) -> _Candidate | None:
    """The point next to the direction or, where it `creeps`, that to which it goes."""
    try:
        near = polish(problem, certificate_at(problem))
        if (near is not None and near.moved <= _CLOSE) or not creeps:
            return None if near is None else _Candidate(near, _CLOSE)
        far = creep_to_limit(problem)
    except ValueError:  # Kinks above kinks: no certificate is made.
        return None
    return None if far is None else _Candidate(far, _FAR)


def _show_one_limit(before: _Candidate | None, now: _Candidate | None) -> bool:
    """Whether two late times, with the points that belong to them, show one limit."""
    if before is None or now is None:
        return False
    if not now.point.moved <= min(now.closest, max(before.point.moved, _NEAREST)):
        return False
    margins = (np.asarray(at.point.margins) for at in (now, before))
    return bool(np.max(np.abs(next(margins) / next(margins) - 1)) <= _SAME)


def problem_at_end(problem: Problem, part: Trajectory) -> Problem:
    """The problem with the weights at which a run of it has ended."""
    weights = eqx.filter(part.model, problem.mask)
    return eqx.tree_at(lambda p: p.weights, problem, weights)


def log_loss_at(point: Point) -> Float[Array, ""]:
    """log L of an observed point."""
    return log_risk(point.problem, point.weights)


def late_task(task: Task, clock: LogClock) -> Task:
    """The task in logarithmic time, with the logarithms of losses recorded."""
    recorder = dataclasses.replace(
        task.recorder,
        observables={
            **task.recorder.observables,
            "log_losses": FunctionOfPoint(function=log_loss_at),
        },
    )
    return dataclasses.replace(
        task,
        dynamics=clock.dynamics,
        recorder=recorder,
        estimate_error=False,
        progress=False,
    )


def stage_times(start: float, end: float) -> np.ndarray:
    """Values of s from one end of a stage to the other."""
    s = np.expm1(np.linspace(np.log1p(start), np.log1p(end), _RECORDS + 1))
    s[0], s[-1] = start, end
    return s


def on_grid(
    task: Task, problem: Problem, clock: LogClock, start: float, s: np.ndarray
) -> Task:
    """The task from `problem`'s weights at s = `start` to the last of `s`."""
    sigma = clock.dynamics.sigma_of(jnp.asarray(np.append(start, s)))
    grid = TimeGrid(sigma[0], sigma[-1], sigma[1:])
    return dataclasses.replace(task, problem=problem, given=problem, grid=grid)
