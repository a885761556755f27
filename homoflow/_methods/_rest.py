"""When a flow in the logarithms of its weights has come to rest, and where."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .._dynamics._log_weights import LogWeights
from .._jax._arguments import as_times
from .._jax._tracing import is_concrete_call
from .._laws import Laws
from .._observe._base import FunctionOfPoint, Point
from .._observe._time_grid import DEFAULT_TIMES
from .._problem._problem import Problem
from .._results._status import RESULTS
from .._results._trajectory import Trajectory, with_gradients_of
from .stationary import stationary_point_near

#: The tolerance with which the end is looked for.
COARSE_RTOL = 1e-5
#: How often the end is looked for, each time so many times as late; at how many times.
_MAX_LOOKS, _LATER, _LOOKED_AT = 6, 100.0, 200
#: The loss is at rest where this share of its fall is left, and runs last so much longer.
_AT_REST, _BEYOND = 1e-6, 1.25


def _logs(point: Point) -> PyTree[Array]:
    return point.state


OF_STATE = FunctionOfPoint(function=_logs)


class _Rest(NamedTuple):
    """When the flow has come to rest, and the runs that it took to find that out."""

    is_found: bool
    time: float
    runs: list[Trajectory]


def follow_to_rest(
    problem: Problem,
    dynamics: LogWeights,
    look: Callable[[float, np.ndarray], Trajectory],
    follow: Callable[[float, np.ndarray], Trajectory],
    ts: Any,
    laws: Laws,
) -> Trajectory:
    """The run up to when the flow has come to rest, with its stationary point.

    `look(t1, ts)` is a coarse run that records `log_weights`, `follow(t1, ts)` the one that
    is wanted. Where no rest is found it is the last of the coarse ones, with its failure.
    """
    rest = _find_rest(problem, dynamics, look)
    if not rest.is_found:
        return rest.runs[-1]
    times = _times_to(rest.time, ts)
    trajectory = follow(max(rest.time, float(times[-1])), times)
    if trajectory.result == RESULTS.successful:
        trajectory = _ended(problem, trajectory, laws)
    return with_gradients_of([*rest.runs, trajectory])


def _find_rest(
    problem: Problem,
    dynamics: LogWeights,
    look: Callable[[float, np.ndarray], Trajectory],
) -> _Rest:
    """Looks at ever later times until no weight is about to grow."""
    if not is_concrete_call((problem, dynamics)):
        raise ValueError(
            "`t1=inf` decides in Python where the flow is at its end: it cannot be inside "
            "of jit, vmap or grad."
        )
    start = dynamics.init(problem)
    rates = dynamics.velocity(problem, jnp.zeros(()), start)
    fastest = max(float(jnp.max(jnp.abs(r))) for r in jax.tree.leaves(rates))
    lowest = min(float(jnp.min(z)) for z in jax.tree.leaves(start))
    first = (1 + max(0.0, -lowest)) / (fastest or 1.0)
    runs, last = [], first
    for _ in range(_MAX_LOOKS):
        last *= _LATER
        times = np.concatenate([[0], np.geomspace(first / 100, last, _LOOKED_AT)])
        trajectory = look(last, times)
        runs.append(trajectory)
        if trajectory.result != RESULTS.successful:
            return _Rest(False, last, runs)
        losses = np.asarray(trajectory.losses)
        moving = losses - losses[-1] > _AT_REST * (losses[0] - losses[-1])
        rest = float(times[np.flatnonzero(moving)[-1] + 1]) if moving.any() else first
        if _stays(problem, dynamics, trajectory, last - rest):
            return _Rest(True, _BEYOND * rest, runs)
    failed = dataclasses.replace(runs[-1], result=RESULTS.end_not_reached)
    return _Rest(False, last, [*runs[:-1], failed])


def _stays(
    problem: Problem, dynamics: LogWeights, trajectory: Trajectory, rested: float
) -> bool:
    """Whether the flow is at rest since long, and no small weight is on its way back."""
    logs = jax.tree.map(lambda z: z[-1], trajectory.observed["log_weights"])
    rates = dynamics.velocity(problem, jnp.zeros(()), logs)
    pairs = zip(jax.tree.leaves(logs), jax.tree.leaves(rates), strict=True)
    grown = max(float(jnp.max(jnp.where(z < 0, r, 0))) for z, r in pairs)
    span = float(trajectory.ts[-1])
    return rested > span / 2 and grown * span < 1


def _times_to(rest: float, ts: Any) -> np.ndarray:
    if ts is None:
        return np.linspace(0, rest, DEFAULT_TIMES)
    return np.asarray(as_times(ts), float)


def _ended(problem: Problem, trajectory: Trajectory, laws: Laws) -> Trajectory:
    """The run with the stationary point that its end leads to."""
    end = stationary_point_near(problem, trajectory.model, laws)
    stats = trajectory.stats.with_numbers(**end.numbers)
    return dataclasses.replace(
        trajectory, model=end.model, result=end.result, stats=stats
    )
