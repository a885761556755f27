"""`descend`: gradient descent on the flow's clock, by Optax in a scan."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree

from .._jax._arrays import all_finite
from .._jax._precision import full_matmul_precision
from .._jax._progress import Progress, as_meter
from .._jax._tracing import is_concrete
from .._laws import Law
from .._observe._assemble import recorded_trajectory
from .._observe._observables import Observation, observe
from .._problem._losses import LossLike, Risk, SquaredLoss
from .._problem._problem import Objective, Problem, pose
from .._problem._trainable import Trainable
from .._results._ledger import Ledger
from .._results._trajectory import (
    RESULTS,
    Trajectory,
    raise_unless_successful,
)
from ._batches import Batches, EpochOrder
from ._clock import Clock, read_clock
from ._law_budget import BudgetTerms, LawBudget, Step
from ._update_parts import probe_update_parts

LearningRate = float | int | Float[ArrayLike, ""] | Callable[[Any], Any]
OptimizerFactory = Callable[[Any], optax.GradientTransformation]


def descend(
    model: PyTree,
    data: PyTree,
    steps: int,
    *,
    learning_rate: LearningRate,
    optimizer: OptimizerFactory = optax.sgd,
    batch_size: int | None = None,
    key: PRNGKeyArray | None = None,
    loss: LossLike = SquaredLoss(),  # noqa: B008
    objective: Objective | None = None,
    trainable: Trainable = None,
    laws: Iterable[Law] | None = None,
    record_every: int = 1,
    save_models: bool = False,
    ledger: bool = False,
    throw: bool = True,
    progress: Progress = False,
) -> Trajectory:
    """Gradient descent w ← w − η∇L(w) from `model`'s weights, on the flow's clock.

    With the default `optax.sgd` a step of learning rate η is a step of Euler's method
    for `homoflow.flow`, and takes time η. With momentum μ it takes η/(1−μ). For
    optimizers without a gradient-flow limit (Adam) the clock adds up learning rates, and
    `stats["clock"]` says so.

    **Arguments:**

    - `model`, `data`, `loss`, `objective`, `trainable`, `laws`, `throw`, `progress`: as
        for `homoflow.flow`.
    - `steps`: how many.
    - `learning_rate`: a positive number, or a schedule from step to learning rate.
    - `optimizer`: a function from the learning rate to an Optax transformation:
        `optax.adam`, `functools.partial(optax.sgd, momentum=0.9)`,
        `lambda lr: optax.chain(optax.clip(1.0), optax.sgd(lr))`.
    - `batch_size`, `key`: for stochastic gradients. Each epoch visits the samples in a
        new random order; a last incomplete batch is left out.
    - `record_every`: record every so many steps, and at the end.
    - `save_models`: also keep the model at every recorded step.
    - `ledger`: also account for every change of every law: `trajectory.ledger`, a
        `homoflow.Ledger`, splits it exactly into what discretization, momentum, weight
        decay and the optimizer's transformation of the gradient do, and with minibatches
        into mean gradient and noise. Costs two to four sums over the weights in each
        step; for matrix laws as many matrix products, each about n/3m of a gradient's
        cost for layers of width n and batches of m.

    **Returns:** a `homoflow.Trajectory`. `losses`, `grad_norms` and laws are of the full
    data set also with minibatches. `stats` hold `steps`, `diverged_at_step` (−1 if it did
    not), `gradient_evaluations`, `time_reached`, `law_violation`, `optimizer`, `clock`.

    If the loss becomes inf or NaN the result is `diverged`: `model` keeps the last weights
    with a finite loss and everything recorded afterwards is NaN.

    **Raises:** `ValueError` for bad input, before anything is compiled;
    `homoflow.TrajectoryError`, which holds what was computed, if the run diverges.

    ```python
    model = hf.MLP((3, 8, 1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    gd = hf.descend(model, (x, x[:, :1]), steps=50, learning_rate=0.1)
    gd.ts[-1]  # 5.0
    ```
    """
    problem = pose(
        model,
        data,
        loss=loss,
        objective=objective,
        trainable=trainable,
        laws=laws,
    )
    _check_counts(steps=steps, record_every=record_every)
    if not callable(learning_rate):
        _check_learning_rate(learning_rate)
        learning_rate = jnp.asarray(learning_rate, _time_dtype(problem))
    factory, weights = _Factory.of(optimizer), problem.weights
    accountant = None
    if ledger:
        accountant = LawBudget(problem.laws, probe_update_parts(factory, weights))
    plan = _Plan(
        steps=steps,
        record_every=min(record_every, steps),
        batches=_checked_batches(problem, batch_size, key),
        save_models=save_models,
        factory=factory,
        clock=read_clock(factory, weights),
        accountant=accountant,
    )
    trajectory = _run(problem, plan, learning_rate, key, as_meter(progress))
    return raise_unless_successful(trajectory) if throw else trajectory


class _Factory(eqx.Module):
    """An optimizer factory that is equal to another one that does the same.

    Two `functools.partial` objects never compare equal, and would compile twice.
    """

    function: Callable = eqx.field(static=True)
    args: tuple = eqx.field(static=True)
    keywords: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    @staticmethod
    def of(optimizer: Any) -> "_Factory":
        if not callable(optimizer):
            raise TypeError(
                "`optimizer` must be a function from the learning rate to an Optax "
                "transformation, such as `optax.adam` itself (not `optax.adam(1e-3)`)."
            )
        if isinstance(optimizer, functools.partial):
            keywords = tuple(sorted(optimizer.keywords.items()))
            try:
                hash((optimizer.args, keywords))
            except TypeError:
                return _Factory(optimizer, (), ())
            return _Factory(optimizer.func, optimizer.args, keywords)
        return _Factory(optimizer, (), ())

    def __call__(self, learning_rate) -> optax.GradientTransformation:
        made = self.function(*self.args, learning_rate, **dict(self.keywords))
        if not isinstance(made, optax.GradientTransformation):
            raise TypeError(
                "`optimizer(learning_rate)` must return an Optax transformation; got "
                f"{type(made).__name__}."
            )
        return made

    @property
    def name(self) -> str:
        text = getattr(self.function, "__name__", type(self.function).__name__)
        given = [repr(a) for a in self.args]
        given += [f"{k}={v!r}" for k, v in self.keywords]
        return f"{text}({', '.join(given)})" if given else text


class _Plan(eqx.Module):
    """Everything about a run that is known before it starts."""

    steps: int = eqx.field(static=True)
    record_every: int = eqx.field(static=True)
    batches: Batches | None
    save_models: bool = eqx.field(static=True)
    factory: _Factory
    clock: Clock
    accountant: LawBudget | None

    @property
    def blocks(self) -> int:
        """How many times `record_every` steps are taken; a rest may follow."""
        return self.steps // self.record_every

    @property
    def rest(self) -> int:
        return self.steps % self.record_every

    def recorded_steps(self) -> np.ndarray:
        """The steps before which something is recorded, and the end."""
        starts = np.arange(0, self.steps, self.record_every)
        return np.append(starts, self.steps)


class _State(eqx.Module):
    """What one step hands to the next; `kept` are the last weights with a finite loss."""

    weights: PyTree
    kept: PyTree
    memory: PyTree
    step: Int[Array, ""]
    alive: Bool[Array, ""]
    order: EpochOrder | None
    sums: BudgetTerms | None


@eqx.filter_jit
@full_matmul_precision()
def _run(
    problem: Problem,
    plan: _Plan,
    learning_rate: Array | Callable,
    key: PRNGKeyArray | None,
    meter: dfx.AbstractProgressMeter,
) -> Trajectory:
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes on purpose.
        optimizer = optax.with_extra_args_support(plan.factory(learning_rate))
        memory = optimizer.init(problem.weights)
    accountant = plan.accountant

    def observed(state, loss, gradient):
        weights = state.weights
        seen = observe(problem.laws, weights, loss, gradient)
        entry = None if accountant is None else (accountant.values(weights), state.sums)
        return seen, (weights if plan.save_models else None), entry

    def batch(state):
        if plan.batches is None:
            return problem.loss, state.order
        data, order = plan.batches.take(state.order, state.step, problem.data)
        return _batch_loss(problem, plan.batches, data), order

    def responder(loss, loss_fn):
        def respond(gradient, memory, weights):
            with jax.numpy_dtype_promotion("standard"):
                return optimizer.update(
                    gradient, memory, weights,
                    value=loss, grad=gradient, value_fn=loss_fn,
                )  # fmt: skip

        return respond

    def advance(state, loss, gradient, order, loss_fn):
        respond = responder(loss, loss_fn)
        update, memory = respond(gradient, state.memory, state.weights)
        with jax.numpy_dtype_promotion("standard"):
            proposed = optax.apply_updates(state.weights, update)
        sums = None
        if accountant is not None:
            step = Step(state.weights, gradient, state.memory, update)
            sums = accountant.add(state.sums, step, respond)
        # Only the loss is looked at: to look at every weight in every step takes longer
        # than to update them, and a weight that is not finite soon makes the loss so.
        alive = state.alive & jnp.isfinite(loss)
        kept = _select(alive, state.weights, state.kept)
        count = state.step + alive.astype(state.step.dtype)
        return _State(proposed, kept, memory, count, alive, order, sums)

    def plain(_, state):
        loss_fn, order = batch(state)
        loss, gradient = jax.value_and_grad(loss_fn)(state.weights)
        return advance(state, loss, gradient, order, loss_fn)

    def recorded(state):
        """One step, with an observation of the weights that it starts from."""
        full = jax.value_and_grad(problem.loss)(state.weights)
        loss_fn, order = batch(state)
        stochastic = plan.batches is not None
        used = jax.value_and_grad(loss_fn)(state.weights) if stochastic else full
        split = None
        if accountant is not None and stochastic:
            respond, gradient = responder(used[0], loss_fn), used[1]
            update, _ = respond(gradient, state.memory, state.weights)
            step = Step(state.weights, gradient, state.memory, update)
            split = accountant.split(full[1], step, respond)
        return observed(state, *full), advance(state, *used, order, loss_fn), split

    def block(length, carry, _):
        state, bar = carry
        alive = state.alive
        seen, state, split = recorded(state)
        state = jax.lax.fori_loop(0, length - 1, plain, state)
        bar = meter.step(bar, state.step.astype(jnp.float32) / plan.steps)
        return (state, bar), ((seen, alive), split)

    order = None
    if plan.batches is not None:
        assert key is not None
        order = plan.batches.init(key)
    weights, sound = problem.weights, _fault(problem) == RESULTS.successful
    sums = None if accountant is None else accountant.start(weights)
    start = _State(weights, weights, memory, jnp.array(0), sound, order, sums)
    carry, history = jax.lax.scan(
        functools.partial(block, plan.record_every),
        (start, meter.init()),
        length=plan.blocks,
    )
    pieces = [history]
    if plan.rest:
        carry, last = block(plan.rest, carry, None)
        pieces.append(_alone(last))
    state, bar = carry
    meter.close(bar)
    loss, gradient = jax.value_and_grad(problem.loss)(state.weights)
    alive = state.alive & jnp.isfinite(loss) & all_finite(state.weights)
    ending = _alone((observed(state, loss, gradient), alive))
    splits = _joined([split for _, split in pieces])
    (seen, saved, entries), alive_then = _joined([*(p for p, _ in pieces), ending])
    final = _select(alive, state.weights, state.kept)
    books = None
    if accountant is not None:
        values, sums = entries
        first = jax.tree.map(lambda h: h[:1], values)
        books = accountant.ledger(first, values, sums, splits)
    return _trajectory(
        problem, plan, learning_rate, final, state.step, seen, saved, alive_then, books
    )


def _alone(tree: PyTree) -> PyTree:
    """One entry of what is recorded over time."""
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _joined(pieces: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *p: jnp.concatenate(p), *pieces)


def _select(choice: Bool[Array, ""], these: PyTree, those: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(choice, a, b), these, those)


def _batch_loss(problem: Problem, batches: Batches, data: PyTree) -> Callable:
    """The batch's risk; a sum over samples is scaled up to the whole data set."""
    assert isinstance(problem.objective, Risk)
    scale = 1 if problem.objective.is_mean else batches.samples / batches.size

    return lambda weights: scale * problem.loss_of(weights, data)


