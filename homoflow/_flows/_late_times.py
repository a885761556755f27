"""Times too late for an ordinary integration, where the loss is of exponential type."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._dynamics._base import AbstractDynamics
from .._dynamics._gradient_flow import GradientFlow
from .._dynamics._log_time import LogTime, degree_of
from .._jax._arguments import as_times
from .._jax._tracing import is_concrete
from .._kinks import num_pairs
from .._methods._defaults import (
    MAX_DENSE_WEIGHTS,
    MAX_FOLLOWED_PAIRS,
    STEADY_STATE_RTOL,
)
from .._methods._filippov import obstacle
from .._observe._time_grid import DEFAULT_TIMES
from .._problem._log_risk import against_log_risk
from .._problem._problem import Problem
from .._problem._smoothness import kinks_of

#: From this time on a flow whose loss falls like 1/t is solved in logarithmic time. An
#: explicit solver takes some t·λ_max steps, and from 1e12 on none that the clock resolves.
MIN_LATE_TIME = 1e8


class LateTimes(NamedTuple):
    """The dynamics in logarithmic time, with end and recorded times in its variable.

    `shown`: the recorded times as they were asked for.
    """

    dynamics: LogTime
    end: Array
    ts: Array
    rtol: Any
    shown: Array


def late_times(
    problem: Problem, dynamics: AbstractDynamics, times: tuple[Any, Any, Any], rtol: Any
) -> LateTimes | None:
    """How to go to a late time, or `None` where the flow is solved in time itself.

    `times` are `(t0, t1, ts)`, as they were given.
    """
    t0, t1, ts = times
    is_plain = isinstance(dynamics, GradientFlow) and dynamics.weight_decay is None
    if not (is_plain and is_concrete((t0, t1, ts)) and _is_real_number(t1)):
        return None
    if float(t0) != 0 or not np.isfinite(float(t1)):
        return None
    is_late = float(t1) >= MIN_LATE_TIME and problem.num_weights <= MAX_DENSE_WEIGHTS
    if not is_late or problem.dtype != jnp.float64 or against_log_risk(problem):
        return None
    shown = np.linspace(0, float(t1), DEFAULT_TIMES) if ts is None else as_times(ts)
    shown = np.asarray(shown, float)
    is_fine = shown.size and np.all(np.diff(shown) > 0) and shown[0] >= 0
    if not _may_have_kinks(problem) or not is_fine or shown[-1] > float(t1):
        return None  # Faulty times are refused where a flow's are.
    late = LogTime(jnp.ones((), problem.dtype), degree_of(problem))
    with np.errstate(divide="ignore"):
        logs = jnp.asarray(np.log(shown), problem.dtype)
    end = late.sigma_at(jnp.log(jnp.asarray(t1, problem.dtype)))
    sigma = jnp.minimum(late.sigma_at(logs), end)
    rtol = STEADY_STATE_RTOL if rtol is None else rtol
    return LateTimes(late, end, sigma, rtol, jnp.asarray(shown))


def _may_have_kinks(problem: Problem) -> bool:
    """Whether a problem has none, or such as are followed one by one."""
    if not kinks_of(problem):
        return True
    return obstacle(problem) is None and num_pairs(problem) <= MAX_FOLLOWED_PAIRS


def _is_real_number(t1: Any) -> bool:
    """Whether it is one; anything else is refused where a flow's arguments are."""
    values = np.asarray(t1)
    return values.ndim == 0 and values.dtype.kind in "fiu"
