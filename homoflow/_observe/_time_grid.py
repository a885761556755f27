"""From when to when a run goes, and the times at which it is recorded."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._jax._arguments import as_times, check_number
from .._jax._arrays import all_finite
from .._jax._tracing import is_concrete
from .._problem._checks import tolerance_floor
from .._problem._problem import Problem
from .._results._status import RESULTS
from ._recorder import Values

#: Times recorded when none are asked for.
DEFAULT_TIMES = 101


class TimeGrid(eqx.Module):
    """From `t0` to `t1`, recorded at `ts`, or at equally spaced times.

    `offset`: what the run's own clock shows at time 0 of the grid, if that is not 0.
    """

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    ts: Float[Array, " times"] | None
    offset: Float[Array, ""] | None = None

    def times(self) -> Float[Array, " times"]:
        """The times to record at."""
        if self.ts is not None:
            return self.ts
        # Constants: XLA would round a quotient so that the last time may be beyond t1.
        fractions = np.arange(DEFAULT_TIMES) / (DEFAULT_TIMES - 1)
        return self.t0 + (self.t1 - self.t0) * jnp.asarray(fractions, self.t1.dtype)

    def emptied_unless(self, is_valid: Bool[Array, ""]) -> "TimeGrid":
        """The same grid, or one of length 0 for input that must not be integrated."""
        ts = jnp.where(is_valid, self.times(), self.t0)
        t1 = jnp.where(is_valid, self.t1, self.t0)
        return TimeGrid(self.t0, t1, ts, self.offset)

    def on_clock(self, t: Float[Array, ""]) -> Float[Array, ""]:
        """The time t of the grid on the run's own clock."""
        return t if self.offset is None else self.offset + t


def make_time_grid(t0: Any, t1: Any, ts: Any, dtype: jnp.dtype) -> TimeGrid:
    """The grid that a user's arguments describe; `ValueError` if they make no sense."""
    check_number("t1", t1)
    start = jnp.asarray(t0, dtype)
    if is_concrete(t1) and not (np.isfinite(float(t1)) and float(t1) > 0):
        raise ValueError(f"`t1` must be positive and finite; got {t1}.")
    end = jnp.asarray(t1, dtype)
    if is_concrete((start, end)) and not float(end) > float(start):
        raise ValueError(
            f"`t1` must come after t = {float(start):g}, where the run that is continued "
            f"ended; got {float(end):g}."
        )
    if ts is None:
        return TimeGrid(start, end, _default_times(start, end))
    times = as_times(ts).astype(dtype)
    if is_concrete((times, start, end)):
        _check_times(np.asarray(times), float(start), float(end))
    return TimeGrid(start, end, times)


def _default_times(start: Array, end: Array) -> Array | None:
    """Equally spaced times as numbers, where they are known.

    So that a program for these does for as many others.
    """
    if not is_concrete((start, end)):
        return None
    t0, t1 = np.asarray(start), np.asarray(end)
    fractions = (np.arange(DEFAULT_TIMES) / (DEFAULT_TIMES - 1)).astype(t1.dtype)
    times = np.minimum(t0 + (t1 - t0) * fractions, t1)
    times[-1] = t1
    return jax.device_put(times)


def _check_times(times: np.ndarray, t0: float, t1: float) -> None:
    if not np.all(np.diff(times) > 0):
        raise ValueError("`ts` must be increasing, without repetition.")
    if not (times[0] >= t0 and times[-1] <= t1):
        begin = "0" if t0 == 0 else f"{t0:g}"
        raise ValueError(
            f"`ts` must lie in [{begin}, t1] = [{begin}, {t1:g}]; got "
            f"[{times[0]:g}, {times[-1]:g}]."
        )


def input_error(problem: Problem, grid: TimeGrid, rtol: Array | None) -> RESULTS:
    """What is wrong with the input, found where its values are known."""
    error = RESULTS.successful
    if rtol is not None:
        floor = tolerance_floor(problem.dtype)
        error = RESULTS.where(rtol >= floor, error, RESULTS.bad_tolerance)
    ts = grid.times()
    ordered = jnp.all(jnp.diff(ts) > 0) & (ts[0] >= grid.t0) & (ts[-1] <= grid.t1)
    error = RESULTS.where(ordered, error, RESULTS.bad_times)
    is_positive = jnp.isfinite(grid.t1) & (grid.t1 > grid.t0)
    error = RESULTS.where(is_positive, error, RESULTS.bad_time)
    of_values = values_error(problem)
    return RESULTS.where(of_values == RESULTS.successful, error, of_values)


def values_error(problem: Problem) -> RESULTS:
    """What is wrong with a problem's numbers, found where they are known."""
    is_finite = all_finite(problem.data)
    are_read = problem.accepts_targets()
    error = RESULTS.where(are_read, RESULTS.successful, RESULTS.bad_labels)
    error = RESULTS.where(is_finite, error, RESULTS.bad_data)
    return RESULTS.where(all_finite(problem.weights), error, RESULTS.bad_weights)


def is_nonfinite_at_start(grid: TimeGrid, values: Values) -> Bool[Array, ""]:
    """Whether the loss or its gradient is NaN or inf at the start, if that is recorded."""
    first = values["losses"][0], values["grad_norms"][0]
    return (grid.times()[0] == grid.t0) & ~all_finite(first)


def time_reached(result, valid, reached, grid: TimeGrid) -> Float[Array, ""]:
    """The time up to which a run that ended with `result` is known."""
    ts = grid.times()
    last_valid = jnp.max(jnp.where(valid, ts, grid.t0), initial=-jnp.inf)
    first_invalid = jnp.min(jnp.where(valid, jnp.inf, ts), initial=jnp.inf)
    # A solver may go on for a while after the loss has overflowed.
    is_known = jnp.isfinite(reached) & (reached < first_invalid)
    stopped = jnp.where(is_known, reached, jnp.maximum(last_valid, grid.t0))
    end = jnp.where(result == RESULTS.successful, grid.t1, stopped)
    return end.astype(grid.t1.dtype)
