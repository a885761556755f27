"""`predict_drift`: one flow, and with it the drift of laws for every learning rate."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple, final

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from .._dynamics._base import AbstractDynamics
from .._jax._arrays import tree_norm
from .._jax._progress import Progress
from .._laws import Law, Laws
from .._methods._diffrax import diffrax_flow
from .._methods._diffrax_options import choose_method
from .._methods._error_estimate import SAFETY
from .._observe._sharpness import Sharpness, sharpness_of
from .._observe._time_grid import checked_span
from .._problem._checks import check_max_steps
from .._problem._losses import LossLike, Risk, SquaredLoss
from .._problem._problem import Objective, Problem, pose
from .._problem._trainable import Trainable
from .._results._failure import raise_unless_successful
from .._results._status import RESULTS
from ._drift_prediction import DriftPrediction

#: Samples whose gradients are in memory at one time.
_CHUNK = 64


def predict_drift(
    model: PyTree,
    data: PyTree,
    t1: float | int | Float[ArrayLike, ""],
    *,
    noise: bool = False,
    loss: LossLike = SquaredLoss(),  # noqa: B008
    objective: Objective | None = None,
    trainable: Trainable = None,
    ts: Float[ArrayLike, " times"] | Iterable[float] | None = None,
    rtol: float | Float[ArrayLike, ""] | None = None,
    atol: float | Float[ArrayLike, ""] | None = None,
    solver: dfx.AbstractSolver | None = None,
    stepsize_controller: dfx.AbstractStepSizeController | None = None,
    dt0: float | Float[ArrayLike, ""] | None = None,
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

    **Arguments:**

    - `noise`: also integrate tr(A S), S the covariance over samples of one sample's
        gradient, for the drift with minibatches. Needs a loss over samples, and a
        gradient for each of them.
    - all others: as for `homoflow.flow`.

    **Returns:** a `homoflow.DriftPrediction`. Its `flow.observed["sharpness"]` is
    λ_max(∇²L) at the recorded times, each at the cost of tens of Hessian-vector products
    (see `homoflow.sharpness`), which at 101 times is most of the run. At kinks there is
    no Hessian, and it is that beside them. Where the flow is solved a second time for an
    error estimate (with kinks, always), `flow.stats["drift_error_estimate"]` is twice the
    largest difference of the integrals, relative to the largest of each law.

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
    span = checked_span(t1, ts, problem.dtype)
    check_max_steps(max_steps)
    if noise and not isinstance(problem.objective, Risk):
        raise ValueError(
            "`noise` is that of minibatches, which need a `loss` over samples: it cannot "
            "be had with `objective`."
        )
    method = choose_method(
        problem,
        rtol=rtol,
        atol=atol,
        solver=solver,
        controller=stepsize_controller,
        dt0=dt0,
        max_steps=max_steps,
    )
    flow, watched, coarse = diffrax_flow(
        problem,
        span,
        method,
        dynamics=FlowWithDrift(noise),
        max_steps=max_steps,
        save_models=save_models,
        adjoint=adjoint,
        estimate_error=estimate_error,
        progress=progress,
    )
    stats = flow.stats
    if coarse is not None:
        estimate = _relative_difference(watched, coarse)
        stats = stats.with_numbers(drift_error_estimate=estimate)
    observed = {"sharpness": watched.sharpness.value}
    flow = dataclasses.replace(flow, stats=stats, observed=observed)
    if throw:
        flow = raise_unless_successful(flow)
    return DriftPrediction(flow, watched.mean, watched.noise, _sample_count(problem))


class _State(NamedTuple):
    """Weights and integrals, which are kept in units that make them as large as weights."""

    weights: PyTree
    mean: dict[str, Array]
    noise: dict[str, Array] | None
    unit: Float[Array, ""]


class _Watched(NamedTuple):
    mean: dict[str, Array]
    noise: dict[str, Array] | None
    sharpness: Sharpness


@final
class FlowWithDrift(AbstractDynamics):
    """dw/dt = −∇L(w), with ∫q(∇L) and, with `noise`, ∫tr(A S) of every law."""

    noise: bool = eqx.field(static=True)

    @property
    def name(self) -> str:
        return ""

    def start(self, problem: Problem, weights: PyTree) -> _State:
        speed = tree_norm(jax.grad(problem.loss)(weights))
        size = sum(w.size for w in jax.tree.leaves(weights))
        # ∫|∇L|² is about |∇L||w| where weights move as far as they are long.
        unit = jax.lax.stop_gradient(speed * jnp.sqrt(jnp.asarray(size, speed.dtype)))
        zeros = jax.tree.map(jnp.zeros_like, problem.laws.values(weights))
        return _State(
            weights,
            zeros,
            zeros if self.noise else None,
            jnp.where(unit > 0, unit, 1),
        )

    def weights(self, state: _State) -> PyTree:
        return state.weights

    def velocity(self, problem: Problem, state: _State) -> _State:
        def rates(square):
            # One zero stands for all components of a law that is linear.
            return jax.tree.map(
                lambda q, i: jnp.broadcast_to(q / state.unit, i.shape),
                square,
                state.mean,
            )

        gradient = jax.grad(problem.loss)(state.weights)
        square = _quadratic(problem.laws, gradient)
        noise = None
        if self.noise:
            each = _mean_square(problem, state.weights)
            noise = rates(jax.tree.map(jnp.subtract, each, square))
        velocity = jax.tree.map(jnp.negative, gradient)
        return _State(velocity, rates(square), noise, jnp.zeros_like(state.unit))

    def watch(self, problem: Problem, state: _State) -> _Watched:
        mean, noise = jax.tree.map(lambda i: i * state.unit, (state.mean, state.noise))
        return _Watched(mean, noise, sharpness_of(problem, state.weights))

    def fault(self) -> RESULTS:
        return RESULTS.successful


def _quadratic(laws: Laws, gradient: PyTree) -> dict[str, Array]:
    return {law.name: law.quadratic(gradient) for law in laws}


def _mean_square(problem: Problem, weights: PyTree) -> dict[str, Array]:
    """The mean over samples of q(∇L_i), where L is the mean of the L_i."""
    assert isinstance(problem.objective, Risk)
    risk, frozen = problem.objective, problem.frozen
    count = jax.tree.leaves(problem.data)[0].shape[0]
    scale = 1 if risk.is_mean else count

    def one(sample: tuple[Any, Array]) -> dict[str, Array]:
        x, y = sample

        def loss(weights):
            return scale * risk.loss(eqx.combine(weights, frozen)(x), y)

        return _quadratic(problem.laws, jax.grad(loss)(weights))

    each = jax.lax.map(one, problem.data, batch_size=min(count, _CHUNK))
    return jax.tree.map(lambda q: jnp.mean(q, axis=0), each)


def _relative_difference(fine: _Watched, coarse: _Watched) -> Float[Array, ""]:
    """Twice the largest difference of the integrals, each relative to its law's largest."""

    def one(a, b):
        size = jnp.max(jnp.abs(a))
        return jnp.max(jnp.abs(a - b)) / jnp.where(size > 0, size, 1)

    pairs = (fine.mean, fine.noise), (coarse.mean, coarse.noise)
    each = jax.tree.leaves(jax.tree.map(one, *pairs))
    worst = jnp.max(jnp.stack(each), initial=0) if each else jnp.zeros(())
    return SAFETY * jax.lax.stop_gradient(worst)


def _sample_count(problem: Problem) -> int | None:
    if not isinstance(problem.objective, Risk):
        return None
    return jax.tree.leaves(problem.data)[0].shape[0]
