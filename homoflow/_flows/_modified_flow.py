"""`modified_flow`: what gradient descent follows to second order in its step."""

import dataclasses
from collections.abc import Iterable
from typing import final

import diffrax as dfx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from .._dynamics._base import AbstractDynamics, State
from .._jax._progress import Progress
from .._laws import Law
from .._methods._diffrax import diffrax_flow
from .._methods._diffrax_options import choose_method, kinks_of
from .._observe._sharpness import Sharpness, sharpness_of
from .._observe._time_grid import checked_span
from .._problem._checks import check_learning_rate, check_max_steps, check_momentum
from .._problem._losses import LossLike, SquaredLoss
from .._problem._problem import Objective, Problem, pose
from .._problem._trainable import Trainable
from .._results._failure import raise_unless_successful
from .._results._status import RESULTS
from .._results._trajectory import Trajectory
from ._expansion_checks import warn_unless_trajectory_expands


def modified_flow(
    model: PyTree,
    data: PyTree,
    t1: float | int | Float[ArrayLike, ""],
    *,
    learning_rate: float | int | Float[ArrayLike, ""],
    momentum: float | int | Float[ArrayLike, ""] = 0.0,
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
    estimate_error: bool = False,
    max_steps: int = 100_000,
    throw: bool = True,
    progress: Progress = False,
) -> Trajectory:
    """The flow that gradient descent with learning rate η follows to second order.

        dw/dt = −∇L(w) − (η/2) ∇²L(w) ∇L(w),

    which is the gradient flow of L + (η/4)‖∇L‖² [Barrett & Dherin 2021; the
    first term of backward error analysis, Hairer, Lubich & Wanner 2006, ch. IX]. After a
    fixed time its weights differ from those of `homoflow.descend` by O(η²), those of
    `homoflow.flow` by O(η). Along it a law D = wᵀAw + bᵀw moves as dD/dt = η q(∇L),
    q(v) = vᵀAv, where gradient descent has D⁺ − D = η² q(∇L).

    With momentum μ (heavy ball: v ← μv + ∇L, w ← w − ηv, as `optax.sgd`), on the clock
    where a step takes h = η/(1−μ), η above becomes h(1+μ)/(1−μ) [Ghosh et al. 2023;
    Kovachki & Stuart 2021]. The velocity starts at zero, which leaves the weights
    behind: the flow starts at w₀ + hμ/(1−μ)·∇L(w₀), and follows heavy ball to O(η²)
    once the start is forgotten, after some 1/(1−μ) steps.

    **Arguments:**

    - `learning_rate`: η, a positive number.
    - `momentum`: μ of heavy ball, in [0, 1).
    - all others: as for `homoflow.flow`.

    **Returns:** a `homoflow.Trajectory`. `losses` are L, not the modified loss, and
    `grad_norms` are ‖∇L‖. `observed["sharpness"]` is λ_max(∇²L) at `ts`, with which the
    expansion is checked (see `homoflow.sharpness` for its accuracy): each time costs tens
    of Hessian-vector products, which at 101 times is most of the run. Record at fewer
    `ts` to save it. `stats["gradient_evaluations"]` counts evaluations of the equation,
    each one gradient and one Hessian-vector product, and
    `stats["hessian_vector_products"]` all such products, but for those behind the
    Jacobians of an implicit solver.

    **Warns:** if η λ_max goes beyond (1 − √μ)² (1 without momentum) along the run. On a
    quadratic the expansion in η converges up to there, and beyond gradient descent
    overshoots in the sharpest direction, which no flow does; it is unstable from
    2(1 + μ). (Not under jit or vmap, where values are unknown: look at
    `observed["sharpness"]`.)

    **Raises:** `ValueError` for bad input, and for models whose gradient jumps (ReLU,
    |·|, max): there an expansion in η does not hold, because each crossing of a kink
    adds an error of order η that depends on where in a step it falls. If kinks are
    seen where there are none, pass a `solver` to go on. `homoflow.TrajectoryError` if
    the run does not finish.

    ```python
    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    data = (x, x[:, :1])
    gd = hf.descend(model, data, steps=100, learning_rate=0.05)
    modified = hf.modified_flow(model, data, t1=5.0, learning_rate=0.05)
    print(hf.compare(modified, gd, x))
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
    check_learning_rate(learning_rate)
    check_momentum(momentum)
    if solver is None:
        _refuse_kinks(problem)
    method = choose_method(
        problem,
        rtol=rtol,
        atol=atol,
        solver=solver,
        controller=stepsize_controller,
        dt0=dt0,
        max_steps=max_steps,
    )
    dynamics = ModifiedFlow(
        jnp.asarray(learning_rate, problem.dtype), jnp.asarray(momentum, problem.dtype)
    )
    trajectory, curvature, _ = diffrax_flow(
        problem,
        span,
        method,
        dynamics=dynamics,
        max_steps=max_steps,
        save_models=save_models,
        adjoint=adjoint,
        estimate_error=estimate_error,
        progress=progress,
    )
    trajectory = _with_sharpness(trajectory, curvature)
    warn_unless_trajectory_expands(trajectory, learning_rate, momentum)
    return raise_unless_successful(trajectory) if throw else trajectory


@final
class ModifiedFlow(AbstractDynamics):
    """dw/dt = −∇L − (η̃/2) ∇²L ∇L, with η̃ = η(1+μ)/(1−μ)² for heavy ball."""

    learning_rate: Float[Array, ""]
    momentum: Float[Array, ""]

    @property
    def name(self) -> str:
        return "modified flow"

    def start(self, problem: Problem, weights: PyTree) -> State:
        """The start of the slow motion that heavy ball settles to.

        From rest, v_k = ∇L (1−μᵏ)/(1−μ) to leading order: Σ_k η(v_∞ − v_k) is missing.
        """
        mu = self.momentum
        behind = self.learning_rate * mu / (1 - mu) ** 2
        gradient = jax.grad(problem.loss)(weights)
        return jax.tree.map(lambda w, g: w + behind * g, weights, gradient)

    def weights(self, state: State) -> PyTree:
        return state

    def velocity(self, problem: Problem, state: State) -> State:
        mu = self.momentum
        half = self.learning_rate * (1 + mu) / (1 - mu) ** 2 / 2
        gradient, product = jax.linearize(jax.grad(problem.loss), state)
        return jax.tree.map(lambda g, hg: -g - half * hg, gradient, product(gradient))

    def watch(self, problem: Problem, state: State) -> Sharpness:
        return sharpness_of(problem, state)

    def fault(self) -> RESULTS:
        eta, mu = self.learning_rate, self.momentum
        good = (mu >= 0) & (mu < 1)
        fault = RESULTS.where(good, RESULTS.successful, RESULTS.bad_coefficient)
        good = jnp.isfinite(eta) & (eta > 0)
        return RESULTS.where(good, fault, RESULTS.bad_learning_rate)


def _refuse_kinks(problem: Problem) -> None:
    kinks = kinks_of(problem)
    if kinks:
        raise ValueError(
            f"The gradient jumps at {', '.join(kinks)}: there is no expansion in the "
            "learning rate there, since each crossing of a kink adds an error of first "
            "order that depends on where in a step it falls. Take a smooth model, "
            "`homoflow.flow`, or `homoflow.predict_drift` for an approximate account of "
            "the laws. If there are no kinks all the same, pass a `solver`, such as "
            "`diffrax.Dopri8()`."
        )


def _with_sharpness(trajectory: Trajectory, curvature: Sharpness) -> Trajectory:
    products = jnp.nansum(curvature.products)
    evaluations = trajectory.stats["gradient_evaluations"]
    if evaluations is not None:
        products = products + evaluations
    stats = trajectory.stats.with_numbers(hessian_vector_products=products)
    observed = {"sharpness": curvature.value}
    return dataclasses.replace(trajectory, observed=observed, stats=stats)
