"""`late_flow`: gradient flow to times beyond what a float can hold."""

import dataclasses
from collections.abc import Iterable

import diffrax as dfx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from .._dynamics._log_time import LogTime, degree_of
from .._jax._arguments import as_times, check_number
from .._jax._tracing import is_concrete
from .._laws import Law
from .._methods._base import AbstractMethod
from .._methods._defaults import MAX_DENSE_WEIGHTS, STEADY_STATE_RTOL
from .._methods.margin import log_loss_at
from .._observe._base import FunctionOfPoint, Observables, as_observables
from .._observe._recorder import STANDARD
from .._observe._time_grid import DEFAULT_TIMES
from .._problem._losses import LogisticLoss, LossLike
from .._problem._problem import make_problem
from .._problem._trainable import Trainable
from .._results._failure import raise_unless_successful
from .._results._trajectory import Trajectory
from ._flow import flow

#: Names of what every late flow records, beside what every flow does.
_RECORDED = frozenset({"log_ts", "log_losses"})


def late_flow(
    model: PyTree,
    data: PyTree,
    log_t1: float | int | Float[ArrayLike, ""],
    *,
    loss: LossLike = LogisticLoss(),  # noqa: B008
    trainable: Trainable = None,
    log_ts: Float[ArrayLike, " times"] | Iterable[float] | None = None,
    observe: Observables | None = None,
    laws: Iterable[Law] | None = None,
    save_models: bool = False,
    rtol: float | Float[ArrayLike, ""] | None = None,
    atol: float | Float[ArrayLike, ""] | None = None,
    solver: dfx.AbstractSolver | AbstractMethod | None = None,
    time_unit: float | int | Float[ArrayLike, ""] = 1.0,
    max_steps: int = 100_000,
    throw: bool = True,
) -> Trajectory:
    """Gradient flow dw/dt = −∇L(w) to the time e^`log_t1`, for losses that vanish late.

    With the logistic, exponential or cross-entropy loss on separable data the weights
    grow without bound, like a power of log t, and what converges is their direction: to a
    Karush–Kuhn–Tucker point of the maximal margin problem [Lyu & Li 2020; Ji & Telgarsky
    2020], about as fast as 1/log t. `homoflow.flow` would need steps of a size that is
    bounded by 1/λ_max, for ever. Here the flow is solved in s = log(1 + t/`time_unit`),

        dw/ds = −(t + `time_unit`) ∇L = −exp(s + log `time_unit` + log L) ∇log L,

    with log L by log-sum-exp: the same curve on the same clock, whose right-hand side
    stays of order one. t = e^(10⁸) is a time like any other, and L = e^(−10⁸) a loss.

    **Arguments:**

    - `log_t1`: the natural logarithm of the final time.
    - `loss`: `homoflow.LogisticLoss()`, `homoflow.ExponentialLoss()`, or
        `homoflow.SoftmaxCrossEntropy()` with class indices.
    - `log_ts`: increasing logarithms of the times to record at; −∞ is t = 0. Default: 101
        equally spaced s, from t = 0 on.
    - `solver`: by default `homoflow.Rodas5P()` up to 500 weights, whose steps grow with s,
        and what `homoflow.flow` takes for more, or for kinks: `homoflow.Filippov()`, whose
        steps do not grow, so that s = 1e4 takes thousands. `rtol`: 1e-8 with both.
    - `time_unit`: about the time after which the start is left behind.
    - all others: as for `homoflow.flow`.

    **Returns:** a `homoflow.Trajectory` on the flow's clock. `observed["log_ts"]` and
    `observed["log_losses"]` have log t and log L, shape `(times,)`: beyond 10³⁰⁸ `ts` is
    inf, and `losses` and `grad_norms`, which are those of L itself, are 0.

    **Raises:** `ValueError` for bad input, another loss, and weights in float32.
    `homoflow.TrajectoryError` if the run does not finish.

    ```python
    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    run = hf.late_flow(model, (x, jnp.sign(x[:, :1])), log_t1=1e6)
    run.observed["log_losses"][-1]  # about -1e6
    ```
    """
    problem = make_problem(model, data, loss=loss, trainable=trainable)
    unit = _checked_unit(time_unit, problem.dtype)
    dynamics = LogTime(unit, degree_of(problem))
    end, ts = _grid(log_t1, log_ts, dynamics)
    if solver is None and rtol is None and problem.num_weights <= MAX_DENSE_WEIGHTS:
        rtol = STEADY_STATE_RTOL
    trajectory = flow(
        model,
        data,
        end,
        loss=loss,
        trainable=trainable,
        dynamics=dynamics,
        ts=ts,
        observe=_with_log_loss(observe),
        laws=laws,
        save_models=save_models,
        rtol=rtol,
        atol=atol,
        solver=solver,
        max_steps=max_steps,
        throw=False,
    )
    trajectory = _with_log_times(trajectory, ts, dynamics)
    return raise_unless_successful(trajectory) if throw else trajectory


def _checked_unit(time_unit: object, dtype: jnp.dtype) -> Array:
    check_number("time_unit", time_unit)
    unit = jnp.asarray(time_unit, dtype)
    if is_concrete(unit) and not (np.isfinite(float(unit)) and float(unit) > 0):
        raise ValueError(f"`time_unit` must be positive and finite; got {time_unit}.")
    return unit


def _grid(log_t1: object, log_ts: object, dynamics: LogTime) -> tuple[Array, Array]:
    """The end and the recorded times in the variable of integration."""
    check_number("log_t1", log_t1)
    dtype = dynamics.time_unit.dtype
    end = jnp.asarray(log_t1, dtype)
    if is_concrete(end) and not np.isfinite(float(end)):
        raise ValueError(
            f"`log_t1` must be finite; got {log_t1}. The direction of the weights "
            "converges like 1/log t: 1e8 is as good as no end."
        )
    if log_ts is None:
        last = dynamics.sigma_at(end)
        fractions = jnp.linspace(0, 1, DEFAULT_TIMES, dtype=dtype)
        # Rounding must not put the last time beyond the end.
        return last, dynamics.sigma_of(dynamics.s_of(last) * fractions).at[-1].set(last)
    logs = as_times(log_ts).astype(dtype)
    if is_concrete((logs, end)):
        values = np.asarray(logs)
        if not (np.all(np.diff(values) > 0) and values[-1] <= float(end)):
            raise ValueError("`log_ts` must increase and end at `log_t1` or before.")
    return dynamics.sigma_at(end), dynamics.sigma_at(logs)


def _with_log_times(
    trajectory: Trajectory, sigma: Array, dynamics: LogTime
) -> Trajectory:
    s = dynamics.s_of(sigma)
    logs = jnp.log(dynamics.time_unit) + s + jnp.log(-jnp.expm1(-s))
    return dataclasses.replace(
        trajectory,
        observed={**trajectory.observed, "log_ts": logs},
        observed_every=(*trajectory.observed_every, ("log_ts", 1)),
    )


def _with_log_loss(observe: Observables | None) -> Observables:
    asked = as_observables(observe, STANDARD | _RECORDED)
    return {**asked, "log_losses": FunctionOfPoint(function=log_loss_at)}
