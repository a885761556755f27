"""What a run that did not finish raises."""

import equinox as eqx

from .._jax._tracing import is_concrete
from ._status import RESULTS
from ._trajectory import Trajectory


class TrajectoryError(RuntimeError):
    """A run that did not finish. What it did compute is in `trajectory`."""

    def __init__(self, message: str, trajectory: Trajectory):
        super().__init__(message)
        self.trajectory = trajectory


class TrajectoryInterrupt(KeyboardInterrupt):
    """A run that the user ended. What it had computed is in `trajectory`."""

    def __init__(self, trajectory: Trajectory):
        super().__init__("What was computed is in this error's `trajectory`.")
        self.trajectory = trajectory


def raise_unless_successful(trajectory: Trajectory) -> Trajectory:
    """The trajectory, or `TrajectoryError` if it did not finish.

    Inside jit or vmap the error is raised when the compiled function runs.
    """
    result, reached = trajectory.result, trajectory.stats["time_reached"]
    if not is_concrete((result, reached)):
        failed = result != RESULTS.successful
        losses = eqx.error_if(
            trajectory.losses,
            failed,
            "A homoflow run did not finish; pass throw=False to see its `result`.",
        )
        return eqx.tree_at(lambda t: t.losses, trajectory, losses)
    message = RESULTS[result]
    if message == "":
        return trajectory
    where = f" It got to t = {float(reached):.6g}"
    step = trajectory.stats["diverged_at_step"]
    if step is not None and int(step) >= 0:
        where += f", step {int(step)}"
    raise TrajectoryError(
        f"{message}{where}. What was computed is in this error's `trajectory`; with "
        "`throw=False` it is returned.",
        trajectory,
    )
