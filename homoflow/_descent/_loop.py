"""The steps of gradient descent, and what is recorded between them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from .._observe._base import Point
from .._observe._recorder import Carries, Values
from .._observe._time_grid import values_error
from .._problem._losses import Risk
from .._problem._problem import Problem
from .._results._status import RESULTS
from ._batches import Batches, EpochOrder
from ._clock import Clock, ClockState, read_clock
from ._factory import one_set_of_weights, update_with_extras
from ._law_budget import BudgetTerms, LawBudget, Step, unit_of_rounding
from ._plan import Continuation, Plan
from ._read_update import Reading, read_update
from ._rows import Rows
from ._update_parts import starts_from_weights, update_parts


class State(eqx.Module):
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


class Record(NamedTuple):
    """What is written down at a recorded step."""

    values: Values
    saved: PyTree | None
    account: tuple[Any, Any, Any] | None
    elapsed: Float[Array, ""] | None
    alive: Bool[Array, ""]


class History(NamedTuple):
    """What is written down at a recorded step, and of the step that starts there.

    `splits`: what the noise of its batch does, if there are batches and an account.
    """

    records: Record
    splits: dict | None


class Carry(NamedTuple):
    state: State
    observing: Carries
    bar: Any
    rows: Rows


class Loop(NamedTuple):
    """The steps of a run, and what is recorded between them.

    `ts`: the times at the recorded steps; the sums of learning rates as long as flow time
    has to be found.
    """

    problem: Problem
    plan: Plan
    optimizer: optax.GradientTransformationExtraArgs
    meter: dfx.AbstractProgressMeter
    ts: Float[Array, " times"]
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
    ) -> "Loop":
        """The loop, with what can be said of the optimizer before its first step."""
        weights = problem.weights
        zeros = jax.tree.map(jnp.zeros_like, weights)
        loss = jnp.zeros((), problem.dtype)
        reading = _read(optimizer, problem.loss, loss, zeros, memory, weights)
        accountant = None
        if plan.laws is not None:
            keeps_weights = starts_from_weights(optimizer.init, weights)
            parts = update_parts(reading, keeps_weights)
            unit = unit_of_rounding(weights, memory)
            accountant = LawBudget(plan.laws, parts, unit, keeps_weights)
        clock = read_clock(reading, zeros, rate_times.dtype)
        ts = clock.times(plan.recorded_steps(), rate_times)
        return Loop(problem, plan, optimizer, meter, ts, first_step, clock, accountant)

    def start(
        self, memory: PyTree, key: PRNGKeyArray | None, previous: Continuation | None
    ) -> State:
        """The state before the first step."""
        plan, weights = self.plan, self.problem.weights
        order, clock = None, None
        if previous is not None:
            order, clock = previous.order, previous.clock
        if plan.batches is not None and order is None:
            assert key is not None
            order = plan.batches.init(key)
        sums = None if self.accountant is None else self.accountant.start(weights)
        is_sound = jnp.asarray(True)
        if not plan.are_values_known:
            is_sound = values_error(self.problem) == RESULTS.successful
        return State(
            weights,
            weights,
            memory,
            self.first_step,
            is_sound,
            order,
            sums,
            self.clock.start(clock),
        )

    def start_observing(self, state: State) -> Carries:
        """What the observables start from."""

        def make_start() -> Point:
            full = jax.value_and_grad(self.problem.loss)(state.weights)
            return self._point(self.ts[0], state, *full)

        return self.plan.recorder.start(make_start)

    def run(self, start: State) -> Carry:
        """All steps from the state before the first: the end, and what was recorded.

        Everything stands in the program once: each round of its loop takes a gradient,
        writes down what is due, and steps. The last round does not step.
        """
        observing = self._start_observing(start)
        row = jnp.arange(0).dtype.type(0)
        full = jax.eval_shape(self._gradient, start)
        seen = row, start, observing, full
        observe: Any = eqx.filter_closure_convert(self._observe, *seen)
        splits = jax.eval_shape(self._no_split, start)
        rows = Rows.create(History(observe.out_struct[0], splits), self.plan.room)
        carry = Carry(start, observing, self.meter.init(), rows)
        one_round = functools.partial(self._round, observe)
        return jax.lax.fori_loop(0, self.plan.steps + 1, one_round, carry)

    def _start_observing(self, state: State) -> Carries:
        """What the observables start from."""

        def make_start() -> Point:
            full = jax.value_and_grad(self.problem.loss)(state.weights)
            return self._point(self.ts[0], state, *full)

        return self.plan.recorder.start(make_start)

    def _round(self, observe: Callable, index: Int[Array, ""], carry: Carry) -> Carry:
        """What is due before a step, and the step."""
        plan, state = self.plan, carry.state
        row, is_end = plan.row(index), index == plan.steps
        is_due = plan.is_due(index) | is_end
        full = self._gradient(state)
        seen = row, state, carry.observing, full
        if isinstance(plan.record_every, int) and plan.record_every == 1:
            record, observing, mean = observe(*seen)
        else:
            record, observing, mean = jax.lax.cond(
                is_due,
                lambda *seen: observe(*seen),
                lambda *seen: _see_nothing(observe, *seen),
                *seen,
            )
        state, split = jax.lax.cond(
            is_end,
            lambda state, *_: (state, self._no_split(state)),
            self._step,
            *(state, full, mean, is_due),
        )
        # Between two recorded steps this fills the row of the next, which comes later.
        rows = carry.rows.write(jnp.asarray(row), History(record, split))
        done = state.step - self.first_step
        progress = done.astype(jnp.float32) / jnp.asarray(plan.steps, jnp.float32)
        return Carry(state, observing, self.meter.step(carry.bar, progress), rows)

    def _gradient(self, state: State) -> tuple[Array, PyTree] | None:
        """Loss and gradient of all data, if every step goes down these."""
        if self.plan.batches is not None:
            return None
        return jax.value_and_grad(self.problem.loss)(state.weights)

    def _point(self, t: Array, state: State, loss: Array, gradient: PyTree) -> Point:
        weights = state.weights

        def velocity():
            return jax.tree.map(jnp.negative, gradient)

        return Point(
            t, self.problem, weights, loss, gradient, weights, velocity, state.memory
        )

    def _observe(
        self, row: Array, state: State, observing: Carries, full: tuple | None
    ) -> tuple[Record, Carries, PyTree | None]:
        """What is recorded, what is handed on, and the gradient where a split needs it."""
        if full is None:
            full = jax.value_and_grad(self.problem.loss)(state.weights)
        point = self._point(self._time(row, state), state, *full)
        recorder, accountant = self.plan.recorder, self.accountant
        values, observing = recorder.record_next(point, row, observing)
        account = None
        if accountant is not None:
            weights = state.weights
            account = accountant.values(weights), state.sums, accountant.size(weights)
        saved = state.weights if self.plan.save_models else None
        elapsed = None if state.clock is None else state.clock.elapsed
        record = Record(values, saved, account, elapsed, state.alive)
        return record, observing, full[1] if self._has_split else None

    def _time(self, index: Array, state: State) -> Float[Array, ""]:
        """The time at a recorded step, so far as it is known by then."""
        if state.clock is None:
            return self.ts[index]
        is_flow = state.clock.defects.largest <= self.clock.tolerance
        return jnp.where(is_flow, self.ts[0] + state.clock.elapsed, self.ts[index])

    def _batch(self, state: State) -> tuple[Callable, EpochOrder | None]:
        """The loss that a step goes down, and the order of samples after it."""
        batches = self.plan.batches
        if batches is None:
            return self.problem.loss, state.order
        assert state.order is not None
        data, order = batches.take(state.order, state.step, self.problem.data)
        return _batch_loss(self.problem, batches, data), order

    def _read(
        self, state: State, used: tuple[Array, PyTree], loss_fn: Callable
    ) -> Reading:
        loss, gradient = used
        return _read(
            self.optimizer, loss_fn, loss, gradient, state.memory, state.weights
        )

    @property
    def _has_split(self) -> bool:
        """Whether an account tells what the noise of batches does."""
        accountant = self.accountant
        is_batch = self.plan.batches is not None
        return is_batch and accountant is not None and accountant.has_split

    def _no_split(self, state: State) -> dict | None:
        """The split's zeros, where there is a split."""
        if not self._has_split:
            return None
        assert self.accountant is not None
        return self.accountant.no_split(state.weights)

    def _step(
        self,
        state: State,
        full: tuple[Array, PyTree] | None,
        mean: PyTree | None,
        is_due: Bool[Array, ""],
    ) -> tuple[State, dict | None]:
        """One step, and what the noise of its batch does if that is `is_due`."""
        loss_fn, order = self._batch(state)
        used = jax.value_and_grad(loss_fn)(state.weights) if full is None else full
        reading = self._read(state, used, loss_fn)
        split = None
        if self._has_split:
            accountant = self.accountant
            assert accountant is not None
            split = jax.lax.cond(
                is_due,
                lambda: accountant.split(mean, _step(state, used[1], reading)),
                lambda: self._no_split(state),
            )
        return self._advance(state, used, reading, order), split

    def _advance(
        self,
        state: State,
        used: tuple[Array, PyTree],
        reading: Reading,
        order: EpochOrder | None,
    ) -> State:
        loss, gradient = used
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
        finite = select(alive, state.weights, state.finite_weights)
        count = state.step + alive.astype(state.step.dtype)
        return State(proposed, finite, reading.state, count, alive, order, sums, clock)


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
        update = functools.partial(optimizer.update, gradient, memory, weights)
        return update_with_extras(update, loss_fn, value=value, grad=gradient)

    with one_set_of_weights():
        return read_update(update_fn, gradient, memory, weights, loss)


def _step(state: State, gradient: PyTree, reading: Reading) -> Step:
    return Step(state.weights, gradient, reading.update, reading)


def _batch_loss(problem: Problem, batches: Batches, data: PyTree) -> Callable:
    """The batch's risk; a sum over samples is scaled up to the whole data set."""
    assert isinstance(problem.objective, Risk)
    scale = 1 if problem.objective.is_mean else batches.samples / batches.size

    return lambda weights: scale * problem.loss_of(weights, data)


def select(choice: Bool[Array, ""], these: PyTree, those: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(choice, a, b), these, those)


def _see_nothing(
    observe: Any, row: Array, state: State, observing: Carries, full: tuple | None
) -> tuple[Record, Carries, PyTree | None]:
    """Zeros in place of what would be recorded."""
    del row, state, full
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), observe.out_struct)
    return zeros[0], observing, zeros[2]
