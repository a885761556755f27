"""The event loop: step, settle the mode, judge the step, record."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._settle import Counts, Settled, settle
from ._step import Pending, State, advance, blank_path
from ._system import Slots, System

#: The local error is about this times step · |w'(θ) − velocity there|.
_DEFECT_WEIGHT = 0.1
_ORDER = 4
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 3.0
#: So many steps in a row of less than this part of the allowed step mean being stuck.
_STALLED_STEPS, _STALLED = 30, 1e-12


class Ending(NamedTuple):
    """What went wrong, if anything did. Running out of steps is not among it."""

    overflows: Bool[Array, ""]
    mode_unsettled: Bool[Array, ""]
    stuck: Bool[Array, ""]
    nonfinite: Bool[Array, ""]

    @property
    def any(self) -> Bool[Array, ""]:
        return jnp.any(jnp.stack(self))


class Solution(NamedTuple):
    """Where the flow ended, what was recorded at the first `recorded` times, and how."""

    w: Float[Array, " weights"]
    t: Float[Array, ""]
    records: PyTree
    recorded: Int[Array, ""]
    ending: Ending
    counts: Counts
    steps: Int[Array, ""]
    rejected: Int[Array, ""]


class _Carry(NamedTuple):
    state: State
    pending: Pending
    records: PyTree
    recorded: Int[Array, ""]
    ending: Ending
    stalled: Int[Array, ""]
    counts: Counts
    steps: Int[Array, ""]
    rejected: Int[Array, ""]


def integrate(
    system: System,
    w0: Float[Array, " weights"],
    t1: Float[Array, ""],
    ts: Float[Array, " times"],
    record: Callable[[Array, Array, Array], Any],
    *,
    rtol: Float[Array, ""],
    room: int,
    max_steps: int,
) -> Solution:
    """Follow the flow from `w0` to `t1`, with steps that end on the times `ts`.

    `record(w, loss, velocity)` is what is kept at those times. `room` bounds how many
    pairs may be at their kinks at one time, `max_steps` counts accepted and rejected
    steps.
    """
    state, pending = _start(system, w0, room)
    shapes = jax.eval_shape(record, w0, state.loss, w0)
    records = jax.tree.map(lambda s: jnp.zeros((ts.size, *s.shape), s.dtype), shapes)
    zero, no = jnp.asarray(0), jnp.asarray(False)
    ending = Ending(no, no, no, no)
    carry = _Carry(
        state, pending, records, zero, ending, zero, Counts.zeros(), -1 + zero, zero
    )

    def running(c: _Carry):
        tried = c.steps + c.rejected
        return (c.state.t < t1) & ~c.ending.any & (tried < max_steps)

    def one(c: _Carry) -> _Carry:
        c, accepted = _commit(system, c, rtol, t1, room)
        c = _recorded(c, ts, record, accepted)
        later = ts[jnp.minimum(c.recorded, ts.size - 1)]
        until = jnp.where(c.recorded < ts.size, later, t1)
        pending, counts = advance(system, c.state, until, c.counts)
        # The step beyond the end is not taken.
        counts = jax.tree.map(
            lambda new, old: jnp.where(running(c), new, old), counts, c.counts
        )
        return c._replace(pending=pending, counts=counts)

    # No time, no start: nothing is recorded of a problem that is not to be solved.
    c = lax.while_loop(running, one, carry)
    return Solution(
        w=c.state.w,
        t=c.state.t,
        records=c.records,
        recorded=c.recorded,
        ending=c.ending,
        counts=c.counts,
        steps=jnp.maximum(c.steps, 0),
        rejected=c.rejected,
    )


def _commit(
    system: System, c: _Carry, rtol: Array, t1: Array, room: int
) -> tuple[_Carry, Bool[Array, ""]]:
    """Settle the pending point; accept it if its defect allows, else go back."""
    state, pending = c.state, c.pending
    w = pending.path(pending.theta)
    trigger = jnp.arange(state.side.size) == pending.pair
    starting = c.steps < 0
    settled, counts = settle(
        system, w, state.side, state.base, trigger.reshape(state.side.shape),
        state.largest, c.counts, room=room, starting=starting,
    )  # fmt: skip
    step = pending.theta * pending.step
    error = jnp.where(starting, 0, _error(state, pending, settled, step, rtol))
    accepted = error <= 1
    allowed = jnp.where(
        starting, _first_step(settled, rtol, t1), _next_step(state, step, error)
    )
    stalled = jnp.where(step < _STALLED * state.step, c.stalled + 1, 0)
    stalled = jnp.where(starting, 0, stalled)
    ending = Ending(
        settled.overflows,
        ~settled.is_settled & ~settled.overflows,
        stalled > _STALLED_STEPS,
        ~jnp.all(jnp.isfinite(settled.w)) | ~jnp.isfinite(settled.loss),
    )
    new = _accepted_state(pending, settled)
    state = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, state)
    # What was counted at a point that is given up was still computed, but did not happen.
    undone = c.counts._replace(
        gradients=counts.gradients, rows=counts.rows, forward=counts.forward
    )
    counts = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), counts, undone)
    c = c._replace(
        state=state._replace(step=allowed),
        ending=ending,
        stalled=stalled,
        counts=counts,
        steps=c.steps + accepted.astype(c.steps.dtype),
        rejected=c.rejected + (~accepted).astype(c.steps.dtype),
    )
    return c, accepted & ~ending.any


def _error(
    state: State, pending: Pending, settled: Settled, step: Array, rtol: Array
) -> Float[Array, ""]:
    """The step's error in units of what is allowed, from its defect at its end.

    Where the old mode's velocity is not known (a slider has lost all that reaches it,
    or pairs have come to share a multiplier) there is nothing to judge by: it passes.
    """
    slope = pending.path.slope(pending.theta) / pending.step
    defect = jnp.linalg.norm(slope - settled.velocity_before)
    error = _DEFECT_WEIGHT * step * defect / (rtol * jnp.linalg.norm(state.w))
    return jnp.where(jnp.isfinite(error), error, 0)


def _first_step(settled: Settled, rtol: Array, t1: Array) -> Float[Array, ""]:
    """A step in which the weights change by about rtol^(1/4) of their size."""
    speed = jnp.linalg.norm(settled.velocity)
    time = jnp.linalg.norm(settled.w) / jnp.where(speed > 0, speed, 1)
    step = jnp.where(speed > 0, rtol ** (1 / _ORDER) * time, t1)
    return jnp.clip(step, 1e-9 * t1, t1)


def _next_step(state: State, step: Array, error: Array) -> Float[Array, ""]:
    factor = _SAFETY * jnp.maximum(error, 1e-10) ** (-1 / _ORDER)
    proposal = jnp.clip(factor, _SHRINK, _GROW) * step
    # A step that an event cut short says little about longer ones: it may only raise
    # the allowance.
    informative = (error > 0.3) | (proposal > state.step)
    return jnp.where(informative, proposal, state.step)


def _accepted_state(pending: Pending, settled: Settled) -> State:
    return State(
        t=pending.t,
        w=settled.w,
        loss=settled.loss,
        velocity=settled.velocity,
        acceleration=pending.path.curvature(pending.theta) / pending.step**2,
        side=settled.side,
        base=settled.base,
        held=settled.held,
        slots=settled.slots,
        leads=settled.slots.used & settled.groups.leads,
        multiplier=settled.multiplier,
        width=settled.width,
        multiplier_rate=pending.multiplier_rate,
        width_rate=pending.width_rate,
        step=pending.step,
        largest=settled.largest,
    )


def _recorded(c: _Carry, ts: Array, record: Callable, accepted: Array) -> _Carry:
    """The carry with a record of its state, if its time is the next of `ts`."""
    state, room = c.state, ts.size
    due = accepted & (state.t == ts[jnp.minimum(c.recorded, room - 1)])
    due = due & (c.recorded < room)
    place = jnp.where(due, c.recorded, room)
    new = record(state.w, state.loss, state.velocity)
    records = jax.tree.map(
        lambda kept, value: kept.at[place].set(value, mode="drop"), c.records, new
    )
    return c._replace(
        records=records, recorded=c.recorded + due.astype(c.recorded.dtype)
    )


def _start(system: System, w0: Array, room: int) -> tuple[State, Pending]:
    """The sides at w0, as a pending point: its mode is settled like any other's."""
    shape = (system.samples, system.kinks)
    none, table = jnp.zeros(room, w0.dtype), jnp.zeros(shape, w0.dtype)

    def one_layer(_, side):
        z = system.preactivations(w0, system.slope(side), table)
        return jnp.where(z > 0, 1, -1).astype(jnp.int32)

    below = jnp.full(shape, -1, jnp.int32)
    side = lax.fori_loop(0, system.function.depth, one_layer, below)
    z = system.preactivations(w0, system.slope(side), table)
    tiny = jnp.finfo(w0.dtype).tiny
    now, one = jnp.zeros((), w0.dtype), jnp.ones((), w0.dtype)
    state = State(
        t=now,
        w=w0,
        loss=now,
        velocity=jnp.zeros_like(w0),
        acceleration=jnp.zeros_like(w0),
        side=side,
        base=side,
        held=jnp.zeros(shape, bool),
        slots=Slots(jnp.zeros(room, int), jnp.zeros(room, bool)),
        leads=jnp.zeros(room, bool),
        multiplier=none,
        width=none,
        multiplier_rate=table,
        width_rate=table,
        step=one,
        largest=jnp.maximum(jnp.max(jnp.abs(z), initial=0), tiny),
    )
    pending = Pending(
        now, blank_path(w0), one, one, jnp.asarray(side.size), table, table
    )
    return state, pending
