"""Gradient descent in a compiled loop: from the start to a trajectory."""

import functools
from collections.abc import Callable

import diffrax as dfx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from .._jax._arrays import all_finite
from .._jax._compilation import fast_compile_jit
from .._jax._precision import full_matmul_precision
from .._observe._assemble import make_trajectory
from .._observe._recorder import STANDARD
from .._observe._time_grid import values_error
from .._problem._problem import Problem
from .._results._ledger import Ledger
from .._results._status import RESULTS
from .._results._trajectory import Trajectory
from ._loop import Carry, Loop, Record, State, select
from ._plan import Continuation, Plan
from ._time_unit import TimeUnit, time_unit_of


@fast_compile_jit
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
        optimizer = optax.with_extra_args_support(
            plan.factory(_in_full_precision(learning_rate))
        )
        memory = optimizer.init(problem.weights)
    if previous is not None:
        memory = previous.optimizer_state
    first_step = jnp.array(0) if previous is None else previous.step
    rate_times, good_rate = _sums_of_rates(plan, learning_rate, first_step, t0)
    loop = Loop.create(problem, plan, optimizer, meter, rate_times, first_step, memory)
    start = loop.start(memory, key, previous)
    carry, history = jax.lax.scan(
        functools.partial(loop.block, plan.record_every),
        Carry(start, loop.start_observing(start), meter.init()),
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
        loop.clock, state.clock, plan.steps, _ts(loop, records), rate_times
    )
    final = select(end.alive, state.weights, state.finite_weights)
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


def _ts(loop: Loop, records: Record) -> Float[Array, " times"]:
    """The times at the recorded steps, if they are flow time."""
    return loop.ts if records.elapsed is None else loop.ts[0] + records.elapsed


def _alone(tree: PyTree) -> PyTree:
    """One entry of what is recorded over time."""
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _joined(pieces: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *p: jnp.concatenate(p), *pieces)


def _in_full_precision(learning_rate: Array | Callable) -> Array | Callable:
    """A schedule that is not rounded to single precision by Optax's short counts."""
    if not callable(learning_rate):
        return learning_rate
    return lambda count: learning_rate(jnp.asarray(count, jnp.arange(0).dtype))


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


def _ledger(loop: Loop, records: Record, splits: dict | None) -> Ledger | None:
    if loop.accountant is None:
        return None
    assert records.account is not None
    values, sums, sizes = records.account
    first = jax.tree.map(lambda h: h[:1], values)
    steps = jnp.asarray(loop.plan.recorded_steps())
    largest = jax.lax.cummax(sizes)
    rounding = loop.accountant.possible_rounding(largest, steps)
    return loop.accountant.ledger(first, values, sums, rounding=rounding, splits=splits)


def _assemble(
    loop: Loop,
    records: Record,
    good_rate: Bool[Array, ""],
    time_unit: TimeUnit,
    *,
    final: PyTree,
    state: State,
    ledger: Ledger | None,
) -> Trajectory:
    problem, plan, ts = loop.problem, loop.plan, time_unit.ts
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
