"""`descend`: gradient descent on the flow's clock, by Optax."""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike, Float, PRNGKeyArray, PyTree

from .._jax._arguments import check_flag, check_key, check_number, refuse_class
from .._jax._progress import Progress, as_meter, check_progress
from .._jax._text import first_line
from .._jax._tracing import is_concrete_call
from .._laws import Law, Laws
from .._laws._as_laws import laws_to_record
from .._observe._base import Observables, as_observables
from .._observe._recorder import STANDARD
from .._problem._checks import check_count, check_laws, check_learning_rate
from .._problem._losses import LossLike, SquaredLoss
from .._problem._problem import Objective, Problem, make_problem
from .._problem._trainable import Trainable
from .._results._continuation import start_of
from .._results._failure import raise_unless_successful
from .._results._trajectory import Trajectory, with_facts
from ._batches import Batches
from ._factory import Factory, OptimizerFactory
from ._plan import Continuation, Plan, make_plan
from ._run import run_descent, trajectory_of

LearningRate = float | int | Float[ArrayLike, ""] | Callable[[Any], Any]


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
    observe: Observables | None = None,
    laws: Iterable[Law] | None = None,
    record_every: int = 1,
    save_models: bool = False,
    ledger: bool = False,
    throw: bool = True,
    progress: Progress = False,
) -> Trajectory:
    """Gradient descent w ← w − η∇L(w) from `model`'s weights, on the flow's clock.

    With the default `optax.sgd` a step of learning rate η is a step of Euler's method
    for `homoflow.flow`, and takes time η. With momentum μ it takes η/(1−μ). What it takes
    is read off the updates of the run itself, schedules and searches along a line
    included. For optimizers without a gradient-flow limit (Adam) the clock adds up
    learning rates, and `stats["time_unit"]` says so, and why.

    **Arguments:**

    - `model`, `data`, `loss`, `objective`, `trainable`, `observe`, `laws`, `throw`,
        `progress`: as for `homoflow.flow`. A `Trajectory` of `descend` goes on with the
        optimizer's state, the count of steps and the order of minibatches that it ended
        with: two halves are the whole to the bit.
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
        into mean gradient and noise. Costs a sum over the weights for each part in each
        step; for matrix laws as many matrix products, each about n/3m of a gradient's
        cost for layers of width n and batches of m.

    **Returns:** a `homoflow.Trajectory`. `losses`, `grad_norms` and laws are of the full
    data set also with minibatches. `stats` hold `steps`, `diverged_at_step` (−1 if it did
    not), `gradient_evaluations`, `time_reached`, `law_violation`, `optimizer`, `time_unit`,
    `clock_defect`.

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
    start, t0 = start_of(model)
    problem = make_problem(
        start, data, loss=loss, objective=objective, trainable=trainable
    )
    _check_kinds(steps, record_every, save_models, ledger, throw, progress, laws, key)
    dtype = _time_dtype(problem)
    _check_learning_rate(learning_rate)
    if not callable(learning_rate):
        learning_rate = jnp.asarray(learning_rate, dtype)
    factory = Factory.create(optimizer)
    factory.check(learning_rate)
    recorded = laws_to_record(problem, laws)
    previous = _continuation_of(model)
    if ledger:
        _refuse_without_laws(recorded.whole)
    asked = as_observables(observe, STANDARD, has_steps=record_every == 1)
    plan = make_plan(
        problem,
        recorded,
        asked,
        (steps, record_every),
        batches=_checked_batches(problem, batch_size, key, previous),
        save_models=save_models,
        factory=factory,
        ledger=ledger,
    )
    num_recorded = plan.room
    known = problem, learning_rate, key, previous, t0
    if not callable(learning_rate) and is_concrete_call(known):
        plan = plan.for_all_sizes(problem)
    if previous is not None:
        _check_continuation(plan, problem, learning_rate, previous)
    t0, meter = jnp.asarray(t0, dtype), as_meter(progress)
    outcome = run_descent(problem, plan, learning_rate, key, t0, previous, meter)
    trajectory, time_unit = trajectory_of(problem, plan, outcome, num_recorded)
    facts = (("optimizer", factory.name), ("time_unit", time_unit.fact))
    trajectory = with_facts(trajectory, facts)
    return raise_unless_successful(trajectory) if throw else trajectory


def _check_kinds(
    steps: Any,
    record_every: Any,
    save_models: Any,
    ledger: Any,
    throw: Any,
    progress: Any,
    laws: Any,
    key: Any,
) -> None:
    """`TypeError` or `ValueError` for arguments of the wrong kind."""
    check_count("steps", steps)
    check_count("record_every", record_every)
    flags = {"save_models": save_models, "ledger": ledger, "throw": throw}
    for name, flag in flags.items():
        check_flag(name, flag)
    check_progress(progress)
    check_laws(laws)
    if key is not None:
        check_key(key)


def _continuation_of(model: PyTree) -> Continuation | None:
    """What the run that goes on hands on; `None` for a start, or the end of a flow."""
    if not isinstance(model, Trajectory):
        return None
    is_descent = model.stats["optimizer"] is not None
    if is_descent and model.continuation is None:
        raise ValueError(
            "The optimizer's state of this descent is not there (a file does not hold "
            "it): pass its `.model` to start the optimizer anew."
        )
    return model.continuation


def _time_dtype(problem: Problem) -> jnp.dtype:
    """The weights' dtype, but no less than float32: half precision cannot count."""
    is_half = jnp.finfo(problem.dtype).bits < 32
    return jnp.dtype(jnp.float32) if is_half else problem.dtype


