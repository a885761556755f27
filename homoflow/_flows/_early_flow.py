"""`early_flow`: gradient flow from starts below the smallest float."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, PyTree

from .._dynamics._log_weights import LogWeights
from .._jax._arguments import check_flag, check_number
from .._jax._tracing import is_concrete
from .._laws import Law
from .._laws._as_laws import laws_to_record
from .._methods._rest import COARSE_RTOL, OF_STATE, follow_to_rest
from .._methods._task import is_infinite
from .._observe._base import Observables, as_observables
from .._observe._recorder import STANDARD
from .._problem._losses import LossLike, SquaredLoss
from .._problem._problem import Objective, make_problem
from .._problem._trainable import Trainable
from .._results._failure import raise_unless_successful
from .._results._trajectory import Trajectory
from ._flow import flow

#: The tolerance of a weight's logarithm.
_RTOL = 1e-8


def early_flow(
    model: PyTree,
    data: PyTree,
    t1: float | int | Float[ArrayLike, ""],
    *,
    log_size: float | int | Float[ArrayLike, ""] = 0.0,
    loss: LossLike = SquaredLoss(),  # noqa: B008
    objective: Objective | None = None,
    trainable: Trainable = None,
    ts: Float[ArrayLike, " times"] | Iterable[float] | None = None,
    observe: Observables | None = None,
    laws: Iterable[Law] | None = None,
    save_models: bool = False,
    rtol: float | Float[ArrayLike, ""] | None = None,
    max_steps: int = 100_000,
    throw: bool = True,
) -> Trajectory:
    """Gradient flow dw/dt = −∇L(w) from e^`log_size` times the weights, however small.

    From a start of size s the flow passes saddle after saddle, at times that grow like
    log(1/s) [Pesme & Flammarion 2023]; what a weight has lost by then it must regain, which
    may be below the smallest float. Where every weight acts by its square alone, as in
    diagonal linear networks f(x) = Σ (u² − v²)x, the flow is solved for z = log|w|,

        dz/dt = −(∂L/∂w)/w,

    whose right-hand side is constant between saddles. A start of 1e-300, or of 1e-1000,
    takes as many steps as one of 1e-60.

    **Arguments:**

    - `t1`: the final time, which should scale with −`log_size`; `jnp.inf` for the
        stationary point that the flow comes to.
    - `log_size`: the natural logarithm of what the model's weights are multiplied with,
        such as −690 for 1e-300; 0 for weights that are small themselves.
    - `rtol`: of the logarithms, and their absolute tolerance; 1e-8 by default.
    - all others: as for `homoflow.flow`. With `t1=jnp.inf`, `ts` are by default 101 equally
        spaced times to where the loss has come to rest.

    **Returns:** a `homoflow.Trajectory`. `observed["log_weights"]` has z at `ts`, numbers
    where the weights themselves have become 0. `homoflow.saddles` finds what it passed.

    **Raises:** `ValueError` for bad input, and for models of which a weight's sign matters
    (a weight could pass through 0) or that have kinks: for these there is `homoflow.flow`,
    from 1e-150 or so on. `homoflow.TrajectoryError` if the run does not finish.

    ```python
    class Diagonal(eqx.Module):
        u: jax.Array
        v: jax.Array

        def __call__(self, x):
            return (self.u**2 - self.v**2) @ x

    x = jnp.array([[1.0, 0.5, 0.7, 0.0], [0.5, 1.0, 0.1, 0.7]])
    data = (x, jnp.array([1.0, 0.0]))
    ones = Diagonal(jnp.ones(4), jnp.ones(4))
    run = hf.early_flow(ones, data, jnp.inf, log_size=-690.0, save_models=True)
    run.model.u**2 - run.model.v**2  # (0, 0, 10/7, −10/49)
    ```
    """
    check_flag("throw", throw)
    check_number("log_size", log_size)
    problem = make_problem(
        model, data, loss=loss, objective=objective, trainable=trainable
    )
    size = jnp.asarray(log_size, problem.dtype)
    if is_concrete(size) and not np.isfinite(float(size)):
        raise ValueError(f"`log_size` must be finite; got {log_size}.")
    dynamics = LogWeights(size, jax.tree.map(jnp.sign, problem.weights))
    dynamics.check(problem)
    asked = as_observables(observe, STANDARD | {"log_weights"})
    of_problem = {"loss": loss, "objective": objective, "trainable": trainable}
    shared = {**of_problem, "laws": laws, "max_steps": max_steps}

    def run(t1: Any, ts: Any, rtol: Any, **options: Any) -> Trajectory:
        return flow(
            model, data, t1, ts=ts, rtol=rtol, atol=rtol,
            dynamics=dynamics, throw=False, **shared, **options,
        )  # fmt: skip

    def look(t1: float, ts: np.ndarray) -> Trajectory:
        return run(t1, ts, COARSE_RTOL, observe={"log_weights": OF_STATE})

    fine = {"observe": {**asked, "log_weights": OF_STATE}, "save_models": save_models}
    rtol = _RTOL if rtol is None else rtol
    if not is_infinite(t1):
        trajectory = run(t1, ts, rtol, **fine)
        return raise_unless_successful(trajectory) if throw else trajectory

    def follow(t1: float, ts: np.ndarray) -> Trajectory:
        return run(t1, ts, rtol, **fine)

    recorded = laws_to_record(problem, laws)
    trajectory = follow_to_rest(problem, dynamics, look, follow, ts, recorded)
    return raise_unless_successful(trajectory) if throw else trajectory
