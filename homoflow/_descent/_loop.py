"""Gradient descent in a compiled loop: a step, what is recorded, how it ends."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from .._jax._arrays import all_finite
from .._jax._precision import full_matmul_precision
from .._laws import Laws
from .._observe._assemble import make_trajectory
from .._observe._base import Point
from .._observe._recorder import STANDARD, Carries, Recorder, Values
from .._observe._time_grid import values_error
from .._problem._losses import Risk
from .._problem._problem import Problem
from .._results._ledger import Ledger
from .._results._status import RESULTS
from .._results._trajectory import Trajectory
from ._batches import Batches, EpochOrder
from ._clock import Clock, ClockState, read_clock
from ._factory import Factory
from ._law_budget import BudgetTerms, LawBudget, Step, possible_rounding
from ._read_update import Reading, read_update
from ._time_unit import TimeUnit, time_unit_of
from ._update_parts import starts_from_weights, update_parts


class Continuation(eqx.Module):
    """What gradient descent hands on to a run that goes on where it ended.

    - `optimizer_state`: the optimizer's memory; `order`: of the samples in this epoch.
    - `step`: how many steps were taken so far; `clock`: where its clock is.
    """

    optimizer_state: PyTree
    step: Int[Array, ""]
    order: EpochOrder | None
    clock: ClockState | None


class Plan(eqx.Module):
    """Everything about a run that is known before it starts.

    `laws`: those that an account is kept of.
    """

    steps: int = eqx.field(static=True)
    record_every: int = eqx.field(static=True)
    batches: Batches | None
    save_models: bool = eqx.field(static=True)
    factory: Factory
    laws: Laws | None
    recorder: Recorder

    @property
    def num_blocks(self) -> int:
        """How many times `record_every` steps are taken; some more may follow."""
        return self.steps // self.record_every

    @property
    def num_steps_left(self) -> int:
        """The steps after the last whole block."""
        return self.steps % self.record_every

    def recorded_steps(self) -> np.ndarray:
        """The steps before which something is recorded, and the end."""
        starts = np.arange(0, self.steps, self.record_every)
        return np.append(starts, self.steps)


class _State(eqx.Module):
    """What one step hands to the next.

    `finite_weights` are the last weights with a finite loss.
    """

    weights: PyTree
    finite_weights: PyTree
    memory: PyTree
    step: Int[Array, ""]
    alive: Bool[Array, ""]
    order: EpochOrder | None
    sums: BudgetTerms | None
    clock: ClockState | None


class _Record(NamedTuple):
    """What is written down at a recorded step."""

    values: Values
    saved: PyTree | None
    account: tuple[Any, Any, Any] | None
    elapsed: Float[Array, ""] | None
    alive: Bool[Array, ""]


class _Carry(NamedTuple):
    state: _State
    observing: Carries
    bar: Any


@eqx.filter_jit
@full_matmul_precision()
def run_descent(
    problem: Problem,
    plan: Plan,
    learning_rate: Array | Callable,
    key: PRNGKeyArray | None,
    t0: Float[Array, ""],
    previous: Continuation | None,
    meter: dfx.AbstractProgressMeter,
) -> tuple[Trajectory, TimeUnit]:
    """The whole run: `plan.steps` steps, from the start or from where another ended."""
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes on purpose.
        optimizer = optax.with_extra_args_support(plan.factory(learning_rate))
        memory = optimizer.init(problem.weights)
    if previous is not None:
        memory = previous.optimizer_state
    first_step = jnp.array(0) if previous is None else previous.step
    rate_times, good_rate = _sums_of_rates(plan, learning_rate, first_step, t0)
    loop = _Loop.create(problem, plan, optimizer, meter, rate_times, first_step, memory)
    start = loop.start(memory, key, previous)
    carry, history = jax.lax.scan(
        functools.partial(loop.block, plan.record_every),
        _Carry(start, loop.start_observing(start), meter.init()),
        jnp.arange(plan.num_blocks),
    )
    pieces = [history]
    if plan.num_steps_left:
        index = jnp.asarray(plan.num_blocks)
        carry, last = loop.block(plan.num_steps_left, carry, index)
        pieces.append(_alone(last))
    meter.close(carry.bar)
    end, state = loop.end(carry), carry.state
    records = _joined([*(record for record, _ in pieces), _alone(end)])
    time_unit = time_unit_of(
        loop.clock,
        state.clock,
        plan.steps,
        loop.flow_times(records.elapsed),
        rate_times,
    )
    final = _select(end.alive, state.weights, state.finite_weights)
    trajectory = _assemble(
        loop,
        records,
        good_rate,
        time_unit,
        final=final,
        state=state,
        ledger=_ledger(loop, records, _joined([split for _, split in pieces])),
    )
    return trajectory, time_unit


class _Loop(NamedTuple):
    """The steps of a run, and what is recorded between them.

    `rate_times`: the sum of learning rates at the recorded steps.
    """

    problem: Problem
    plan: Plan
    optimizer: optax.GradientTransformationExtraArgs
    meter: dfx.AbstractProgressMeter
    rate_times: Float[Array, " times"]
    first_step: Int[Array, ""]
    clock: Clock
    accountant: LawBudget | None

    @staticmethod
    def create(
        problem: Problem,
        plan: Plan,
        optimizer: optax.GradientTransformationExtraArgs,
        meter: dfx.AbstractProgressMeter,
        rate_times: Float[Array, " times"],
        first_step: Int[Array, ""],
        memory: PyTree,
    ) -> "_Loop":
        """The loop, with what can be said of the optimizer before its first step."""
        weights = problem.weights
        zeros = jax.tree.map(jnp.zeros_like, weights)
        loss = jnp.zeros((), problem.dtype)
        reading = _read(optimizer, problem.loss, loss, zeros, memory, weights)
        accountant = None
        if plan.laws is not None:
            keeps_weights = starts_from_weights(optimizer.init, weights)
            parts = update_parts(reading, keeps_weights)
            accountant = LawBudget(plan.laws, parts, keeps_weights)
        clock = read_clock(reading, zeros, rate_times.dtype)
        return _Loop(
            problem, plan, optimizer, meter, rate_times, first_step, clock, accountant
        )

    def start(
        self, memory: PyTree, key: PRNGKeyArray | None, previous: Continuation | None
    ) -> _State:
        """The state before the first step."""
        plan, weights = self.plan, self.problem.weights
        order, clock = None, None
        if previous is not None:
            order, clock = previous.order, previous.clock
        if plan.batches is not None and order is None:
            assert key is not None
            order = plan.batches.init(key)
        sums = None if self.accountant is None else self.accountant.start(weights)
        is_sound = values_error(self.problem) == RESULTS.successful
        return _State(
            weights,
            weights,
            memory,
            self.first_step,
            is_sound,
            order,
            sums,
            self.clock.start(clock),
        )

    def flow_times(
        self, elapsed: Float[Array, " times"] | None
    ) -> Float[Array, " times"] | None:
        """Flow time at the recorded steps; `None` if there is none."""
        if elapsed is not None:
            return self.rate_times[0] + elapsed
        if self.clock.step_time is None:
            return None
        recorded = jnp.asarray(self.plan.recorded_steps(), self.rate_times.dtype)
        return self.rate_times[0] + self.clock.step_time * recorded

    def start_observing(self, state: _State) -> Carries:
        """What the observables start from."""

        def make_start() -> Point:
            full = jax.value_and_grad(self.problem.loss)(state.weights)
            return self._point(self.rate_times[0], state, *full)

        return self.plan.recorder.start(make_start)

    def block(
        self, length: int, carry: _Carry, index: Int[Array, ""]
    ) -> tuple[_Carry, tuple[_Record, dict | None]]:
        """One recorded step, and others up to the next one."""
        state, bar = carry.state, carry.bar
        full = jax.value_and_grad(self.problem.loss)(state.weights)
        record, observing = self._observe(index, state, carry.observing, full)
        state, split = self._recorded_step(state, full)
        state = jax.lax.fori_loop(0, length - 1, self._plain_step, state)
        done = state.step - self.first_step
        bar = self.meter.step(bar, done.astype(jnp.float32) / self.plan.steps)
        return _Carry(state, observing, bar), (record, split)

    def end(self, carry: _Carry) -> _Record:
        """What is recorded after the last step."""
        state = carry.state
        full = jax.value_and_grad(self.problem.loss)(state.weights)
        index = jnp.asarray(len(self.plan.recorded_steps()) - 1)
        record, _ = self._observe(index, state, carry.observing, full)
        alive = state.alive & jnp.isfinite(full[0]) & all_finite(state.weights)
        return record._replace(alive=alive)

    def _point(self, t: Array, state: _State, loss: Array, gradient: PyTree) -> Point:
        weights = state.weights

        def velocity():
            return jax.tree.map(jnp.negative, gradient)

        return Point(t, self.problem, weights, loss, gradient, weights, velocity)

    def _observe(
        self, index: Array, state: _State, observing: Carries, full: tuple
    ) -> tuple[_Record, Carries]:
        point = self._point(self._time(index, state), state, *full)
        recorder, accountant = self.plan.recorder, self.accountant
        values, observing = recorder.record_next(point, index, observing)
        account = None
        if accountant is not None:
            weights = state.weights
            account = accountant.values(weights), state.sums, accountant.size(weights)
        saved = state.weights if self.plan.save_models else None
        elapsed = None if state.clock is None else state.clock.elapsed
        return _Record(values, saved, account, elapsed, state.alive), observing

    def _time(self, index: Array, state: _State) -> Float[Array, ""]:
        """The time at a recorded step, so far as it is known by then."""
        if state.clock is not None:
            flow_time = self.rate_times[0] + state.clock.elapsed
            is_flow = state.clock.defects.largest <= self.clock.tolerance
            return jnp.where(is_flow, flow_time, self.rate_times[index])
        flow_times = self.flow_times(None)
        if flow_times is None:
            return self.rate_times[index]
        is_flow = self.clock.defects.largest <= self.clock.tolerance
        return jnp.where(is_flow, flow_times[index], self.rate_times[index])

    def _batch(self, state: _State) -> tuple[Callable, EpochOrder | None]:
        """The loss that a step goes down, and the order of samples after it."""
        batches = self.plan.batches
        if batches is None:
            return self.problem.loss, state.order
        assert state.order is not None
        data, order = batches.take(state.order, state.step, self.problem.data)
        return _batch_loss(self.problem, batches, data), order

    def _read(
        self, state: _State, used: tuple[Array, PyTree], loss_fn: Callable
    ) -> Reading:
        loss, gradient = used
        return _read(
            self.optimizer, loss_fn, loss, gradient, state.memory, state.weights
        )

    def _advance(
        self,
        state: _State,
        used: tuple[Array, PyTree],
        loss_fn: Callable,
        order: EpochOrder | None,
    ) -> _State:
        loss, gradient = used
        reading = self._read(state, used, loss_fn)
        with jax.numpy_dtype_promotion("standard"):
            proposed = optax.apply_updates(state.weights, reading.update)
        # Only the loss is looked at: to look at every weight in every step takes longer
        # than to update them, and a weight that is not finite soon makes the loss so.
        alive = state.alive & jnp.isfinite(loss)
        sums, clock = None, state.clock
        if self.accountant is not None:
            assert state.sums is not None
            sums = self.accountant.add(state.sums, _step(state, gradient, reading))
        if clock is not None:
            clock = self.clock.advance(clock, reading, gradient, alive)
        finite = _select(alive, state.weights, state.finite_weights)
        count = state.step + alive.astype(state.step.dtype)
        return _State(proposed, finite, reading.state, count, alive, order, sums, clock)

    def _plain_step(self, _, state: _State) -> _State:
        loss_fn, order = self._batch(state)
        used = jax.value_and_grad(loss_fn)(state.weights)
        return self._advance(state, used, loss_fn, order)

    def _recorded_step(
        self, state: _State, full: tuple[Array, PyTree]
    ) -> tuple[_State, dict | None]:
        """A step from weights at which loss and gradient of all data are known."""
        loss_fn, order = self._batch(state)
        if self.plan.batches is None:
            return self._advance(state, full, loss_fn, order), None
        used = jax.value_and_grad(loss_fn)(state.weights)
        split = None
        if self.accountant is not None:
            reading = self._read(state, used, loss_fn)
            split = self.accountant.split(full[1], _step(state, used[1], reading))
        return self._advance(state, used, loss_fn, order), split


def _read(
    optimizer: optax.GradientTransformationExtraArgs,
    loss_fn: Callable,
    loss: Array,
    gradient: PyTree,
    memory: PyTree,
    weights: PyTree,
) -> Reading:
    """The optimizer's update, and what it is made of."""

    def update_fn(gradient, memory, weights, value):
        return optimizer.update(
            gradient,
            memory,
            weights,
            value=value,
            grad=gradient,
            value_fn=loss_fn,
            grad_fn=lambda weights, _: jax.grad(loss_fn)(weights),
        )

    return read_update(update_fn, gradient, memory, weights, loss)


