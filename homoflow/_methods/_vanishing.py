"""Flows from vanishing starts in the logarithms of their weights, as a method."""

import dataclasses
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._dynamics._gradient_flow import GradientFlow
from .._dynamics._log_weights import LogWeights, against_log_weights
from .._results._reason import REQUESTED, Reason
from .._results._trajectory import Trajectory
from .._solvers import Rodas5P
from ._base import AbstractMethod
from ._defaults import MAX_DENSE_WEIGHTS, MAX_VANISHING, STEADY_STATE_RTOL
from ._diffrax import Diffrax
from ._task import Task


@final
class InLogarithms(AbstractMethod):
    """Gradient flow as the flow of log|w|, on the same clock; `rtol` is that of weights."""

    error_estimate: bool | None = eqx.field(static=True, default=None)

    def run(self, task: Task, reason: Reason = REQUESTED) -> Trajectory:
        rtol = STEADY_STATE_RTOL if task.rtol is None else task.rtol
        signs = jax.tree.map(jnp.sign, task.given.weights)
        in_logs = LogWeights(jnp.zeros((), task.given.dtype), signs)
        task = dataclasses.replace(task, dynamics=in_logs, rtol=rtol)
        method = Diffrax(Rodas5P(), atol=rtol, error_estimate=self.error_estimate)
        return method.run(task, reason)


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
