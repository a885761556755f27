"""The event loop: step, settle the mode, judge the step, record."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._active_pairs import Slots
from .._system import System
from ._counts import Counts, how_many
from ._event_log import NOTHING, Log, empty_log, numbers_of, side_changes
from ._resolve_event import (
    Outcome,
    Settled,
    Target,
    arrival,
    conclude,
    loses_sliders,
    rounds,
)
from ._step import (
    STAGES,
    Ahead,
    Pending,
    State,
    as_pending,
    blank_ahead,
    blank_path,
    follow,
    stage_target,
    with_stage,
)

_ORDER = 4
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 3.0
#: So many steps in a row of less than this part of the allowed step mean being stuck.
_STALLED_STEPS, _STALLED = 30, 1e-12
#: How often a point is settled once more.
_MOST_TURNS = 8


class Ending(eqx.Module):
    """What went wrong, if anything did. Running out of steps is not among it."""

    flags: Bool[Array, "4"]

    @staticmethod
    def of(*, overflows, mode_unsettled, stuck, nonfinite) -> "Ending":
        return Ending(jnp.stack([overflows, mode_unsettled, stuck, nonfinite]))

    @property
    def any(self) -> Bool[Array, ""]:
        return jnp.any(self.flags)

    @property
    def overflows(self) -> Bool[Array, ""]:
        return self.flags[0]

    @property
    def mode_unsettled(self) -> Bool[Array, ""]:
        return self.flags[1]

    @property
    def stuck(self) -> Bool[Array, ""]:
        return self.flags[2]

    @property
    def nonfinite(self) -> Bool[Array, ""]:
        return self.flags[3]


class Solution(NamedTuple):
    """Where the flow ended, what was recorded at the first `recorded` times, and how.

    `is_finite` says it of the records, one by one. `non_unique` is the number of pairs
    that had a choice at some time.
    """

    w: Float[Array, " weights"]
    t: Float[Array, ""]
    records: PyTree
    is_finite: Bool[Array, " times"]
    recorded: Int[Array, ""]
    ending: Ending
    counts: Counts
    log: Log | None
    non_unique: Int[Array, ""]
    first_choice: Float[Array, ""]
    steps: Int[Array, ""]
    rejected: Int[Array, ""]


class _Progress(NamedTuple):
    """How far the flow has got.

    - `accepted`: whether the last step was; `due`: whether it ended on the next of the
        times to record, of which `recorded` have been reached.
    - `has_chosen`: the pairs that had a choice so far.
    """

    state: State
    accepted: Bool[Array, ""]
    due: Bool[Array, ""]
    recorded: Int[Array, ""]
    ending: Ending
    stalled: Int[Array, ""]
    counts: Counts
    log: Log | None
    has_chosen: Bool[Array, "samples kinks"]
    first_choice: Float[Array, ""]
    steps: Int[Array, ""]
    rejected: Int[Array, ""]


class _Goal(NamedTuple):
    """What is asked for."""

    t1: Float[Array, ""]
    ts: Float[Array, " times"]
    rtol: Float[Array, ""]
    max_steps: int

    def is_ahead(self, p: _Progress) -> Bool[Array, ""]:
        tried = p.steps + p.rejected
        return (p.state.t < self.t1) & ~p.ending.any & (tried < self.max_steps)

    def next_time(self, recorded: Int[Array, ""]) -> Float[Array, ""]:
        """The next time to stop at."""
        later = self.ts[jnp.minimum(recorded, self.ts.size - 1)]
        return jnp.where(recorded < self.ts.size, later, self.t1)


class Carry(NamedTuple):
    """Between two steps. `progress.steps` is -1 until the start has been settled."""

    progress: _Progress
    pending: Pending
    records: Float[Array, "times_and_waste _"]


class Loop(NamedTuple):
    """The flow as a loop: it goes on with `one` from `start` while `running`."""

    start: Carry
    running: Callable[[Carry], Bool[Array, ""]]
    one: Callable[[Carry], Carry]
    solution: Callable[[Carry], Solution]


def loop(
    system: System,
    w0: Float[Array, " weights"],
    t1: Float[Array, ""],
    ts: Float[Array, " times"],
    record: Callable[[Array, Array, Array], Any],
    *,
    rtol: Float[Array, ""],
    room: int,
    max_steps: int,
    events: int,
) -> Loop:
    """The loop that follows the flow from `w0` to `t1`, with steps that end on `ts`.

    `record(w, loss, velocity)` is what is kept at those times.
    """
    progress, pending = _start(system, w0, room, events)
    as_row, as_records = _in_rows(record, w0)
    row = jax.eval_shape(as_row, progress.state)
    records = jnp.zeros((ts.size + 1, row.size), row.dtype)

    goal = _Goal(t1, ts, rtol, max_steps)

    def running(c: Carry):
        return goal.is_ahead(c.progress)

    def one(c: Carry) -> Carry:
        progress, ahead = _one_step(system, c.progress, c.pending, goal)
        until = goal.next_time(progress.recorded)
        pending = as_pending(progress.state, ahead, until)
        row = lax.cond(
            progress.due, as_row, lambda _: jnp.zeros_like(records[0]), progress.state
        )
        place = jnp.where(progress.due, progress.recorded - 1, ts.size)
        return Carry(progress, pending, c.records.at[place].set(row))

    def solution(c: Carry) -> Solution:
        p = c.progress
        return Solution(
            w=p.state.w,
            t=p.state.t,
            records=as_records(c.records[:-1]),
            is_finite=jnp.all(jnp.isfinite(c.records[:-1]), 1),
            recorded=p.recorded,
            ending=p.ending,
            counts=p.counts,
            log=p.log,
            non_unique=how_many([p.has_chosen])[0],
            first_choice=p.first_choice,
            steps=jnp.maximum(p.steps, 0),
            rejected=p.rejected,
        )

    return Loop(Carry(progress, pending, records), running, one, solution)


def _in_rows(record: Callable, w: Array) -> tuple[Callable, Callable]:
    """What is recorded of a state in one row, and what rows hold."""
    shapes = jax.eval_shape(record, w, w[0], w)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    _, unravel = ravel_pytree(zeros)

    def as_row(state: State):
        return ravel_pytree(record(state.w, state.loss, state.velocity))[0]

    return as_row, jax.vmap(unravel)


def _one_step(
    system: System, progress: _Progress, pending: Pending, goal: _Goal
) -> tuple[_Progress, Ahead]:
    """Settle the pending point; from there, or from where it began, step ahead.

    In a loop of evaluations, with one place for each thing that is computed more than
    once: compiling takes as long as there are such places. Number 0 settles. Where a
    slider has lost all that reaches it, number -1 finds the old mode's velocity before.
    """
    state = progress.state
    room = state.leads.size
    trigger = jnp.arange(state.side.size) == pending.pair
    arrived, overflows = arrival(
        system, pending.path(pending.theta), state.side, state.base,
        trigger.reshape(state.side.shape), state.largest, state.way, room,
    )  # fmt: skip

    is_checked = (progress.steps >= 0) & (pending.theta > 0) & ~state.leaps
    asks_once_more = is_checked & loses_sliders(arrived, state.slots)

    def evaluation(number, work):
        progress, ahead = work
        settles = number == 0

        def commit(p: _Progress):
            before = jnp.where(
                asks_once_more, ahead.velocities[-1], last.velocity_before
            )
            p = _committed(p, pending, target, last, before, overflows, goal)
            return p, (p.state.velocity, p.state.multiplier, p.state.width)

        def keep(p: _Progress):
            return p, (last.velocity_before, last.mode.before, last.mode.width)

        target = lax.cond(
            settles,
            lambda: arrived,
            lambda: stage_target(progress.state, ahead, number, arrived.w),
        )
        last = rounds(system, target)
        progress, field = lax.cond(settles, commit, keep, progress)
        ahead = with_stage(ahead, number, *field)
        until = goal.next_time(progress.recorded)
        ahead = lax.cond(
            settles | (number == STAGES - 1),
            lambda a: follow(system, progress.state, a, until, settles),
            lambda a: a,
            ahead,
        )
        return progress, ahead

    start = progress, blank_ahead(state.w, room)
    first = -asks_once_more.astype(int)
    progress, ahead = lax.fori_loop(first, STAGES, evaluation, start)
    # The step beyond the end is not taken.
    taken = goal.is_ahead(progress).astype(int)
    stages = (STAGES - 1) * taken
    rows = stages * jnp.sum(progress.state.slots.used)
    counts = progress.counts.plus(
        gradients=stages - first,
        rows=rows - first * jnp.sum(state.slots.used),
        forward=ahead.passes * taken,
    )
    return progress._replace(counts=counts), ahead


def _committed(
    p: _Progress,
    pending: Pending,
    target: Target,
    last: Outcome,
    before: Array,
    overflows: Array,
    goal: _Goal,
) -> _Progress:
    """The pending point accepted if its defect allows, else the one before.

    `before` is the velocity of the old mode there.
    """
    state, starting = p.state, p.steps < 0
    # At the start the sides before are a guess, not where the flow came from.
    again = state.again & (p.steps > 0)
    settled, counts = conclude(
        target,
        last,
        p.counts,
        torn=state.torn,
        again=again,
    )
    step = pending.theta * pending.step
    sizes = _Sizes.of(state, pending, settled, before)
    error = _error(sizes, step, goal.rtol)
    error = jnp.where(starting | state.leaps, 0, error)
    accepted = error <= 1
    allowed = jnp.where(
        starting, _first_step(sizes, goal.rtol, goal.t1), _next_step(state, step, error)
    )
    stalled = jnp.where(step < _STALLED * state.step, p.stalled + 1, 0)
    stalled = jnp.where(starting, 0, stalled)
    # No way on is found, or one after the other. From a little further on there is one.
    lost = ~settled.is_settled & ~overflows
    leaps = lost | (settled.again & settled.leaves & (stalled > _MOST_TURNS))
    ending = Ending.of(
        overflows=overflows,
        mode_unsettled=lost & state.leaps,
        stuck=stalled > _STALLED_STEPS,
        nonfinite=~jnp.isfinite(sizes.after + settled.loss),
    )
    happens = accepted & ~ending.any
    changes = side_changes(state.side, settled.side, starting)
    changes = jnp.where(happens, changes, NOTHING)
    # Pairs that had the same choice at the last point are not named again.
    is_new = happens & (settled.choices != state.choices)
    choices = jnp.where(is_new, settled.choices, NOTHING)
    counts = counts.plus(**numbers_of(changes), leaps=happens & leaps)
    log = p.log
    if log is not None:
        log = log.written(pending.t, changes).written(pending.t, choices)
    chooses = choices != NOTHING
    is_choice = jnp.any(chooses) | (happens & leaps)
    choice = jnp.where(is_choice, pending.t, jnp.inf)
    state, counts = lax.cond(
        accepted,
        lambda: (_accepted_state(pending, settled, leaps, state.largest), counts),
        lambda: (state, counts.undone(p.counts)),
    )
    is_time = (state.t == goal.next_time(p.recorded)) & (p.recorded < goal.ts.size)
    due = accepted & ~ending.any & is_time
    return p._replace(
        state=state._replace(step=allowed),
        accepted=accepted,
        due=due,
        recorded=p.recorded + due.astype(int),
        ending=ending,
        stalled=stalled,
        counts=counts,
        log=log,
        has_chosen=p.has_chosen | chooses,
        first_choice=jnp.minimum(p.first_choice, choice),
        steps=p.steps + accepted.astype(int),
        rejected=p.rejected + (~accepted).astype(int),
    )


class _Sizes(NamedTuple):
    """Lengths: of w before and after a step, of the new velocity, and the defect."""

    before: Float[Array, ""]
    after: Float[Array, ""]
    speed: Float[Array, ""]
    defect: Float[Array, ""]

    @staticmethod
    def of(state: State, pending: Pending, settled: Settled, before: Array) -> "_Sizes":
        slope = pending.path.slope(pending.theta) / pending.step
        defect = slope - before
        vectors = jnp.stack([state.w, settled.w, settled.velocity, defect])
        # One product: XLA compiles two kernels for each sum.
        return _Sizes(*jnp.sqrt(jnp.diagonal(vectors @ vectors.T)))


def _error(sizes: _Sizes, step: Array, rtol: Array) -> Float[Array, ""]:
    """The step's error in units of what is allowed, from its defect at its end."""
    error = step * sizes.defect / (rtol * sizes.before)
    return jnp.where(jnp.isfinite(error), error, 0)