def _step(state: _State, gradient: PyTree, reading: Reading) -> Step:
    return Step(state.weights, gradient, state.memory, reading.update, reading)


def _batch_loss(problem: Problem, batches: Batches, data: PyTree) -> Callable:
    """The batch's risk; a sum over samples is scaled up to the whole data set."""
    assert isinstance(problem.objective, Risk)
    scale = 1 if problem.objective.is_mean else batches.samples / batches.size

    return lambda weights: scale * problem.loss_of(weights, data)


def _alone(tree: PyTree) -> PyTree:
    """One entry of what is recorded over time."""
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _joined(pieces: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *p: jnp.concatenate(p), *pieces)


def _select(choice: Bool[Array, ""], these: PyTree, those: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(choice, a, b), these, those)


def _sums_of_rates(
    plan: Plan,
    learning_rate: Array | Callable,
    first_step: Int[Array, ""],
    t0: Float[Array, ""],
) -> tuple[Float[Array, " times"], Bool[Array, ""]]:
    """Sums of learning rates at the recorded steps, and whether all of them make sense.

    Not summed step by step: in float32 that loses digits.
    """
    recorded, dtype = plan.recorded_steps(), t0.dtype
    if not callable(learning_rate):
        is_good = jnp.isfinite(learning_rate) & (learning_rate > 0)
        return t0 + learning_rate * jnp.asarray(recorded, dtype), is_good
    with jax.numpy_dtype_promotion("standard"):
        rates = jax.lax.map(
            lambda count: jnp.asarray(learning_rate(count), dtype),
            first_step + jnp.arange(plan.steps),
        )
    times = jnp.concatenate([jnp.zeros(1, dtype), jnp.cumsum(rates)])
    return t0 + times[recorded], jnp.all(jnp.isfinite(rates) & (rates >= 0))


