"""`heavy_ball_flow`: gradient descent with momentum, as a ball with mass and friction."""

from collections.abc import Iterable

import diffrax as dfx
from jaxtyping import ArrayLike, Float, PyTree

from .._dynamics._heavy_ball import HeavyBall
from .._jax._progress import Progress
from .._laws import Law
from .._methods._base import AbstractMethod
from .._observe._base import Observables
from .._problem._losses import LossLike, SquaredLoss
from .._problem._problem import Objective
from .._problem._trainable import Trainable
from .._results._trajectory import Trajectory
from ._flow import flow

Number = float | int | Float[ArrayLike, ""]


def heavy_ball_flow(
    model: PyTree,
    data: PyTree,
    t1: float | int | Float[ArrayLike, ""],
    *,
    mass: Number | None = None,
    velocity: PyTree | None = None,
    learning_rate: Number | None = None,
    momentum: Number | None = None,
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
    """The flow of a heavy ball: m·d²w/dt² + dw/dt = −∇L(w) [Polyak 1964].

    Friction is 1, so that time is the flow's: as the mass m → 0 it becomes the gradient
    flow. Gradient descent with momentum μ (v ← μv + ∇L, w ← w − ηv) is its discretization
    by central differences with steps of time h = η/(1−μ), for a mass of
    m = h(1+μ)/(2(1−μ)). From rest, v = 0, it starts as this flow does with
    dw/dt(0) = −(1−μ)/(1+μ)·∇L. With these two it differs from the flow by O(h²), at a
    fixed mass and at a fixed momentum.

    What is conserved: the balance laws of gradient flow are not. A law D = wᵀAw has
    m·D̈ + Ḋ = 2m·q(ẇ) with q(v) = vᵀAv. But where units only meet linear maps they can be
    rotated, and each rotation has a charge that only friction takes away: the skew matrix

        R = W₁Ẇ₁ᵀ − Ẇ₁W₁ᵀ + W₂ᵀẆ₂ − Ẇ₂ᵀW₂,   e^{t/m}·R = constant

    [Noether's theorem; Marcotte, Gribonval & Peyré 2024]. ReLU units have none. R is 0
    for ever if the ball starts from rest or along the gradient; give a `velocity` to
    see it.

    **Arguments:**

    - `mass`: m, a positive time. The cost grows as t1/m when it is small.
    - `velocity`: dw/dt at t = 0, a pytree like `model` with a velocity in place of every
        trained array (others are ignored). Default: at rest.
    - `learning_rate`, `momentum`: instead of `mass` and `velocity`, those of the descent
        to follow; η > 0 and 0 ≤ μ < 1.
    - all others: as for `homoflow.flow`. At kinks (ReLU) the default method averages, as
        there.

    **Returns:** a `homoflow.Trajectory`. Its `laws` are those of gradient flow, and next
    to each matrix law, such as `matrix[1]`, the charge `rotations[1]`, shape
    `(times, n, n)`: R as it is, which decays as e^{−t/m}. `stats["law_violation"]` also
    certifies the symmetry of L behind R. `stats["mass"]` is m.

    **Raises:** `ValueError` for bad input; `homoflow.TrajectoryError`, which holds what
    was computed, if the run does not finish.

    ```python
    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    push = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(2))
    ball = hf.heavy_ball_flow(model, (x, x[:, :1]), t1=2.0, mass=0.5, velocity=push)
    growth = jnp.exp(ball.ts / 0.5)[:, None, None]
    constant = growth * ball.laws["rotations[1]"]
    ```
    """
    return flow(
        model,
        data,
        t1,
        dynamics=HeavyBall(mass, velocity, learning_rate, momentum),
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