def _first_step(sizes: _Sizes, rtol: Array, t1: Array) -> Float[Array, ""]:
    """A step in which the weights change by about rtol^(1/4) of their size."""
    speed = sizes.speed
    time = sizes.after / jnp.where(speed > 0, speed, 1)
    step = jnp.where(speed > 0, rtol ** (1 / _ORDER) * time, t1)
    return jnp.clip(step, 1e-9 * t1, t1)


def _next_step(state: State, step: Array, error: Array) -> Float[Array, ""]:
    factor = _SAFETY * jnp.maximum(error, 1e-10) ** (-1 / _ORDER)
    proposal = jnp.clip(factor, _SHRINK, _GROW) * step
    # A step that an event cut short says little about longer ones: it may only raise
    # the allowance.
    informative = (error > 0.3) | (proposal > state.step)
    return jnp.where(informative, proposal, state.step)


def _accepted_state(
    pending: Pending, settled: Settled, leaps: Array, largest: Array
) -> State:
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
        leads=settled.leads,
        multiplier=settled.multiplier,
        width=settled.width,
        multiplier_rate=pending.multiplier_rate,
        width_rate=pending.width_rate,
        step=pending.step,
        largest=jnp.maximum(largest, settled.largest),
        torn=settled.torn,
        near=settled.near & ~leaps,
        dormant=settled.dormant,
        choices=settled.choices,
        again=settled.again | leaps,
        leaps=leaps,
    )


