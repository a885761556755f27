"""The event loop: step, resolve the event, judge the step, record."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from .._system import System
from ._counts import Counts
from ._event_log import NO_EVENT, classify_side_changes, count_events
from ._event_point import EventPoint, event_point, loses_sliders, stage_point
from ._few_slots import resolve_in_few_slots
from ._progress import Goal, Progress, Solution, StepCounts, Tally
from ._resolve_event import Iterate
from ._resolved_event import ResolvedEvent, finish
from ._state import Extrapolation, State
from ._step import NUM_STAGES, Arrival, Step, advance, arrive
from ._step_control import Decision, judge


class Carry(NamedTuple):
    """Between two steps: the state, the point that the next step reaches, the records."""

    progress: Progress
    arrival: Arrival
    records: Float[Array, "times_and_waste _"]


class Loop(NamedTuple):
    """The flow as a loop: `advance` from `start` while it `goes_on`."""

    start: Carry
    goes_on: Callable[[Carry], Bool[Array, ""]]
    advance: Callable[[Carry], Carry]
    solution: Callable[[Carry], Solution]


def make_loop(
    system: System,
    w0: Float[Array, " weights"],
    goal: Goal,
    record: Callable[[Array, Array, Array], Any],
    *,
    capacity: int,
    log_capacity: int,
) -> Loop:
    """The loop that follows the flow from `w0`.

    `record(w, loss, velocity)` is what is recorded at the times of the goal. `capacity`
    bounds the number of active pairs; the first `log_capacity` events are kept.
    """
    state = State.start(w0, *_find_sides(system, w0), capacity)
    make_row, unravel_rows = _as_rows(record, w0)
    row = jax.eval_shape(make_row, state)
    # Rows that are not due are written to the last place.
    records = jnp.zeros((goal.ts.size + 1, row.size), row.dtype)
    start = Carry(Progress.start(state, log_capacity), Arrival.start(state), records)

    def advance_step(c: Carry) -> Carry:
        p, step = _advance(system, c.progress, c.arrival, goal)
        arrival = arrive(p.state, step, goal.next_time(p.num_recorded))
        row = lax.cond(
            p.is_due, make_row, lambda _: jnp.zeros_like(records[0]), p.state
        )
        place = jnp.where(p.is_due, p.num_recorded - 1, goal.ts.size)
        return Carry(p, arrival, c.records.at[place].set(row))

    def make_solution(c: Carry) -> Solution:
        rows = c.records[:-1]
        is_finite = jnp.all(jnp.isfinite(rows), 1)
        return Solution.create(c.progress, unravel_rows(rows), is_finite)

    return Loop(start, lambda c: goal.is_ahead(c.progress), advance_step, make_solution)


def _as_rows(record: Callable, w: Array) -> tuple[Callable, Callable]:
    """What is recorded of a state as a row of numbers, and records from such rows."""
    shapes = jax.eval_shape(record, w, w[0], w)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    _, unravel = ravel_pytree(zeros)

    def make_row(state: State):
        point = state.point
        return ravel_pytree(record(point.w, point.loss, point.velocity))[0]

    return make_row, jax.vmap(unravel)


def _find_sides(
    system: System, w0: Array
) -> tuple[Int[Array, "samples kinks"], Float[Array, ""]]:
    """The side of every pair at w0, from the bottom layer up, and the largest |z|."""
    offsets = jnp.zeros_like(system.low, w0.dtype)

    def update_layer(_, carry):
        side, _ = carry
        z = system.preactivations(w0, system.slope(side), offsets)
        return jnp.where(z > 0, 1, -1).astype(jnp.int32), z

    below = jnp.full(offsets.shape, -1, jnp.int32)
    depth = system.function.depth
    side, z = lax.fori_loop(0, depth + 1, update_layer, (below, offsets))
    return side, jnp.maximum(jnp.max(jnp.abs(z)), jnp.finfo(w0.dtype).tiny)


class _Stop(NamedTuple):
    """The event at an arrival, before it is resolved.

    - `overflows`: whether too many pairs are active there.
    - `needs_old_velocity`: whether the velocity of the old mode must be computed by
        itself, because sliding pairs of that mode are disconnected at the event.
    """

    arrival: Arrival
    event: EventPoint
    overflows: Bool[Array, ""]
    needs_old_velocity: Bool[Array, ""]

    @staticmethod
    def create(system: System, progress: Progress, arrival: Arrival) -> "_Stop":
        state, side = progress.state, progress.state.tables.side
        trigger = jnp.arange(side.size) == arrival.pair
        event, overflows = event_point(
            system,
            arrival.w,
            state.tables,
            trigger.reshape(side.shape),
            state.point.max_abs_z,
            state.hint,
            state.sliding.leads.size,
        )
        is_checked = ~progress.steps.is_start & (arrival.theta > 0) & ~state.is_forced
        loses = loses_sliders(event, state.sliding.pairs)
        return _Stop(arrival, event, overflows, is_checked & loses)


def _advance(
    system: System, progress: Progress, arrival: Arrival, goal: Goal
) -> tuple[Progress, Step]:
    """Resolve the event at the arrival, judge the step, and compute the next one.

    The next step goes on from the arrival, or if that is rejected from where the last one
    began. All evaluations of the field are in one loop, because compile time grows with
    the number of places where it is evaluated. Evaluation 0 resolves the event, and 1 to
    3 are the further stages of the Runge–Kutta step. Where the velocity of the old mode
    is needed at the event, evaluation −1 finds it.
    """
    stop = _Stop.create(system, progress, arrival)

    def evaluate(number, work):
        progress, step = work
        is_event = number == 0

        def make_stage() -> EventPoint:
            w = step.stage_point(progress.state.point.w, number)
            return stage_point(progress.state, jnp.where(number < 0, stop.event.w, w))

        point = lax.cond(is_event, lambda: stop.event, make_stage)
        last = resolve_in_few_slots(system, point)

        def commit(p: Progress):
            old_velocity = step.stages.velocities[-1]
            p = _commit(p, stop, point, last, old_velocity, goal)
            sliding = p.state.sliding
            return p, (p.state.point.velocity, sliding.multiplier, sliding.width)

        def only_evaluate(p: Progress):
            mode = last.mode
            return p, (last.field.velocity_before, mode.multiplier_before, mode.width)

        progress, field = lax.cond(is_event, commit, only_evaluate, progress)
        step = step._replace(stages=step.stages.insert(number, *field))
        until = goal.next_time(progress.num_recorded)
        step = lax.cond(
            is_event | (number == NUM_STAGES - 1),
            lambda step: advance(system, progress.state, step, until, is_event),
            lambda step: step,
            step,
        )
        return progress, step

    before = progress.state
    first = -stop.needs_old_velocity.astype(int)
    start = progress, Step.blank(before.point.w, before.sliding.leads.size)
    progress, step = lax.fori_loop(first, NUM_STAGES, evaluate, start)
    # The step beyond the end of the flow is not taken.
    is_taken = goal.is_ahead(progress).astype(int)
    stages = (NUM_STAGES - 1) * is_taken
    rows = stages * jnp.sum(progress.state.sliding.pairs.is_used)
    counts = progress.tally.counts.add(
        gradients=stages - first,
        rows=rows - first * jnp.sum(before.sliding.pairs.is_used),
        forward=step.event.passes * is_taken,
    )
    return progress._replace(tally=progress.tally._replace(counts=counts)), step


def _commit(
    p: Progress,
    stop: _Stop,
    point: EventPoint,
    last: Iterate,
    old_velocity: Float[Array, " weights"],
    goal: Goal,
) -> Progress:
    """The progress after the event that was resolved by the last iterate."""
    velocity_before = jnp.where(
        stop.needs_old_velocity, old_velocity, last.field.velocity_before
    )
    resolved, counts = finish(
        point,
        last,
        p.tally.counts,
        ambiguous_before=p.state.tables.ambiguous,
        # At the start the sides before are a guess, not where the flow came from.
        was_retry=p.state.is_retry & (p.steps.accepted > 0),
    )
    decision = judge(
        p.state, p.steps, stop.arrival, resolved, velocity_before, stop.overflows, goal
    )
    return _apply(p, stop.arrival, resolved, counts, decision, goal)


def _apply(
    p: Progress,
    arrival: Arrival,
    resolved: ResolvedEvent,
    counts: Counts,
    decision: Decision,
    goal: Goal,
) -> Progress:
    """The arrival as the new state if the step is accepted, else the state before."""
    is_accepted, ending = decision.is_accepted, decision.ending
    tally = _update_tally(p, arrival, resolved, counts, decision)
    state, counts = lax.cond(
        is_accepted,
        lambda: (_accept(p.state, arrival, resolved, decision), tally.counts),
        lambda: (p.state, tally.counts.reject(p.tally.counts)),
    )
    is_time = state.t == goal.next_time(p.num_recorded)
    is_time = is_time & (p.num_recorded < goal.ts.size)
    is_due = is_accepted & ~ending.any & is_time
    return Progress(
        state=state._replace(step=decision.step),
        is_accepted=is_accepted,
        is_due=is_due,
        num_recorded=p.num_recorded + is_due.astype(int),
        ending=ending,
        tally=tally._replace(counts=counts),
        steps=StepCounts(
            accepted=p.steps.accepted + is_accepted.astype(int),
            rejected=p.steps.rejected + (~is_accepted).astype(int),
            stalled=decision.num_stalled,
        ),
    )


def _update_tally(
    p: Progress,
    arrival: Arrival,
    resolved: ResolvedEvent,
    counts: Counts,
    decision: Decision,
) -> Tally:
    """The tally with what happens at the arrival."""
    happens, tally = decision.happens, p.tally
    before, after = p.state.tables, resolved.tables
    changes = classify_side_changes(before.side, after.side, p.steps.is_start)
    changes = jnp.where(happens, changes, NO_EVENT)
    # Pairs that had the same choice at the last point are not named again.
    is_new = happens & (after.choice != before.choice)
    choices = jnp.where(is_new, after.choice, NO_EVENT)
    is_forced = happens & decision.is_forced
    log = tally.log
    if log is not None:
        log = log.append(arrival.t, changes).append(arrival.t, choices)
    has_choice = choices != NO_EVENT
    is_nonunique = jnp.any(has_choice) | is_forced
    time = jnp.where(is_nonunique, arrival.t, jnp.inf)
    return Tally(
        counts=counts.add(**count_events(changes), forced_steps=is_forced),
        log=log,
        is_nonunique=tally.is_nonunique | has_choice,
        first_nonunique_time=jnp.minimum(tally.first_nonunique_time, time),
    )


def _accept(
    state: State, arrival: Arrival, resolved: ResolvedEvent, decision: Decision
) -> State:
    """The resolved event at the arrival as the new state."""
    point, tables = resolved.point, resolved.tables
    max_abs_z = jnp.maximum(state.point.max_abs_z, point.max_abs_z)
    acceleration = arrival.path.curvature(arrival.theta) / arrival.step**2
    return State(
        t=arrival.t,
        point=point._replace(max_abs_z=max_abs_z),
        tables=tables._replace(at_zero=tables.at_zero & ~decision.is_forced),
        sliding=resolved.sliding,
        extrapolation=Extrapolation(
            acceleration, arrival.multiplier_rate, arrival.width_rate
        ),
        step=arrival.step,
        is_retry=resolved.is_retry | decision.is_forced,
        is_forced=decision.is_forced,
    )
