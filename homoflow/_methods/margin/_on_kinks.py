"""The exact flow through kinks in logarithmic time, to the limit of its direction."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from ..._dynamics._log_time import degree_of
from ..._problem._problem import Problem
from ..._results._stats import Stats
from ..._results._status import RESULTS
from ..._results._totals import totals
from ..._results._trajectory import Trajectory
from .._task import Task
from ._extend import with_late_records, with_limit_direction
from ._limit_direction import (
    LimitDirection,
    LogClock,
    follow_to_limit_direction,
    late_task,
    on_grid,
    problem_at_end,
    stage_times,
)

#: Values of s = log(1 + t) at which the direction is looked at. The steps that follow each
#: kink are explicit, and as long in s everywhere: s = 1e5 takes a hundred thousand or more.
_STAGES = (10.0, 30.0, 1e2, 3e2, 1e3, 3e3, 1e4, 3e4)
#: From there on of a direction that is not near a limit it is asked where it would go.
_CREEPS_FROM = 1e3


def follow_kinks_to_limit_direction(
    task: Task,
    follow: Callable[[Task, int], Trajectory],
    numbers: dict[str, object],
) -> Trajectory:
    """The run from t = 0 to the limit of its direction, or to where there is none.

    `follow(task, steps)` solves a task over its grid, of which `steps` are left. `numbers`
    are those of a flow to its end, for `stats`.
    """
    problem = task.given
    clock = LogClock(0.0, 1.0, degree_of(problem))
    first = follow(_first_stage(task, problem, clock), task.max_steps)
    result, late = first.result, LimitDirection([], [], None)
    if result == RESULTS.successful:
        used = int(first.stats["steps"] + first.stats["rejected_steps"])
        at = problem_at_end(problem, first)
        begin = float(np.log1p(first.stats["time_reached"]))
        stages = (begin, *(s for s in _STAGES if s > 1.1 * begin))
        late = follow_to_limit_direction(
            task, follow, at, clock, stages, used, _CREEPS_FROM
        )
        result = late.result
    costs = totals([first, *late.parts])
    first = dataclasses.replace(first, stats=_stats(first, dict(numbers)))
    if late.certificate is not None:
        return with_limit_direction(first, late, problem, records=task.ts is None)
    if result == RESULTS.successful or result == RESULTS.max_steps_reached:
        result = RESULTS.end_not_reached
        if late.is_separated:
            result = RESULTS.no_stationary_point
    longer = with_late_records(first, late, problem) if task.ts is None else first
    return dataclasses.replace(
        longer,
        model=[first, *late.parts][-1].model,
        result=result,
        stats=_stats(first, dict(costs)),
    )


def _stats(run: Trajectory, numbers: dict[str, object]) -> Stats:
    return Stats({**run.stats.numbers, **numbers}, run.stats.facts)


def _first_stage(task: Task, problem: Problem, clock: LogClock) -> Task:
    """From t = 0, recorded where it was asked for, or from t = 0 on."""
    s = stage_times(0.0, _STAGES[0])
    late = late_task(task, clock)
    if task.ts is None:
        return _recorded_at(on_grid(late, problem, clock, 0.0, s[1:]), clock, s)
    asked = np.log1p(task.ts)
    end = max(_STAGES[0], float(asked[-1]))
    return _recorded_at(
        on_grid(late, problem, clock, 0.0, np.array([end])), clock, asked
    )


def _recorded_at(task: Task, clock: LogClock, s: np.ndarray) -> Task:
    assert task.grid is not None
    sigma = jnp.minimum(clock.dynamics.sigma_of(jnp.asarray(s)), task.grid.t1)
    return dataclasses.replace(task, grid=dataclasses.replace(task.grid, ts=sigma))