def _start(
    system: System, w0: Array, room: int, events: int
) -> tuple[_Progress, Pending]:
    """The sides at w0, as a pending point: its mode is settled like any other's."""
    shape = (system.samples, system.kinks)
    none, table = jnp.zeros(room, w0.dtype), jnp.zeros(shape, w0.dtype)

    def one_layer(_, carry):
        side, _ = carry
        z = system.preactivations(w0, system.slope(side), table)
        return jnp.where(z > 0, 1, -1).astype(jnp.int32), z

    below = jnp.full(shape, -1, jnp.int32)
    side, z = lax.fori_loop(0, system.function.depth + 1, one_layer, (below, table))
    tiny = jnp.finfo(w0.dtype).tiny
    now, one = jnp.zeros((), w0.dtype), jnp.ones((), w0.dtype)
    zero, no = jnp.asarray(0), jnp.asarray(False)
    state = State(
        t=now,
        w=w0,
        loss=now,
        velocity=jnp.zeros_like(w0),
        acceleration=jnp.zeros_like(w0),
        side=side,
        base=side,
        held=jnp.zeros(shape, bool),
        slots=Slots.none(shape, room),
        leads=jnp.zeros(room, bool),
        multiplier=none,
        width=none,
        multiplier_rate=table,
        width_rate=table,
        step=one,
        largest=jnp.maximum(jnp.max(jnp.abs(z)), tiny),
        torn=jnp.zeros(shape, bool),
        near=jnp.zeros(shape, bool),
        dormant=jnp.zeros(shape, bool),
        choices=jnp.full(shape, NOTHING, jnp.int32),
        again=no,
        leaps=no,
    )
    pending = Pending(
        now, blank_path(w0), one, one, jnp.asarray(side.size), table, table
    )
    progress = _Progress(
        state=state,
        accepted=no,
        due=no,
        recorded=zero,
        ending=Ending(jnp.zeros(4, bool)),
        stalled=zero,
        counts=Counts.zeros(),
        log=empty_log(events, now) if events else None,
        has_chosen=jnp.zeros(shape, bool),
        first_choice=jnp.full_like(now, jnp.inf),
        steps=zero - 1,
        rejected=zero,
    )
    return progress, pending
