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
from ._iterate import Iterate
from ._progress import Goal, Progress, Solution, StepCounts, Tally
from ._resolved_event import ResolvedEvent, finish
from ._state import Extrapolation, State
from ._step import (
    NUM_STAGES,
    PREDICTION_PASSES,
    Arrival,
    Stages,
    Step,
    arrive,
    predict_length,
    stage_of_step,
    take_step,
)
from ._step_control import Decision, judge

#: The number of an evaluation beyond the last.
_ALL_DONE = NUM_STAGES + 2


class Carry(NamedTuple):
    """Between two steps: the state, and the records.

    - `arrival`: the point that the last step reached.
    - `length`: that of the next step, as far as its first event can be predicted.
    """

    progress: Progress
    arrival: Arrival
    length: Float[Array, ""]
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
    state = State.start(w0, *find_sides(system, w0), capacity)
    make_row, unravel_rows = _as_rows(record, w0)
    row = jax.eval_shape(make_row, state)
    # Rows that are not due are written to the last place.
    records = jnp.zeros((goal.ts.size + 1, row.size), row.dtype)
    start = Carry(
        Progress.start(state, log_capacity),
        Arrival.start(state),
        jnp.ones_like(state.t),
        records,
    )

    def advance_step(c: Carry) -> Carry:
        p, arrival = _advance(system, c.progress, c.length, goal)
        length = predict_length(system, p.state, goal.next_time(p.num_recorded))
        row = lax.cond(
            p.is_due, make_row, lambda _: jnp.zeros_like(records[0]), p.state
        )
        place = jnp.where(p.is_due, p.num_recorded - 1, goal.ts.size)
        return Carry(p, arrival, length, c.records.at[place].set(row))

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


def find_sides(
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
    - `passes`: the forward passes that it took to find the arrival.
    """

    arrival: Arrival
    event: EventPoint
    overflows: Bool[Array, ""]
    needs_old_velocity: Bool[Array, ""]
    passes: Int[Array, ""]

    @staticmethod
    def blank(state: State) -> "_Stop":
        """Before the step from a state is known."""
        no, none = jnp.asarray(False), jnp.asarray(0)
        event = stage_point(state, state.t, state.point.w)
        return _Stop(Arrival.start(state), event, no, no, none)

    @staticmethod
    def create(system: System, progress: Progress, step: Step, until: Array) -> "_Stop":
        state, side = progress.state, progress.state.tables.side
        arrival = arrive(state, step, until)
        trigger = jnp.arange(side.size) == arrival.pair
        event, overflows = event_point(
            system,
            arrival.t,
            arrival.w,
            state.tables,
            trigger.reshape(side.shape),
            state.point.max_abs_z,
            state.hint,
            state.sliding.leads.size,
        )
        is_checked = ~progress.steps.is_start & (arrival.theta > 0) & ~state.is_forced
        loses = loses_sliders(event, state.sliding.pairs)
        passes = PREDICTION_PASSES + step.event.passes
        return _Stop(arrival, event, overflows, is_checked & loses, passes)


class _Evaluations(NamedTuple):
    """The evaluations of the field on a step, as far as they are done.

    Numbers 1 to 3 are the further stages of the step. Then its end is known: there number
    4 is the velocity of the old mode, where that is needed, and the last the event.
    """

    number: Int[Array, ""]
    stages: Stages
    old_velocity: Float[Array, " weights"]
    stop: _Stop
    last: Iterate


def _advance(
    system: System, progress: Progress, length: Float[Array, ""], goal: Goal
) -> tuple[Progress, Arrival]:
    """Take a step of a given length, resolve the event at its end, and judge the step.

    All evaluations of the field are in one loop, because compile time grows with the
    number of places where it is evaluated. A flow begins with the event at its start.
    """
    state, steps = progress.state, progress.steps
    until = goal.next_time(progress.num_recorded)

    def evaluate(e: _Evaluations) -> _Evaluations:
        is_end = e.number == NUM_STAGES

        def find_end() -> _Stop:
            step = take_step(system, state, e.stages, length, until)
            return _Stop.create(system, progress, step, until)

        stop = lax.cond(is_end, find_end, lambda: e.stop)
        is_event = jnp.where(is_end, ~stop.needs_old_velocity, e.number > NUM_STAGES)

        def make_stage() -> EventPoint:
            t, w = stage_of_step(state, e.stages, length, e.number)
            t, w = (
                jnp.where(is_end, stop.event.t, t),
                jnp.where(is_end, stop.event.w, w),
            )
            return stage_point(state, t, w)

        last = resolve_in_few_slots(
            system, stop.event.replaced_unless(is_event, make_stage)
        )
        velocity, mode = last.field.velocity_before, last.mode
        stages = e.stages.insert(e.number, velocity, mode.multiplier_before, mode.width)
        number = jnp.where(is_event, _ALL_DONE, e.number + 1)
        old_velocity = jnp.where(is_event & ~is_end, e.old_velocity, velocity)
        return _Evaluations(number, stages, old_velocity, stop, last)

    stop = _Stop.blank(state)
    start = _Evaluations(
        number=jnp.where(steps.is_start, NUM_STAGES, 1),
        stages=Stages.first(state),
        old_velocity=state.point.velocity,
        stop=stop,
        last=Iterate.blank(stop.event),
    )
    done = lax.while_loop(lambda e: e.number < _ALL_DONE, evaluate, start)
    stop = done.stop
    num_stages = jnp.where(steps.is_start, 0, NUM_STAGES - 1)
    evaluations = num_stages + stop.needs_old_velocity.astype(int)
    counts = progress.tally.counts.add(
        gradients=evaluations,
        rows=evaluations * jnp.sum(state.sliding.pairs.is_used),
        forward=stop.passes,
    )
    tally = progress.tally._replace(counts=counts)
    after = _commit(progress._replace(tally=tally), done, goal)
    return after, stop.arrival


def _commit(p: Progress, done: _Evaluations, goal: Goal) -> Progress:
    """The progress after the event that was resolved last."""
    stop, last = done.stop, done.last
    resolved, counts = finish(
        stop.event,
        last,
        p.tally.counts,
        ambiguous_before=p.state.tables.ambiguous,
        # At the start the sides before are a guess, not where the flow came from.
        was_retry=p.state.is_retry & (p.steps.accepted > 0),
    )
    decision = judge(
        p.state,
        p.steps,
        stop.arrival,
        resolved,
        done.old_velocity,
        stop.overflows,
        goal,
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
    multiplier_rate, width_rate = (
        state.sliding.pairs.carry_over(rate, resolved.sliding.pairs)
        for rate in (arrival.multiplier_rate, arrival.width_rate)
    )
    return State(
        t=arrival.t,
        point=point._replace(max_abs_z=max_abs_z),
        tables=tables._replace(at_zero=tables.at_zero & ~decision.is_forced),
        sliding=resolved.sliding,
        extrapolation=Extrapolation(acceleration, multiplier_rate, width_rate),
        step=arrival.step,
        is_retry=resolved.is_retry | decision.is_forced,
        is_forced=decision.is_forced,
    )