def _fault(problem: Problem) -> RESULTS:
    fault = RESULTS.where(
        all_finite(problem.data), RESULTS.successful, RESULTS.bad_data
    )
    return RESULTS.where(all_finite(problem.weights), fault, RESULTS.bad_weights)


def _time_dtype(problem: Problem) -> jnp.dtype:
    """The weights' dtype, but no less than float32: half precision cannot count."""
    half = jnp.finfo(problem.dtype).bits < 32
    return jnp.dtype(jnp.float32) if half else problem.dtype


def _times(
    plan: _Plan, learning_rate: Array | Callable, dtype: jnp.dtype
) -> tuple[Float[Array, " times"], Bool[Array, ""]]:
    """Flow time at the recorded steps, and whether every learning rate makes sense.

    Not summed step by step: in float32 that loses digits.
    """
    recorded = plan.recorded_steps()
    if not callable(learning_rate):
        good = jnp.isfinite(learning_rate) & (learning_rate > 0)
        times = learning_rate * jnp.asarray(recorded, dtype) * plan.clock.time_per_step
        return times, good
    with jax.numpy_dtype_promotion("standard"):
        rates = jax.lax.map(
            lambda count: jnp.asarray(learning_rate(count), dtype),
            jnp.arange(plan.steps),
        )
    times = jnp.concatenate([jnp.zeros(1, dtype), jnp.cumsum(rates)])
    good = jnp.all(jnp.isfinite(rates) & (rates >= 0))
    return times[recorded] * plan.clock.time_per_step, good


