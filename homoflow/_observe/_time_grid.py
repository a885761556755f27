"""The times of a flow, and what is wrong with a problem whose values are traced."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._jax._arrays import all_finite
from .._jax._tracing import is_concrete
from .._problem._checks import tolerance_floor
from .._problem._problem import Problem
from .._results._status import RESULTS

#: Times recorded when none are asked for.
DEFAULT_TIMES = 101


class Span(eqx.Module):
    """From 0 to `t1`, recorded at `ts`, or at equally spaced times."""

    t1: Float[Array, ""]
    ts: Float[Array, " times"] | None

    def times(self) -> Float[Array, " times"]:
        if self.ts is not None:
            return self.ts
        # Constants: XLA would round a quotient so that the last time may be beyond t1.
        fractions = np.arange(DEFAULT_TIMES) / (DEFAULT_TIMES - 1)
        return self.t1 * jnp.asarray(fractions, self.t1.dtype)


def checked_span(t1: Any, ts: Any, dtype: jnp.dtype) -> Span:
    """The span that a user's arguments describe; `ValueError` if they make no sense."""
    if jnp.ndim(t1) != 0:
        raise ValueError(f"`t1` must be one number; got shape {jnp.shape(t1)}.")
    if is_concrete(t1) and not (np.isfinite(float(t1)) and float(t1) > 0):
        raise ValueError(f"`t1` must be positive and finite; got {t1}.")
    end = jnp.asarray(t1, dtype)
    if ts is None:
        return Span(end, None)
    times = jnp.asarray(ts if eqx.is_array_like(ts) else list(ts), dtype)
    if times.ndim != 1 or times.shape[0] == 0:
        raise ValueError(f"`ts` must be a sequence of times; got shape {times.shape}.")
    if is_concrete((times, end)):
        values = np.asarray(times)
        if not np.all(np.diff(values) > 0):
            raise ValueError("`ts` must be increasing, without repetition.")
        if not (values[0] >= 0 and values[-1] <= float(end)):
            raise ValueError(
                f"`ts` must lie in [0, t1] = [0, {float(end):g}]; got "
                f"[{values[0]:g}, {values[-1]:g}]."
            )
    return Span(end, times)


def fault_of(problem: Problem, span: Span, rtol: Array | None) -> RESULTS:
    """What is wrong with the input, found where its values are known."""
    fault = RESULTS.successful
    if rtol is not None:
        floor = tolerance_floor(problem.dtype)
        fault = RESULTS.where(rtol >= floor, fault, RESULTS.bad_tolerance)
    ts = span.times()
    ordered = jnp.all(jnp.diff(ts) > 0) & (ts[0] >= 0) & (ts[-1] <= span.t1)
    fault = RESULTS.where(ordered, fault, RESULTS.bad_times)
    good_time = jnp.isfinite(span.t1) & (span.t1 > 0)
    fault = RESULTS.where(good_time, fault, RESULTS.bad_time)
    fault = RESULTS.where(all_finite(problem.data), fault, RESULTS.bad_data)
    return RESULTS.where(all_finite(problem.weights), fault, RESULTS.bad_weights)


def time_reached(result, ts, valid, reached, t1) -> Float[Array, ""]:
    """The time up to which a run that ended with `result` is known."""
    last_valid = jnp.max(jnp.where(valid, ts, 0), initial=0)
    first_invalid = jnp.min(jnp.where(valid, jnp.inf, ts), initial=jnp.inf)
    # A solver may go on for a while after the loss has overflowed.
    known = jnp.isfinite(reached) & (reached < first_invalid)
    stopped = jnp.where(known, reached, last_valid)
    return jnp.where(result == RESULTS.successful, t1, stopped).astype(t1.dtype)
