"""`modified_flow`: what gradient descent follows to second order in its step."""

from collections.abc import Iterable

import diffrax as dfx
from jaxtyping import ArrayLike, Float, PyTree

from .._dynamics._modified import Modified
from .._jax._progress import Progress
from .._laws import Law
from .._methods._base import AbstractMethod
from .._observe._base import Observables
from .._problem._losses import LossLike, SquaredLoss
from .._problem._problem import Objective
from .._problem._trainable import Trainable
from .._results._trajectory import Trajectory
from ._flow import flow


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
    `grad_norms` are ‖∇L‖. `observed["sharpness"].values` has λ_max(∇²L) at `ts`, shape
    `(times, 1)`, with which the expansion is checked (see `homoflow.sharpness` for its
    accuracy): each time costs about ten Hessian-vector products, which at 101 times is
    most of the run. Record at fewer `ts` to save it. `stats["gradient_evaluations"]`
    counts evaluations of the equation, each one gradient and one Hessian-vector product,
    and `stats["hessian_vector_products"]` all such products, but for those behind the
    Jacobians of an implicit solver.

    **Warns:** if η λ_max goes beyond (1 − √μ)² (1 without momentum) along the run. On a
    quadratic the expansion in η converges up to there, and beyond gradient descent
    overshoots in the sharpest direction, which no flow does; it is unstable from
    2(1 + μ). (Not under jit or vmap, where values are unknown: look at the
    recorded sharpness.)

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
    return flow(
        model,
        data,
        t1,
        dynamics=Modified(learning_rate, momentum),
        loss=loss,
        objective=objective,
        trainable=trainable,
        ts=ts,
        observe=observe,
        laws=laws,
        save_models=save_models,
        rtol=rtol,
        atol=atol,
        solver=solver,
        stepsize_controller=stepsize_controller,
        dt0=dt0,
        adjoint=adjoint,
        estimate_error=estimate_error,
        max_steps=max_steps,
        throw=throw,
        progress=progress,
    )
