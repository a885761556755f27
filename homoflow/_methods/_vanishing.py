"""Flows from vanishing starts in the logarithms of their weights, as a method."""

import dataclasses
import functools
from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._dynamics._gradient_flow import GradientFlow
from .._dynamics._log_weights import LogWeights, against_log_weights
from .._laws import Laws
from .._observe._recorder import Recorder
from .._observe._time_grid import make_time_grid
from .._problem._problem import Problem
from .._results._reason import REQUESTED, Reason
from .._results._status import RESULTS
from .._results._trajectory import Trajectory
from .._solvers import Rodas5P
from ._base import AbstractMethod
from ._defaults import MAX_DENSE_WEIGHTS, MAX_VANISHING, STEADY_STATE_RTOL
from ._diffrax import Diffrax
from ._rest import COARSE_RTOL, OF_STATE, follow_to_rest
from ._task import Task

#: Why logarithms are taken, as `stats["solver_reason"]` says it.
WHY = (
    f"all weights start below {MAX_VANISHING:g} and each acts by its square: their "
    "logarithms move at constant speeds between saddles"
)


@final
class InLogarithms(AbstractMethod):
    """Gradient flow as the flow of log|w|, on the same clock; `rtol` is that of weights."""

    error_estimate: bool | None = eqx.field(static=True, default=None)

    def run(self, task: Task, reason: Reason = REQUESTED) -> Trajectory:
        rtol = STEADY_STATE_RTOL if task.rtol is None else task.rtol
        in_logs = _logarithms_of(task.given)
        task = dataclasses.replace(task, dynamics=in_logs, rtol=rtol)
        method = Diffrax(Rodas5P(), atol=rtol, error_estimate=self.error_estimate)
        return method.run(task, reason)


def run_to_rest(task: Task) -> Trajectory | None:
    """The flow to its stationary point; `None` where it is not seen to come to rest."""
    problem, rtol = task.given, task.rtol
    rtol = STEADY_STATE_RTOL if rtol is None else rtol
    in_logs = _logarithms_of(problem)
    bare = Recorder.create(Laws(()), {}, {"log_weights": OF_STATE})

    def follow(t1: float, ts: np.ndarray, **changes: Any) -> Trajectory:
        grid = make_time_grid(0, t1, ts, problem.dtype)
        finite = dataclasses.replace(task, grid=grid, ts=None, **changes)
        return InLogarithms().run(finite, Reason("vanishing_start", WHY))

    def look(t1: float, ts: np.ndarray) -> Trajectory:
        coarse = {"rtol": COARSE_RTOL, "recorder": bare, "save_models": False}
        return follow(t1, ts, **coarse)

    wanted = functools.partial(follow, rtol=rtol)
    laws = task.recorder.laws
    trajectory = follow_to_rest(problem, in_logs, look, wanted, task.ts, laws)
    return trajectory if trajectory.result == RESULTS.successful else None


def _logarithms_of(problem: Problem) -> LogWeights:
    signs = jax.tree.map(jnp.sign, problem.weights)
    return LogWeights(jnp.zeros((), problem.dtype), signs)


def starts_from_nothing(task: Task) -> bool:
    """Whether a flow begins so close to 0, in a model of which logarithms can be taken.

    Observables of a user see the state of the dynamics, which is to be the weights.
    """
    dynamics, problem = task.dynamics, task.given
    is_plain = isinstance(dynamics, GradientFlow) and dynamics.weight_decay is None
    if not is_plain or task.project or task.recorder.sees_problem:
        return False
    if not task.is_untraced or problem.num_weights > MAX_DENSE_WEIGHTS:
        return False
    largest = max(
        np.max(np.abs(w), initial=0) for w in jax.tree.leaves(problem.weights)
    )
    is_tiny = 0 < float(largest) < MAX_VANISHING
    return is_tiny and against_log_weights(problem) is None
