"""`central_flow`: what gradient descent follows at the edge of stability."""

from collections.abc import Iterable

from jaxtyping import ArrayLike, Float, PyTree

from .._dynamics._central import Central
from .._laws import Law
from .._methods.edge._along_edge import AlongEdge
from .._observe._base import Observables
from .._problem._losses import LossLike, SquaredLoss
from .._problem._problem import Objective
from .._problem._trainable import Trainable
from .._results._trajectory import Trajectory
from ._flow import flow


def central_flow(
    model: PyTree,
    data: PyTree,
    t1: float | int | Float[ArrayLike, ""],
    *,
    learning_rate: float | int | Float[ArrayLike, ""],
    momentum: float | int | Float[ArrayLike, ""] = 0.0,
    order: int = 1,
    max_critical: int = 4,
    loss: LossLike = SquaredLoss(),  # noqa: B008
    objective: Objective | None = None,
    trainable: Trainable = None,
    ts: Float[ArrayLike, " times"] | Iterable[float] | None = None,
    rtol: float | Float[ArrayLike, ""] | None = None,
    observe: Observables | None = None,
    laws: Iterable[Law] | None = None,
    save_models: bool = False,
    estimate_error: bool | None = None,
    max_steps: int = 100_000,
    throw: bool = True,
) -> Trajectory:
    """The flow around which gradient descent oscillates at the edge of stability.

    At learning rates η of practice the sharpness S = λ_max(∇²L) rises to 2/η and stays
    there, while descent oscillates in the sharpest directions [Cohen et al. 2021]. With
    w the mean over the oscillation and Σ its covariance,

        dw/dτ = −∇L − ½∇_w⟨∇²L, Σ⟩,   Σ ⪰ 0,   2/η − ∇²L ⪰ 0,   ⟨Σ, 2/η − ∇²L⟩ = 0,

    the central flow [Cohen, Damian et al. 2025], which is the gradient flow projected onto
    {S ≤ 2/η}. Below the edge it is the gradient flow. With momentum μ the threshold is
    2(1 + μ)/η, on the clock where a step takes η/(1 − μ).

    What gradient flow conserves, it does not: a law D = wᵀAw moves as

        dD/dτ = 2·(threshold)·tr(AΣ),

    and the mean of D over the oscillation is D(w) + tr(AΣ) + η̃∫q(dw/dτ)dτ, with
    q(v) = vᵀAv and η̃ = η(1 + μ)/(1 − μ)²: the drift of descent's laws through the edge.

    **Arguments:**

    - `learning_rate`, `momentum`: η and μ of the descent.
    - `order`: to which order in the learning rate descent is followed, 1 or 2. Below the
        edge the second order is `homoflow.modified_flow`, and this continues it:
        dw/dτ + (η̃/2)d²w/dτ² is what stands above. It starts where `modified_flow` does,
        costs about twice as much, and helps where the start is violent.
    - `max_critical`: how many eigenvalues may be at the threshold at one time.
    - `rtol`: of a step's error, relative to ‖w‖; 1e-5 by default.
    - `estimate_error`: solve again, coarser; by default it is done.
    - all others: as for `homoflow.flow`.

    **Returns:** a `homoflow.Trajectory` of the mean weights, `losses` and `laws` those at
    w. `observed` has, at `ts`:

    - `mean`: `losses`, `grad_norms` and `laws` in the mean over the oscillation.
    - `critical`: how many eigenvalues are at the threshold; `spectrum`: these and the next
        one, shape `(times, max_critical + 1)`, NaN beyond.
    - `oscillation`: the eigenvalues of Σ, shape `(times, max_critical)`.
    - `edge_drift`: ∫2·(threshold)·tr(AΣ)dτ, which to first order is the drift of `laws`
        (to second order they have what the steps add, too); `mean_square`: ∫q(dw/dτ)dτ
        of each law.
    - `cycles`: of the oscillation so far.
    - `shift`: by about which part of the threshold, within a factor of two, descent's
        sharpness is expected to stay below it, because the curvature between w + σu and
        w − σu, with u a direction of the oscillation and σ² the variance there, is not
        that at w.

    **Warns:** where descent is not expected to follow: fewer than 20 cycles of the
    oscillation (`stats["edge_cycles"]`), an onset that overshoots the threshold by more
    than 15 % (`stats["edge_overshoot"]`; with momentum (1 + μ)/(1 − μ) times that), an
    oscillation so wide that it moves the edge by more than 0.5 % (`stats["edge_shift"]`),
    which is usual with cross-entropy, or a start so steep that steps fall behind the flow
    by more than 1 % of the way (`stats["edge_lag"]`). (Not under jit or vmap.)

    **Raises:** `ValueError` for bad input and for models with kinks (ReLU);
    `homoflow.TrajectoryError`, which holds what was computed, if the start is beyond the
    edge, or no direction leads back from it, as in linear regression.

    ```python
    model = hf.MLP((3, 8, 1), activation=jnp.tanh, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    run = hf.central_flow(model, (x, x[:, :1]), 5.0, learning_rate=0.5)
    run.observed["spectrum"][:, 0]  # at most 2/0.5
    ```
    """
    return flow(
        model,
        data,
        t1,
        dynamics=Central(learning_rate, momentum, max_critical, order),
        solver=AlongEdge(),
        loss=loss,
        objective=objective,
        trainable=trainable,
        ts=ts,
        observe=observe,
        laws=laws,
        save_models=save_models,
        rtol=rtol,
        estimate_error=estimate_error,
        max_steps=max_steps,
        throw=throw,
    )
