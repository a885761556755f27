"""`predict_drift`: one flow, and with it the drift of laws for every learning rate."""

from collections.abc import Iterable
from typing import Any

import diffrax as dfx
import jax.numpy as jnp
from jaxtyping import ArrayLike, Float, PyTree

from .._dynamics._drift_integrals import FlowWithDrift
from .._jax._arguments import check_flag
from .._jax._progress import Progress
from .._laws import Law
from .._laws._as_laws import laws_to_record
from .._methods._base import AbstractMethod
from .._observe._base import Observables
from .._problem._checks import check_laws
from .._problem._losses import LossLike, SquaredLoss
from .._problem._problem import Objective, Problem, make_problem
from .._problem._trainable import Trainable
from ._central_flow import central_flow
from ._drift_prediction import DriftPrediction, EdgeDrift
from ._flow import flow
from ._split_discretization import DiscretizationSplit


def predict_drift(
    model: PyTree,
    data: PyTree,
    t1: float | int | Float[ArrayLike, ""],
    *,
    noise: bool = False,
    edge: bool = False,
    learning_rate: float | int | Float[ArrayLike, ""] | None = None,
    momentum: float | int | Float[ArrayLike, ""] | None = None,
    loss: LossLike = SquaredLoss(),  # noqa: B008
    objective: Objective | None = None,
    trainable: Trainable = None,
    ts: Float[ArrayLike, " times"] | Iterable[float] | None = None,
    rtol: float | Float[ArrayLike, ""] | None = None,
    atol: float | Float[ArrayLike, ""] | None = None,
    solver: dfx.AbstractSolver | AbstractMethod | None = None,
    stepsize_controller: dfx.AbstractStepSizeController | None = None,
    dt0: float | Float[ArrayLike, ""] | None = None,
    observe: Observables | None = None,
    laws: Iterable[Law] | None = None,
    save_models: bool = False,
    adjoint: dfx.AbstractAdjoint | None = None,
    estimate_error: bool | None = None,
    max_steps: int = 100_000,
    throw: bool = True,
    progress: Progress = False,
) -> DriftPrediction:
    """How every law will drift under gradient descent, from one gradient flow.

    What gradient flow conserves, gradient descent changes by exactly η² q(∇L) in a step.
    To leading order in η that is η ∫ q(∇L) dt along the *flow*, whatever η is: the
    integrals are solved for together with the flow, as further unknowns of the same
    equation at the same tolerance, and `homoflow.DriftPrediction.drift` makes the
    prediction for a learning rate, with momentum and with minibatches.

    For a model with kinks (ReLU) this is *approximate*: the flow is averaged over
    kinks, as by `homoflow.Averaged`, and so is q(∇L). Where it slides along a kink,
    descent jumps from side to side; then q of each side counts, as often as it is
    visited, and not q of the mean velocity. The solver visits both in the right
    proportion for one kink at a time, but not for several that slide together.

    Leading order fails where the sharpness comes near 2/η, the edge of stability; which
    learning rates meet it is known only to `homoflow.DriftPrediction.drift`, which warns.
    With `edge=True` the prediction is for one learning rate and goes through it: the mean of
    each law over the oscillation, along the `homoflow.central_flow` [docs, *At the edge of
    stability*]. Below the edge both agree to leading order.

    **Arguments:**

    - `noise`: also integrate tr(A S), S the covariance over samples of one sample's
        gradient, for the drift with minibatches. Needs a loss over samples, and a
        gradient for each of them.
    - `edge`: predict the drift through the edge of stability, for smooth models, by the
        method of `homoflow.central_flow`, whose options alone are possible then.
    - `learning_rate`, `momentum`: η and μ (0 by default) with `edge=True`. Without it a
        prediction is for all of them, and `homoflow.DriftPrediction.drift` takes them.
    - all others: as for `homoflow.flow`.

    **Returns:** a `homoflow.DriftPrediction`. With `edge=True` its `flow` is the central
    flow, and `edge.parts` has what the mean of the steps and what their oscillation does
    to each law. Otherwise its
    `flow.observed["sharpness"].values` has λ_max(∇²L) at the recorded times, each at the
    cost of about ten Hessian-vector products (see `homoflow.sharpness`), which at 101
    times is most of the run. At kinks there is no
    Hessian, and it is that beside them.
    Where the flow is solved a second time for an error estimate (with kinks, always),
    `flow.stats["drift_error_estimate"]` is twice the largest difference of the
    integrals, relative to the largest of each law.

    **Warns:** with `edge=True`, as `homoflow.central_flow`, where descent is not expected
    to follow it.

    **Raises:** `ValueError` for bad input; `homoflow.TrajectoryError`, which holds what
    was computed of the flow, if the run does not finish.

    ```python
    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    data = (x, x[:, :1])
    prediction = hf.predict_drift(model, data, t1=5.0)
    predicted = prediction.drift(learning_rate=0.01)["neurons[1]"][-1]
    gd = hf.descend(model, data, steps=500, learning_rate=0.01)
    observed = gd.laws["neurons[1]"][-1] - gd.laws["neurons[1]"][0]

    # Through the edge of stability:
    smooth = hf.MLP((3, 8, 8, 1), activation=(jnp.tanh, "linear"), key=jax.random.key(0))
    through = hf.predict_drift(smooth, data, t1=5.0, edge=True, learning_rate=0.1)
    through.drift()["layers[2]"][-1]
    ```
    """
    problem = make_problem(
        model, data, loss=loss, objective=objective, trainable=trainable
    )
    check_flag("edge", edge)
    _check_noise(noise, problem)
    check_laws(laws)
    shared: dict[str, Any] = {"loss": loss, "objective": objective, "ts": ts}
    shared |= {"trainable": trainable, "rtol": rtol, "observe": observe, "laws": laws}
    shared |= {"save_models": save_models, "estimate_error": estimate_error}
    shared |= {"max_steps": max_steps, "throw": throw}
    others: dict[str, Any] = {
        "atol": atol,
        "solver": solver,
        "stepsize_controller": stepsize_controller,
        "dt0": dt0,
        "adjoint": adjoint,
    }
    if edge:
        _refuse_without_meaning(others | {"noise": noise, "progress": progress})
        return _through_edge(model, data, t1, learning_rate, momentum, shared)
    _refuse_of_edge(learning_rate, momentum)
    run = flow(
        model,
        data,
        t1,
        dynamics=FlowWithDrift(laws_to_record(problem, laws).whole, noise),
        progress=progress,
        **shared,
        **others,
    )
    drift = run.observed["drift"]
    return DriftPrediction(run, drift.mean, drift.noise, problem.num_samples)


