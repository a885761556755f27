"""What a method is: it computes the trajectory that a task asks for."""

import abc

import equinox as eqx

from .._results._reason import REQUESTED, Reason
from .._results._trajectory import Trajectory
from ._task import Task


class AbstractMethod(eqx.Module):
    """A way to follow a flow, as `solver` of `homoflow.flow`."""

    @abc.abstractmethod
    def run(self, task: Task, reason: Reason = REQUESTED) -> Trajectory:
        """The trajectory; `ValueError` for what the method cannot honour.

        `reason` says why it was chosen, for `stats["solver_reason"]`.
        """
