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
from ._clock import Clock
from ._factory import Factory
from ._law_budget import BudgetTerms, LawBudget, Step


class Continuation(eqx.Module):
    """What gradient descent hands on to a run that goes on where it ended.

    - `optimizer_state`: the optimizer's memory; `order`: of the samples in this epoch.
    - `step`: how many steps were taken so far.
    """

    optimizer_state: PyTree
    step: Int[Array, ""]
    order: EpochOrder | None


class Plan(eqx.Module):
    """Everything about a run that is known before it starts."""

    steps: int = eqx.field(static=True)
    record_every: int = eqx.field(static=True)
    batches: Batches | None
    save_models: bool = eqx.field(static=True)
    factory: Factory
    clock: Clock
    accountant: LawBudget | None
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


class _Record(NamedTuple):
    """What is written down at a recorded step."""

    values: Values
    saved: PyTree | None
    account: tuple[Any, Any] | None
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
) -> Trajectory:
    """The whole run: `plan.steps` steps, from the start or from where another ended."""
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes on purpose.
        optimizer = optax.with_extra_args_support(plan.factory(learning_rate))
        memory = optimizer.init(problem.weights)
    first_step = jnp.array(0) if previous is None else previous.step
    ts, good_rate = _times(plan, learning_rate, first_step, t0)
    loop = _Loop(problem, plan, optimizer, meter, ts, first_step)
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
    final = _select(end.alive, state.weights, state.finite_weights)
    return _assemble(
        loop,
        records,
        good_rate,
        final=final,
        state=state,
        ledger=_ledger(plan, records, _joined([split for _, split in pieces])),
    )


class _Loop(NamedTuple):
    """The steps of a run, and what is recorded between them."""

    problem: Problem
    plan: Plan
    optimizer: optax.GradientTransformationExtraArgs
    meter: dfx.AbstractProgressMeter
    ts: Float[Array, " times"]
    first_step: Int[Array, ""]

    def start(
        self, memory: PyTree, key: PRNGKeyArray | None, previous: Continuation | None
    ) -> _State:
        """The state before the first step."""
        plan, weights = self.plan, self.problem.weights
        order = None
        if previous is not None:
            memory, order = previous.optimizer_state, previous.order
        if plan.batches is not None and order is None:
            assert key is not None
            order = plan.batches.init(key)
        sums = None if plan.accountant is None else plan.accountant.start(weights)
        is_sound = values_error(self.problem) == RESULTS.successful
        return _State(weights, weights, memory, self.first_step, is_sound, order, sums)

    def start_observing(self, state: _State) -> Carries:
        """What the observables start from."""

        def make_start() -> Point:
            full = jax.value_and_grad(self.problem.loss)(state.weights)
            return self._point(self.ts[0], state, *full)

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
        point = self._point(self.ts[index], state, *full)
        recorder, accountant = self.plan.recorder, self.plan.accountant
        values, observing = recorder.record_next(point, index, observing)
        account = None
        if accountant is not None:
            account = accountant.values(state.weights), state.sums
        saved = state.weights if self.plan.save_models else None
        return _Record(values, saved, account, state.alive), observing

    def _batch(self, state: _State) -> tuple[Callable, EpochOrder | None]:
        """The loss that a step goes down, and the order of samples after it."""
        batches = self.plan.batches
        if batches is None:
            return self.problem.loss, state.order
        assert state.order is not None
        data, order = batches.take(state.order, state.step, self.problem.data)
        return _batch_loss(self.problem, batches, data), order

    def _responder(self, loss: Array, loss_fn: Callable) -> Callable:
        """The optimizer, as a function of gradient, memory and weights alone."""

        def respond(gradient, memory, weights):
            with jax.numpy_dtype_promotion("standard"):
                return self.optimizer.update(
                    gradient,
                    memory,
                    weights,
                    value=loss,
                    grad=gradient,
                    value_fn=loss_fn,
                )

        return respond

    def _advance(
        self,
        state: _State,
        used: tuple[Array, PyTree],
        loss_fn: Callable,
        order: EpochOrder | None,
    ) -> _State:
        loss, gradient = used
        respond = self._responder(loss, loss_fn)
        update, memory = respond(gradient, state.memory, state.weights)
        with jax.numpy_dtype_promotion("standard"):
            proposed = optax.apply_updates(state.weights, update)
        sums, accountant = None, self.plan.accountant
        if accountant is not None:
            step = Step(state.weights, gradient, state.memory, update)
            assert state.sums is not None
            sums = accountant.add(state.sums, step, respond)
        # Only the loss is looked at: to look at every weight in every step takes longer
        # than to update them, and a weight that is not finite soon makes the loss so.
        alive = state.alive & jnp.isfinite(loss)
        finite = _select(alive, state.weights, state.finite_weights)
        count = state.step + alive.astype(state.step.dtype)
        return _State(proposed, finite, memory, count, alive, order, sums)

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
        split, accountant = None, self.plan.accountant
        if accountant is not None:
            respond, gradient = self._responder(used[0], loss_fn), used[1]
            update, _ = respond(gradient, state.memory, state.weights)
            step = Step(state.weights, gradient, state.memory, update)
            split = accountant.split(full[1], step, respond)
        return self._advance(state, used, loss_fn, order), split


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


def _times(
    plan: Plan,
    learning_rate: Array | Callable,
    first_step: Int[Array, ""],
    t0: Float[Array, ""],
) -> tuple[Float[Array, " times"], Bool[Array, ""]]:
    """Flow time at the recorded steps, and whether every learning rate makes sense.

    Not summed step by step: in float32 that loses digits.
    """
    recorded, dtype = plan.recorded_steps(), t0.dtype
    if not callable(learning_rate):
        is_good = jnp.isfinite(learning_rate) & (learning_rate > 0)
        times = learning_rate * jnp.asarray(recorded, dtype) * plan.clock.time_per_step
        return t0 + times, is_good
    with jax.numpy_dtype_promotion("standard"):
        rates = jax.lax.map(
            lambda count: jnp.asarray(learning_rate(count), dtype),
            first_step + jnp.arange(plan.steps),
        )
    times = jnp.concatenate([jnp.zeros(1, dtype), jnp.cumsum(rates)])
    is_good = jnp.all(jnp.isfinite(rates) & (rates >= 0))
    return t0 + times[recorded] * plan.clock.time_per_step, is_good


def _ledger(plan: Plan, records: _Record, splits: dict | None) -> Ledger | None:
    if plan.accountant is None:
        return None
    assert records.account is not None
    values, sums = records.account
    first = jax.tree.map(lambda h: h[:1], values)
    return plan.accountant.ledger(first, values, sums, splits)


def _assemble(
    loop: _Loop,
    records: _Record,
    good_rate: Bool[Array, ""],
    *,
    final: PyTree,
    state: _State,
    ledger: Ledger | None,
) -> Trajectory:
    problem, plan, ts = loop.problem, loop.plan, loop.ts
    standard = {name: records.values[name] for name in STANDARD}
    valid = records.alive & jax.vmap(all_finite)(standard) & good_rate
    result = RESULTS.where(jnp.all(valid), RESULTS.successful, RESULTS.diverged)
    first = records.values["losses"][0], records.values["grad_norms"][0]
    result = RESULTS.where(all_finite(first), result, RESULTS.nonfinite_at_start)
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
        continuation=Continuation(state.memory, state.step, state.order),
    )
