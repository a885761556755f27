"""`early_flow`: gradient flow from starts below the smallest float."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from .._dynamics._log_weights import LogWeights
from .._jax._arguments import as_times, check_flag, check_number
from .._jax._tracing import is_concrete, is_concrete_call
from .._laws import Law
from .._laws._as_laws import laws_to_record
from .._methods._task import is_infinite
from .._methods.stationary import stationary_point_near
from .._observe._base import FunctionOfPoint, Observables, Point, as_observables
from .._observe._recorder import STANDARD
from .._observe._time_grid import DEFAULT_TIMES
from .._problem._losses import LossLike, SquaredLoss
from .._problem._problem import Objective, Problem, make_problem
from .._problem._trainable import Trainable
from .._results._failure import raise_unless_successful
from .._results._status import RESULTS
from .._results._trajectory import Trajectory, with_gradients_of
from ._flow import flow

#: The tolerance of a weight's logarithm, and that with which the end is looked for.
_RTOL, _COARSE_RTOL = 1e-8, 1e-5
#: How often the end is looked for, each time so many times as late; at how many times.
_MAX_LOOKS, _LATER, _LOOKED_AT = 6, 100.0, 200
#: The loss is at rest where this share of its fall is left, and runs last so much longer.
_AT_REST, _BEYOND = 1e-6, 1.25


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

    fine = {"observe": {**asked, "log_weights": _OF_STATE}, "save_models": save_models}
    rtol = _RTOL if rtol is None else rtol
    if not is_infinite(t1):
        trajectory = run(t1, ts, rtol, **fine)
        return raise_unless_successful(trajectory) if throw else trajectory
    rest = _find_rest(problem, dynamics, run)
    trajectory = rest.runs[-1]
    if rest.is_found:
        times = _times_to(rest.time, ts)
        trajectory = run(max(rest.time, times[-1]), times, rtol, **fine)
        if trajectory.result == RESULTS.successful:
            trajectory = _ended(problem, trajectory, laws)
        trajectory = with_gradients_of([*rest.runs, trajectory])
    return raise_unless_successful(trajectory) if throw else trajectory


def _logs(point: Point) -> PyTree[Array]:
    return point.state


_OF_STATE = FunctionOfPoint(function=_logs)


class _Rest(NamedTuple):
    """When the flow has come to rest, and the runs that it took to find that out."""

    is_found: bool
    time: float
    runs: list[Trajectory]


def _find_rest(problem: Problem, dynamics: LogWeights, run: Any) -> _Rest:
    """Looks at ever later times until no weight is about to grow."""
    if not is_concrete_call((problem, dynamics)):
        raise ValueError(
            "`t1=inf` decides in Python where the flow is at its end: it cannot be inside "
            "of jit, vmap or grad."
        )
    start = dynamics.init(problem)
    rates = dynamics.velocity(problem, jnp.zeros(()), start)
    fastest = max(float(jnp.max(jnp.abs(r))) for r in jax.tree.leaves(rates))
    lowest = min(float(jnp.min(z)) for z in jax.tree.leaves(start))
    first = (1 + max(0.0, -lowest)) / (fastest or 1.0)
    runs, last = [], first
    for _ in range(_MAX_LOOKS):
        last *= _LATER
        times = np.concatenate([[0], np.geomspace(first / 100, last, _LOOKED_AT)])
        trajectory = run(last, times, _COARSE_RTOL, observe={"log_weights": _OF_STATE})
        runs.append(trajectory)
        if trajectory.result != RESULTS.successful:
            return _Rest(False, last, runs)
        losses = np.asarray(trajectory.losses)
        moving = losses - losses[-1] > _AT_REST * (losses[0] - losses[-1])
        rest = float(times[np.flatnonzero(moving)[-1] + 1]) if moving.any() else first
        if _stays(problem, dynamics, trajectory, last - rest):
            return _Rest(True, _BEYOND * rest, runs)
    failed = dataclasses.replace(runs[-1], result=RESULTS.end_not_reached)
    return _Rest(False, last, [*runs[:-1], failed])


def _stays(
    problem: Problem, dynamics: LogWeights, trajectory: Trajectory, rested: float
) -> bool:
    """Whether the flow is at rest since long, and no small weight is on its way back."""
    logs = jax.tree.map(lambda z: z[-1], trajectory.observed["log_weights"])
    rates = dynamics.velocity(problem, jnp.zeros(()), logs)
    pairs = zip(jax.tree.leaves(logs), jax.tree.leaves(rates), strict=True)
    grown = max(float(jnp.max(jnp.where(z < 0, r, 0))) for z, r in pairs)
    span = float(trajectory.ts[-1])
    return rested > span / 2 and grown * span < 1


def _times_to(rest: float, ts: Any) -> np.ndarray:
    if ts is None:
        return np.linspace(0, rest, DEFAULT_TIMES)
    return np.asarray(as_times(ts), float)


def _ended(problem: Problem, trajectory: Trajectory, laws: Any) -> Trajectory:
    """The run with the stationary point that its end leads to."""
    recorded = laws_to_record(problem, laws)
    end = stationary_point_near(problem, trajectory.model, recorded)
    stats = trajectory.stats.with_numbers(**end.numbers)
    return dataclasses.replace(
        trajectory, model=end.model, result=end.result, stats=stats
    )
