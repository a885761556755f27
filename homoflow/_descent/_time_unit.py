"""What the times of a run of gradient descent are, in numbers and in a sentence."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._jax._tracing import is_concrete
from ._clock import Clock, ClockState, Defects

#: Steps whose factors differ by less are said to take the same time.
_SAME = 1e-6


class TimeUnit(eqx.Module):
    """The times of a run, and what they are.

    - `ts`: flow time, or where there is none the sum of learning rates.
    - `defect`: what speaks against flow time; 0 if nothing does.
    - `defects`: the same by kind.
    - `rate_times`: the sums of learning rates.
    - `memory_left`: the part of the optimizer's memory that is older than the run.
    """

    ts: Float[Array, " times"]
    defect: Float[Array, ""]
    defects: Defects
    rate_times: Float[Array, " times"]
    memory_left: Float[Array, ""]
    clock: Clock

    @property
    def fact(self) -> str:
        """One line for `stats`."""
        if self.clock.reason:
            return _sum_of_rates(self.clock.reason)
        if not is_concrete(self.defects):
            return (
                'flow time where `stats["clock_defect"]` is 0, and the sum of learning '
                "rates elsewhere: that depends on numbers which are not known yet."
                + self._of_decay()
            )
        if float(self.defect) > 0:
            return _sum_of_rates(self._verdict())
        notes = self._of_factors() + self._of_memory() + self._of_decay()
        return f"flow time:{notes}" if notes else "flow time"

    def _verdict(self) -> str:
        tolerance = self.clock.tolerance
        defects = jax.tree.map(float, self.defects)
        if defects.backward > 0:
            return "some steps go up the gradient, so there is no gradient-flow limit."
        if defects.unforgotten > 0:
            return (
                "the optimizer forgets no gradient, so there is no gradient-flow limit."
            )
        if defects.off_gradient > tolerance:
            return (
                "steps leave the gradient's direction, as by clipping or signs, by "
                f"{defects.off_gradient:.1g} of their size, so there is no gradient-flow "
                "limit."
            )
        return "weights move at different rates, so the limit is a preconditioned flow."

    def _of_factors(self) -> str:
        rates = np.diff(np.asarray(self.rate_times, float))
        factors = np.diff(np.asarray(self.ts, float))[rates > 0] / rates[rates > 0]
        if not factors.size:
            return ""
        least, largest = factors.min(), factors.max()
        if not largest - least <= _SAME * abs(largest):
            return f" steps of η take between {least:.3g} η and {largest:.3g} η."
        if abs(largest - 1) <= _SAME:
            return ""
        if self.clock.is_followed:
            return f" steps of η take {largest:.6g} η in the mean."
        settled = " once momentum has settled" if self.clock.has_memory else ""
        return f" a step of η takes time {largest:.6g} η{settled}."

    def _of_memory(self) -> str:
        if float(self.memory_left) <= 0.5:
            return ""
        return (
            " Momentum has not settled by the end of this run: the weights are behind the "
            "flow."
        )

    def _of_decay(self) -> str:
        if not self.clock.has_decay:
            return ""
        return " weights decay, so the limit is the flow with weight decay."


def time_unit_of(
    clock: Clock,
    state: ClockState | None,
    steps: int | Int[Array, ""],
    ts: Float[Array, " times"],
    rate_times: Float[Array, " times"],
) -> TimeUnit:
    """The times of a run that has ended: `ts`, or `rate_times` if they are no flow time."""
    defects = clock.defects_after(state)
    if clock.reason:
        defect = jnp.ones_like(defects.largest)
    else:
        defect = jnp.where(defects.largest <= clock.tolerance, 0, defects.largest)
    if state is not None:
        ts = jnp.where(defect == 0, ts, rate_times)
    memory_left = clock.memory_left(state, steps)
    return TimeUnit(ts, defect, defects, rate_times, memory_left, clock)


def _sum_of_rates(reason: str) -> str:
    return f"sum of learning rates: {reason}"