def _check_learning_rate(learning_rate: Any) -> None:
    if callable(learning_rate):
        _check_schedule(learning_rate)
        return
    if jnp.ndim(learning_rate) != 0:
        raise ValueError("`learning_rate` must be a number or a schedule.")
    check_learning_rate(learning_rate)


def _check_schedule(schedule: Callable[[Any], Any]) -> None:
    """An error unless it is a function from the count of steps to one number."""

    def rate(count):
        with jax.numpy_dtype_promotion("standard"):
            return jnp.asarray(schedule(count))

    refuse_class("learning_rate", schedule)
    try:
        value = eqx.filter_eval_shape(rate, jnp.zeros((), int))
    except Exception as error:  # whatever a user's function raises
        raise TypeError(
            "`learning_rate` is called with the count of steps, as a schedule of Optax "
            f"is, and must return one number: {first_line(error)}."
        ) from error
    check_number("learning_rate(count)", value)


def _refuse_without_laws(recorded: Laws) -> None:
    if not len(recorded):
        reason = recorded.note or "`laws` is empty."
        raise ValueError(
            "`ledger=True` accounts for the changes of laws, and there is no law to "
            f"record. {reason} Pass `laws`, such as `homoflow.laws(model, x_example)`, or "
            "leave `ledger` out."
        )


def _checked_batches(
    problem: Problem,
    batch_size: int | None,
    key: PRNGKeyArray | None,
    previous: Continuation | None,
) -> Batches | None:
    if batch_size is None:
        return None
    check_count("batch_size", batch_size)
    samples = problem.num_samples
    if samples is None:
        raise ValueError(
            "`batch_size` needs a mean over samples: it cannot be used with `objective`."
        )
    if key is None and (previous is None or previous.order is None):
        raise ValueError("`batch_size` draws random batches: pass a random `key`.")
    if batch_size > samples:
        raise ValueError(
            f"`batch_size` is {batch_size}, but there are {samples} samples."
        )
    return Batches(samples, batch_size)


def _check_continuation(
    plan: Plan, problem: Problem, learning_rate: Any, previous: Continuation
) -> None:
    """`ValueError` where a run cannot go on as it was going."""

    def init(weights):
        with jax.numpy_dtype_promotion("standard"):
            return plan.factory(learning_rate).init(weights)

    wanted, given = (
        [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
        for state in (
            eqx.filter_eval_shape(init, problem.weights),
            eqx.filter(previous.optimizer_state, eqx.is_array),
        )
    )
    if given != wanted:
        raise ValueError(
            f"The run to continue had another optimizer than {plan.factory.name}: its "
            "state is of another form. Pass its `.model` to start this optimizer anew."
        )
    order, batches = previous.order, plan.batches
    if order is None or batches is None:
        if order is not None:
            raise ValueError(
                "The run to continue had minibatches: pass its `batch_size` again, or "
                "its `.model` to start anew."
            )
        return
    if order.permutation.shape[0] != batches.samples:
        raise ValueError(
            f"The run to continue had {order.permutation.shape[0]} samples, and there are "
            f"{batches.samples} now: pass its `.model` to start anew."
        )
