"""What a run that has ended says against itself."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from .._jax._enumerations import names_of
from .._jax._tracing import is_concrete, is_concrete_call
from .._methods._error_estimate import without_derivatives
from .._methods._task import Task, is_finite_at_start
from .._results._status import RESULTS
from .._results._trajectory import Trajectory

#: Weights with a larger estimated error have not converged.
_MAX_ERROR = 0.1
#: An estimate is above the tolerance from so many times it on: they are rounded.
_MORE = 1.001
#: Farther than this from the limit of its direction a flow was not there yet.
_NEAR = 0.05
#: How a run may end whose gradient is NaN from the start.
_MAYBE_AT_START = (
    "nonfinite", "step_size_too_small", "max_steps_reached", "solver_failed",
    "end_not_reached", "stuck_on_kinks", "kink_mode_unsettled",
)  # fmt: skip


def restored_a_broken_law(trajectory: Trajectory, task: Task) -> bool:
    """Whether projection, which nobody asked for, has made the flow another one."""
    if task.project is not None or not is_concrete(trajectory.result):
        return False
    return bool(np.all(names_of(trajectory.result, RESULTS) == "law_broken"))


def named_at_start(trajectory: Trajectory, task: Task) -> Trajectory:
    """The run, or with `nonfinite_at_start` if its loss or gradient was NaN from there.

    Asked only where a run has failed and nothing that it recorded tells.
    """
    if is_concrete_call((task.given, trajectory)):
        is_bad = (
            str(names_of(trajectory.result, RESULTS)) in _MAYBE_AT_START
            and not np.isfinite(np.asarray(trajectory.losses)).any()
            and not bool(is_finite_at_start(task.given))
        )
        if not is_bad:
            return trajectory
        return dataclasses.replace(trajectory, result=RESULTS.nonfinite_at_start)
    result, given = trajectory.result, without_derivatives(task.given)
    has_failed = [result == getattr(RESULTS, name) for name in _MAYBE_AT_START]
    may_be = jnp.any(jnp.stack(has_failed)) & ~jnp.any(jnp.isfinite(trajectory.losses))
    is_bad = jax.lax.cond(
        may_be, lambda: ~is_finite_at_start(given), lambda: jnp.zeros((), bool)
    )
    result = RESULTS.where(is_bad, RESULTS.nonfinite_at_start, result)
    return dataclasses.replace(trajectory, result=result)


def warn_if_far_from_limit(trajectory: Trajectory) -> None:
    """A warning where the direction was still on its way to the limit that is returned."""
    if trajectory.limit is None:
        return
    distance = float(trajectory.stats["direction_distance"])
    if distance <= _NEAR:
        return
    log_t = float(trajectory.stats["log_time_reached"])
    warnings.warn(
        f"At log t = {log_t:.3g} the flow's direction was still {distance:.2g} from the "
        "limit that is returned. The rest of the way is that of the flow's smallest "
        "margins, which is not the flow itself: that `limit` is a point of maximal margin "
        "is certified, that the flow goes to it is not.",
        stacklevel=4,
    )


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