def _trajectory(
    problem: Problem,
    plan: _Plan,
    learning_rate: Array | Callable,
    final: PyTree,
    steps: Int[Array, ""],
    seen: Observation,
    saved: PyTree,
    alive: Bool[Array, " times"],
    ledger: Ledger | None,
) -> Trajectory:
    dtype = _time_dtype(problem)
    ts, good_rate = _times(plan, learning_rate, dtype)
    finite = jax.vmap(all_finite)(seen)
    valid = alive & finite & good_rate
    result = RESULTS.where(jnp.all(valid), RESULTS.successful, RESULTS.diverged)
    result = RESULTS.where(good_rate, result, RESULTS.bad_learning_rate)
    fault = _fault(problem)
    result = RESULTS.where(fault == RESULTS.successful, result, fault)
    diverged = result == RESULTS.diverged
    evaluations = plan.steps + (0 if plan.batches is None else len(alive) - 1) + 1
    numbers = {
        "steps": steps,
        "diverged_at_step": jnp.where(diverged, steps, -1),
        "gradient_evaluations": jnp.asarray(evaluations),
        "time_reached": jnp.max(jnp.where(valid, ts, 0)),
    }
    facts = (
        ("optimizer", plan.factory.name),
        ("clock", plan.clock.fact),
    )
    return recorded_trajectory(
        problem,
        ts,
        seen,
        valid,
        final=final,
        saved=saved if plan.save_models else None,
        result=result,
        numbers=numbers,
        facts=facts,
        ledger=ledger,
    )


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int | np.integer):
            raise ValueError(f"`{name}` must be an integer; got {count!r}.")
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1; got {count}.")


def _check_learning_rate(learning_rate: Any) -> None:
    if not is_concrete(learning_rate):
        return
    if jnp.ndim(learning_rate) != 0:
        raise ValueError("`learning_rate` must be a number or a schedule.")
    value = float(learning_rate)
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"`learning_rate` must be positive and finite; got {value}.")


def _checked_batches(
    problem: Problem, batch_size: int | None, key: PRNGKeyArray | None
) -> Batches | None:
    if batch_size is None:
        return None
    _check_counts(batch_size=batch_size)
    if not isinstance(problem.objective, Risk):
        raise ValueError(
            "`batch_size` needs a mean over samples: it cannot be used with `objective`."
        )
    if key is None:
        raise ValueError("`batch_size` draws random batches: pass a random `key`.")
    samples = jax.tree.leaves(problem.data)[0].shape[0]
    if batch_size > samples:
        raise ValueError(
            f"`batch_size` is {batch_size}, but there are {samples} samples."
        )
    return Batches(samples, batch_size)