def _through_edge(
    model: PyTree,
    data: PyTree,
    t1: Any,
    learning_rate: Any,
    momentum: Any,
    options: dict[str, Any],
) -> DriftPrediction:
    """The prediction along the central flow."""
    if learning_rate is None:
        raise ValueError(
            "`edge=True` is a prediction for one learning rate: give `learning_rate`."
        )
    momentum = 0.0 if momentum is None else momentum
    run = central_flow(
        model, data, t1, learning_rate=learning_rate, momentum=momentum, **options
    )
    dtype = run.losses.dtype
    eta, mu = jnp.asarray(learning_rate, dtype), jnp.asarray(momentum, dtype)
    factor = eta * (1 + mu) / (1 - mu) ** 2
    integrals = run.observed["mean_square"]
    at_edge, mean = run.observed["edge_drift"], run.observed["mean"].laws
    parts = {}
    for name, values in run.laws.items():
        by_mean = factor * integrals[name]
        # The integral and not the drift of `values`, which has the solver's error even
        # below the edge, where laws hold.
        trace = mean[name] - values - by_mean
        parts[name] = DiscretizationSplit(by_mean, at_edge[name] + trace)
    return DriftPrediction(run, integrals, None, None, EdgeDrift(eta, mu, parts))


def _check_noise(noise: bool, problem: Problem) -> None:
    """`ValueError` where there are no minibatches whose noise could be integrated."""
    check_flag("noise", noise)
    if noise and problem.num_samples is None:
        raise ValueError(
            "`noise` is that of minibatches, which need a `loss` over samples: it cannot "
            "be had with `objective`."
        )


def _refuse_of_edge(learning_rate: Any, momentum: Any) -> None:
    """`ValueError` for what a prediction for all learning rates is not of."""
    if learning_rate is not None or momentum is not None:
        raise ValueError(
            "Without `edge=True` a prediction is for all learning rates: give "
            "`learning_rate` and `momentum` to its `drift`."
        )


def _refuse_without_meaning(options: dict[str, Any]) -> None:
    """`ValueError` for options that the central flow does not have."""
    # Not by equality: 0 is equal to False, and is a value.
    given = [n for n, value in options.items() if value is not None and value is not False]
    if given:
        raise ValueError(
            f"With `edge=True` there is no `{given[0]}`: the prediction is by the method "
            "of `homoflow.central_flow`, with full batches."
        )
