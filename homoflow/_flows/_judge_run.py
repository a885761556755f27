"""What a run that has ended says against itself."""

import warnings

import numpy as np

from .._jax._enumerations import names_of
from .._jax._tracing import is_concrete, is_concrete_call
from .._methods._task import Task, is_finite_at_start
from .._results._status import RESULTS
from .._results._trajectory import Trajectory

#: Weights with a larger estimated error have not converged.
_MAX_ERROR = 0.1
#: An estimate is above the tolerance from so many times it on: they are rounded.
_MORE = 1.001
#: How a run may end whose gradient is NaN from the start.
_MAYBE_AT_START = frozenset(
    {
        "nonfinite",
        "step_size_too_small",
        "max_steps_reached",
        "solver_failed",
        "end_not_reached",
        "stuck_on_kinks",
        "kink_mode_unsettled",
    }
)


def restored_a_broken_law(trajectory: Trajectory, task: Task) -> bool:
    """Whether projection, which nobody asked for, has made the flow another one."""
    if task.project is not None or not is_concrete(trajectory.result):
        return False
    return bool(np.all(names_of(trajectory.result, RESULTS) == "law_broken"))


def is_nonfinite_at_start(trajectory: Trajectory, task: Task) -> bool:
    """Whether a run failed because its loss or gradient is NaN or inf from the start.

    Asked only where a run has failed and nothing that it recorded tells.
    """
    if not is_concrete_call((task.given, trajectory)):
        return False
    if str(names_of(trajectory.result, RESULTS)) not in _MAYBE_AT_START:
        return False
    if np.isfinite(np.asarray(trajectory.losses)).any():
        return False
    return not bool(is_finite_at_start(task.given))


def warn_if_inaccurate(trajectory: Trajectory, task: Task) -> None:
    """A warning where a run's own error estimate exceeds the tolerance asked for."""
    estimate = trajectory.stats["error_estimate"]
    if estimate is None or not is_concrete((estimate, task.rtol)):
        return
    error = float(np.max(estimate))
    rtol = None if task.rtol is None else float(np.min(task.rtol))
    what = f"The relative error of the final weights is estimated at {error:.2g}"
    if error > _MAX_ERROR:
        warnings.warn(
            f"{what}: they have not converged. (Losses and laws may have: see "
            "`loss_error_estimate`.) Lower `rtol`, or pass `solver=homoflow.Filippov()`, "
            "which follows each kink.",
            stacklevel=4,
        )
    elif rtol is not None and error > _MORE * rtol:
        warnings.warn(
            f"{what}, which is {error / rtol:.2g} times `rtol`, the tolerance of a single "
            "step: lower `rtol` to make it smaller.",
            stacklevel=4,
        )
