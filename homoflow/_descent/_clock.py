"""The flow's clock in gradient descent: how much flow time one step takes.

A step of gradient descent with learning rate η takes time η; with momentum μ the
velocity settles at 1/(1−μ) times the gradient, and a step takes η/(1−μ). What holds of an
optimizer is read off its updates along the run, step by step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._flow_response import Memory, Response, read_response, respond
from ._read_update import Reading

#: Parts of a step that are no multiple of the gradient count from here on, in units of
#: rounding.
_ROUNDINGS = 1024
#: In half precision rounding is no part to neglect.
_MAX_TOLERANCE = 0.03


class Defects(eqx.Module):
    """What speaks against flow time, as the largest relative part of a step.

    - `between_arrays`: how far arrays of weights are apart in the time of a step.
    - `off_gradient`: what is no multiple of the gradient.
    - `backward`: 1 if a step goes up the gradient.
    - `unforgotten`: 1 if all gradients are remembered for ever.
    """

    between_arrays: Float[Array, ""]
    off_gradient: Float[Array, ""]
    backward: Float[Array, ""]
    unforgotten: Float[Array, ""]

    @property
    def largest(self) -> Float[Array, ""]:
        largest = jnp.maximum(self.between_arrays, self.off_gradient)
        return jnp.maximum(largest, jnp.maximum(self.backward, self.unforgotten))


class ClockState(eqx.Module):
    """The clock of a run that is under way.

    - `elapsed`: flow time since the start; `lost`: what rounding has taken from it.
    - `memory`: what the optimizer would remember of a constant gradient.
    """

    elapsed: Float[Array, ""]
    lost: Float[Array, ""]
    memory: Memory
    defects: Defects


class Clock(eqx.Module):
    """How flow time is read off the steps of a run.

    - `reason`: why there is no flow time; empty if there may be.
    - `has_decay`, `has_memory`: whether weights, and earlier gradients, add to a step.
    - `num_memory`: arrays of memory that are followed from step to step.
    - `step_time`: of every step, if all steps are alike; `None` otherwise.
    - `remembered`: the part of the memory that a step keeps, if all steps are alike and
        there is a memory.
    """

    reason: str = eqx.field(static=True)
    has_decay: bool = eqx.field(static=True)
    has_memory: bool = eqx.field(static=True)
    num_memory: int = eqx.field(static=True)
    step_time: Float[Array, ""] | None
    remembered: Float[Array, ""] | None
    defects: Defects
    tolerance: float = eqx.field(static=True)

    @property
    def is_followed(self) -> bool:
        """Whether the time of each step has to be found in the run."""
        return not self.reason and self.step_time is None

    def times(
        self, steps: Int[Array, " times"], rate_times: Float[Array, " times"]
    ) -> Float[Array, " times"]:
        """The times after so many steps; sums of learning rates if not known yet."""
        if self.step_time is None:
            return rate_times
        # Not summed step by step: in single precision that loses digits.
        flow_times = rate_times[0] + self.step_time * steps.astype(rate_times.dtype)
        is_flow = self.defects.largest <= self.tolerance
        return jnp.where(is_flow, flow_times, rate_times)

    def start(self, previous: "ClockState | None") -> "ClockState | None":
        """The state before the first step, or of a run that goes on."""
        if not self.is_followed:
            return None
        dtype = self.defects.between_arrays.dtype
        zero = jnp.zeros((), dtype)
        memory = Memory.start(self.num_memory, dtype)
        if previous is None or previous.memory.left.shape != memory.left.shape:
            return ClockState(zero, zero, memory, self.defects)
        # What came before was no flow time either, if something speaks against it.
        return ClockState(zero, zero, previous.memory, previous.defects)

    def advance(
        self,
        state: ClockState,
        reading: Reading,
        gradient: PyTree,
        is_alive: Bool[Array, ""],
    ) -> ClockState:
        """The state after a step whose update was read."""
        response = read_response(reading, gradient)
        times, memory = respond(response.recursions, state.memory)
        time, found = _judge(response, times)
        is_known = is_alive & jnp.isfinite(time)
        # Compensated: in single precision a sum of many steps loses digits.
        step = jnp.where(is_known, time, 0) - state.lost
        elapsed = state.elapsed + step
        defects = jax.tree.map(
            lambda now, before: jnp.where(is_known, jnp.maximum(now, before), before),
            found,
            state.defects,
        )
        return ClockState(elapsed, (elapsed - state.elapsed) - step, memory, defects)

    def defects_after(self, state: ClockState | None) -> Defects:
        """Those of a whole run."""
        if state is None:
            return self.defects
        never = jnp.any(state.memory.left >= 1)
        return eqx.tree_at(
            lambda d: d.unforgotten, state.defects, never.astype(state.elapsed.dtype)
        )

    def memory_left(
        self, state: ClockState | None, steps: int | Int[Array, ""]
    ) -> Float[Array, ""]:
        """The part of the optimizer's memory that is older than the run."""
        if state is not None:
            return jnp.max(state.memory.left, initial=0)
        if self.remembered is None:
            return jnp.zeros_like(self.defects.unforgotten)
        return self.remembered ** jnp.asarray(steps, self.remembered.dtype)


def read_clock(reading: Reading, gradient: PyTree, dtype: Any) -> Clock:
    """The clock of an optimizer whose update was read before the first step.

    Where nothing in a step's coefficients varies, its time is found here, once.
    """
    response = read_response(reading, gradient)
    recursions = response.recursions
    num_memory = sum(len(recursion.memory) for recursion in recursions)
    zero = jnp.zeros((), dtype)
    defects = Defects(zero, zero, zero, zero)
    step_time = remembered = None
    if not response.reason and _is_constant(reading, response):
        times, memory = respond(recursions, Memory.start(num_memory, dtype))
        step_time, found = _judge(response, times)
        defects = found
        if num_memory:
            remembered = jnp.max(memory.left)
            never = (remembered >= 1).astype(dtype)
            defects = dataclasses.replace(found, unforgotten=never)
    return Clock(
        response.reason,
        response.has_decay,
        num_memory > 0,
        num_memory,
        step_time,
        remembered,
        defects,
        _tolerance(gradient),
    )


def _tolerance(gradient: PyTree) -> float:
    units = [float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(gradient)]
    return min(_ROUNDINGS * max(units), _MAX_TOLERANCE)


def _is_constant(reading: Reading, response: Response) -> bool:
    numbers = [n for r in response.recursions for n in r.numbers]
    is_corrected = any(any(r.corrected) for r in response.recursions)
    is_varying: Callable = reading.coefficients.is_varying
    return not (response.is_measured or is_corrected or any(map(is_varying, numbers)))


def _judge(response: Response, times: Array) -> tuple[Array, Defects]:
    """The time of a step, and its defects."""
    zero = jnp.zeros((), times.dtype)
    if not len(times):
        return zero, Defects(zero, zero, zero, zero)
    longest = jnp.max(jnp.abs(times))
    apart = jnp.max(times) - jnp.min(times)
    apart = apart / jnp.where(longest > 0, longest, 1)
    off = jnp.asarray(response.off_gradient).astype(times.dtype)
    backward = jnp.any(times < 0).astype(times.dtype)
    return jnp.mean(times), Defects(apart, off, backward, zero)
