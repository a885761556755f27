"""Gradient descent in a compiled loop: from the start to a trajectory."""

from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from .._jax._arrays import all_finite
from .._jax._compilation import fast_compile_jit
from .._jax._precision import full_matmul_precision
from .._jax._tracing import is_concrete
from .._observe._assemble import make_trajectory
from .._observe._recorder import STANDARD, Values
from .._observe._time_grid import values_error
from .._problem._problem import Problem
from .._results._known_times import (
    at_known_times,
    ledger_at_known_times,
    nan_unless_known,
)
from .._results._ledger import Ledger
from .._results._status import RESULTS
from .._results._trajectory import Trajectory
from ._loop import Carry, History, Loop, Record, select
from ._plan import Continuation, Plan
from ._rows import Rows
from ._time_unit import TimeUnit, time_unit_of


class Outcome(eqx.Module):
    """What a run ends with; `Trajectory` without its values over time.

    - `rows`: these, not yet taken apart; `valid`: which of the rows are good.
    - `final`: the trained weights; `numbers`: for `stats`.
    """

    rows: Rows
    valid: Bool[Array, " rows"]
    final: PyTree
    result: RESULTS
    numbers: dict[str, Array]
    ledger: Ledger | None
    continuation: Continuation
    time_unit: TimeUnit


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
) -> Outcome | tuple[Trajectory, TimeUnit]:
    """The whole run: `plan.steps` steps, from the start or from where another ended.

    Of a plan for all sizes, an outcome of which `trajectory_of` takes the rows there are.
    """
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
    carry = loop.run(loop.start(memory, key, previous))
    meter.close(carry.bar)
    outcome = _outcome(loop, carry, rate_times, good_rate)
    if plan.is_for_all_sizes:
        return outcome
    records = outcome.rows.values().records
    ts, values = outcome.time_unit.ts, plan.recorder.thin_out(records.values)
    more = outcome.valid, outcome.ledger, records.saved
    trajectory = _make_trajectory(problem, plan, outcome, ts, values, *more)
    return trajectory, outcome.time_unit


def trajectory_of(
    problem: Problem,
    plan: Plan,
    outcome: Outcome | tuple[Trajectory, TimeUnit],
    times: int,
) -> tuple[Trajectory, TimeUnit]:
    """What `run_descent` ends with, without rows for more times than there are."""
    if not isinstance(outcome, Outcome):
        return outcome
    over_time = outcome.rows, outcome.valid, outcome.time_unit.ts
    ledger = outcome.ledger
    if is_concrete(outcome):
        rows, valid, ts = at_known_times(over_time, times)
        values = nan_unless_known(valid, rows.values().records.values)
        # Where they were computed, if a user said where.
        device = outcome.valid.sharding if outcome.valid.committed else None
        ts, values = jax.device_put((ts, values), device)
        if ledger is not None:
            ledger = ledger_at_known_times(ledger, valid)
        valid = None
    else:
        # An optimizer holds numbers that are traced, of which nobody knew.
        rows, valid, ts = jax.tree.map(lambda leaf: leaf[:times], over_time)
        values = rows.values().records.values
        if ledger is not None:
            ledger = ledger.first(times)
    more = valid, ledger
    trajectory = _make_trajectory(problem, plan, outcome, ts, values, *more)
    return trajectory, outcome.time_unit


def _make_trajectory(
    problem: Problem,
    plan: Plan,
    outcome: Outcome,
    ts: Float[Array, " times"],
    values: Values,
    valid: Bool[Array, " times"] | None,
    ledger: Ledger | None,
    saved: PyTree | None = None,
) -> Trajectory:
    return make_trajectory(
        problem,
        plan.recorder,
        ts,
        values,
        valid,
        final=outcome.final,
        saved=saved,
        result=outcome.result,
        numbers=outcome.numbers,
        ledger=ledger,
        continuation=outcome.continuation,
    )


def _outcome(
    loop: Loop, carry: Carry, rate_times: Array, good_rate: Bool[Array, ""]
) -> Outcome:
    """What is said of a run when it has ended."""
    problem, plan, state = loop.problem, loop.plan, carry.state
    records, splits = carry.rows.values()
    finite = carry.rows.are_finite(_standard)
    places = jnp.arange(plan.room)
    is_there = places < plan.num_recorded
    valid = records.alive & finite & good_rate & is_there
    # Its step is the last, of which no loss is seen.
    is_end_sound = state.alive & jnp.all(finite | (places != plan.num_recorded - 1))
    time_unit = time_unit_of(
        loop.clock, state.clock, plan.steps, _ts(loop, records), rate_times
    )
    is_sound = jnp.all(valid | ~is_there)
    result = RESULTS.where(is_sound, RESULTS.successful, RESULTS.diverged)
    first = records.values["losses"][0], records.values["grad_norms"][0]
    result = RESULTS.where(all_finite(first), result, RESULTS.nonfinite_at_start)
    result = RESULTS.where(good_rate, result, RESULTS.bad_learning_rate)
    if not plan.are_values_known:
        error = values_error(problem)
        result = RESULTS.where(error == RESULTS.successful, result, error)
    steps, ts = state.step - loop.first_step, time_unit.ts
    num_extra = 0 if plan.batches is None else plan.num_recorded - 1
    violations = jnp.where(valid, records.values["law_violation"], 0)
    numbers = {
        "steps": steps,
        "diverged_at_step": jnp.where(result == RESULTS.diverged, steps, -1),
        "gradient_evaluations": jnp.asarray(plan.steps + num_extra + 1),
        "time_reached": jnp.max(jnp.where(valid, ts, ts[0])),
        "clock_defect": time_unit.defect,
        "law_violation": jnp.max(violations),
    }
    if splits is not None:
        splits = jax.tree.map(lambda rows: rows[:-1], splits)
    return Outcome(
        carry.rows,
        valid,
        select(is_end_sound, state.weights, state.finite_weights),
        result,
        numbers,
        _ledger(loop, records, splits),
        Continuation(state.memory, state.step, state.order, state.clock),
        time_unit,
    )


def _standard(history: History) -> PyTree:
    """What every run records."""
    return {name: history.records.values[name] for name in STANDARD}


def _ts(loop: Loop, records: Record) -> Float[Array, " times"]:
    """The times at the recorded steps, if they are flow time."""
    return loop.ts if records.elapsed is None else loop.ts[0] + records.elapsed


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
        return t0 + learning_rate * recorded.astype(dtype), is_good
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
    steps = loop.plan.recorded_steps()
    largest = jax.lax.cummax(sizes)
    rounding = loop.accountant.possible_rounding(largest, steps)
    return loop.accountant.ledger(first, values, sums, rounding=rounding, splits=splits)
