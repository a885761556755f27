"""`flow`: the gradient flow of a model, or other dynamics of its weights."""

import dataclasses
from collections.abc import Iterable

import diffrax as dfx
from jaxtyping import ArrayLike, Float, PyTree

from .._dynamics._base import AbstractDynamics
from .._jax._arguments import check_flag
from .._jax._progress import Progress
from .._laws import Law
from .._methods._base import AbstractMethod
from .._methods._choose import Auto, as_method
from .._observe._base import Observables
from .._problem._losses import LossLike, SquaredLoss
from .._problem._problem import Objective, make_problem
from .._problem._trainable import Trainable
from .._results._continuation import start_of
from .._results._failure import raise_unless_successful
from .._results._trajectory import Trajectory
from ._late_times import late_times
from ._pipeline import choose_dynamics, make_task, run


def flow(
    model: PyTree,
    data: PyTree,
    t1: float | int | Float[ArrayLike, ""],
    *,
    loss: LossLike = SquaredLoss(),  # noqa: B008
    objective: Objective | None = None,
    trainable: Trainable = None,
    dynamics: AbstractDynamics | None = None,
    ts: Float[ArrayLike, " times"] | Iterable[float] | None = None,
    observe: Observables | None = None,
    laws: Iterable[Law] | None = None,
    save_models: bool = False,
    rtol: float | Float[ArrayLike, ""] | None = None,
    atol: float | Float[ArrayLike, ""] | None = None,
    solver: dfx.AbstractSolver | AbstractMethod | None = None,
    stepsize_controller: dfx.AbstractStepSizeController | None = None,
    dt0: float | Float[ArrayLike, ""] | None = None,
    adjoint: dfx.AbstractAdjoint | None = None,
    weight_decay: float | int | Float[ArrayLike, ""] | None = None,
    project: bool | None = None,
    estimate_error: bool | None = None,
    max_steps: int = 100_000,
    throw: bool = True,
    progress: Progress = False,
) -> Trajectory:
    """Gradient flow dw/dt = −∇L(w) from `model`'s weights, to time `t1`.

    L(w) = (1/m) Σ_i ℓ(f_w(x_i), y_i) [Du, Hu & Lee 2018, eqs. 4–5], or `objective`. For a
    smooth model this is an ordinary differential equation, solved to the tolerance. With
    kinks (ReLU, |·|, max) it is a differential inclusion, whose solutions slide along
    kinks: the answer is the exact one where `homoflow.Filippov` can follow it, with at
    most 20,000 pairs of a sample and a kink; otherwise an average (`homoflow.Averaged`),
    approximate, with an error estimate. `stats["solver_reason"]` says which, and why.

    **Arguments:**

    - `model`: an Equinox module that maps one sample to one output; or a `Trajectory`,
        which goes on from its end, on the same clock.
    - `data`: `(x, y)`, shapes `(m, …)`, cast to the dtype of the weights; with
        `objective`, what that takes.
    - `t1`: the final time, in the flow's units (a step of gradient descent with learning
        rate η takes time η); `jnp.inf` for the stationary point that the flow comes to,
        or on separable data for the limit of its direction (with kinks, for that only).
        From 1e8 on, with losses of exponential type, it is solved in logarithmic time
        (`homoflow.late_flow`).
    - `loss`: `(prediction, target) -> scalar`, averaged over samples; or `objective`:
        `(model, data) -> scalar`.
    - `trainable`: an Equinox filter for the arrays that move (all floating-point ones).
    - `dynamics`: another equation for the weights: `homoflow.HeavyBall`,
        `homoflow.Modified`, or your own. `weight_decay`: λ of dw/dt = −∇L(w) − λw.
    - `ts`: increasing times in [0, t1] to record at (101 equally spaced ones).
    - `observe`: name → function of a `homoflow.observe.Point`, or an observable.
    - `laws`: laws to record, of `homoflow.laws`. Default: those of the model; of one that
        is not homoflow's they are searched for once, up to 30,000 weights.
    - `save_models`: also keep the model at every time of `ts`.
    - `rtol`, `atol`: tolerances of the local error. Default `rtol`: 1e-10 for smooth
        models in float64, 1e-5 in float32 (a little less with `ExponentialAdams`), 1e-8
        along kinks, 1e-4 averaged over them. Default `atol`: `rtol` times the root mean
        square of the initial weights; 0 along kinks.
    - `solver`: the method, `homoflow.Auto()` by default; `homoflow.Filippov()`,
        `homoflow.Averaged()`, or a Diffrax solver, with its options `atol`,
        `stepsize_controller`, `dt0` and `adjoint` here or in `homoflow.Diffrax(…)`.
    - `project`: restore the laws by rescalings that leave the function as it is. Default:
        where homoflow chose the solver and the laws are certain; of matrix laws that are
        too large to be recorded whole the diagonal.
    - `estimate_error`: solve again, coarser, and report twice the difference. Default:
        where homoflow averages over kinks.
    - `max_steps`, `throw` (raise if the run does not finish), `progress`.

    **Returns:** a `homoflow.Trajectory`.

    **Raises:** `ValueError` or `TypeError` for bad input and for options that a method
    cannot honour; `homoflow.TrajectoryError`, which holds what was computed, if the run
    does not finish.

    ```python
    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    run = hf.flow(model, (x, x[:, :1]), t1=1.0)
    run.laws["neurons[1]"]  # constant, shape (101, 8)
    ```
    """
    check_flag("throw", throw)
    start, t0 = start_of(model)
    problem = make_problem(
        start, data, loss=loss, objective=objective, trainable=trainable
    )
    moving = choose_dynamics(dynamics, weight_decay)
    method = as_method(solver, atol, stepsize_controller, dt0, adjoint)
    obstacle = moving.obstacle(problem) if solver is None else None
    if obstacle is not None:
        raise ValueError(obstacle)
    late = None
    if isinstance(method, Auto) and not method.has_options:
        late = late_times(problem, moving, (t0, t1, ts), rtol)
    if late is not None:
        moving, t1, ts, rtol = late.dynamics, late.end, late.ts, late.rtol
    task = make_task(
        problem,
        (t0, t1, ts),
        moving,
        observe=observe,
        laws=laws,
        is_continued=start is not model,
        rtol=rtol,
        project=project,
        save_models=save_models,
        estimate_error=estimate_error,
        max_steps=max_steps,
        progress=progress,
    )
    if late is None:
        return run(task, method, throw)
    trajectory = dataclasses.replace(run(task, method, throw=False), ts=late.shown)
    return raise_unless_successful(trajectory) if throw else trajectory