def _ledger(loop: _Loop, records: _Record, splits: dict | None) -> Ledger | None:
    if loop.accountant is None:
        return None
    assert records.account is not None
    values, sums, sizes = records.account
    first = jax.tree.map(lambda h: h[:1], values)
    steps = jnp.asarray(loop.plan.recorded_steps())
    largest = jax.lax.cummax(sizes)
    rounding = possible_rounding(largest, steps, loop.problem.weights)
    return loop.accountant.ledger(first, values, sums, rounding=rounding, splits=splits)


def _assemble(
    loop: _Loop,
    records: _Record,
    good_rate: Bool[Array, ""],
    time_unit: TimeUnit,
    *,
    final: PyTree,
    state: _State,
    ledger: Ledger | None,
) -> Trajectory:
    problem, plan, ts = loop.problem, loop.plan, time_unit.ts
    standard = {name: records.values[name] for name in STANDARD}
    valid = records.alive & jax.vmap(all_finite)(standard) & good_rate
    result = RESULTS.where(jnp.all(valid), RESULTS.successful, RESULTS.diverged)
    result = RESULTS.where(good_rate, result, RESULTS.bad_learning_rate)
    error = values_error(problem)
    result = RESULTS.where(error == RESULTS.successful, result, error)
    steps = state.step - loop.first_step
    num_extra = 0 if plan.batches is None else len(records.alive) - 1
    numbers = {
        "steps": steps,
        "diverged_at_step": jnp.where(result == RESULTS.diverged, steps, -1),
        "gradient_evaluations": jnp.asarray(plan.steps + num_extra + 1),
        "time_reached": jnp.max(jnp.where(valid, ts, ts[0])),
        "clock_defect": time_unit.defect,
    }
    return make_trajectory(
        problem,
        plan.recorder,
        ts,
        plan.recorder.thin_out(records.values),
        valid,
        final=final,
        saved=records.saved,
        result=result,
        numbers=numbers,
        ledger=ledger,
        continuation=Continuation(state.memory, state.step, state.order, state.clock),
    )
