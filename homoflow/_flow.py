"""`flow`: the gradient flow of a model, integrated by Diffrax."""

from collections.abc import Iterable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from ._exact_flow import exact_flow
from ._finite import all_finite
from ._kinks import Filippov
from ._laws import Law
from ._losses import LossLike, SquaredLoss
from ._method import Method, choose_method, gradient_evaluations
from ._observables import Observation, observe
from ._precision import full_matmul_precision
from ._problem import Objective, Problem, pose
from ._progress import Progress, as_meter
from ._recorded import recorded_trajectory
from ._span import Span, checked_span, fault_of, time_reached
from ._trainable import Trainable
from ._trajectory import (
    RESULTS,
    Stats,
    Trajectory,
    raise_unless_successful,
)

#: The error estimate is this factor times the difference to a coarser solve: with kinks the
#: error does not always fall in proportion, and where the two solves become unrelated their
#: distance may understate the error of either.
SAFETY = 2.0


def flow(
    model: PyTree,
    data: PyTree,
    t1: float | int | Float[ArrayLike, ""],
    *,
    loss: LossLike = SquaredLoss(),  # noqa: B008
    objective: Objective | None = None,
    trainable: Trainable = None,
    ts: Float[ArrayLike, " times"] | Iterable[float] | None = None,
    rtol: float | Float[ArrayLike, ""] | None = None,
    atol: float | Float[ArrayLike, ""] | None = None,
    solver: dfx.AbstractSolver | Filippov | None = None,
    stepsize_controller: dfx.AbstractStepSizeController | None = None,
    dt0: float | Float[ArrayLike, ""] | None = None,
    laws: Iterable[Law] | None = None,
    project: bool | None = None,
    save_models: bool = False,
    adjoint: dfx.AbstractAdjoint | None = None,
    estimate_error: bool | None = None,
    max_steps: int = 100_000,
    throw: bool = True,
    progress: Progress = False,
) -> Trajectory:
    """Gradient flow dw/dt = −∇L(w) from `model`'s weights, to time `t1`.

    L(w) = (1/m) Σ_i ℓ(f_w(x_i), y_i) [Du, Hu & Lee 2018, eqs. 4–5], or `objective`.

    For a smooth model this is an ordinary differential equation, solved to the
    tolerance. For a model with kinks (ReLU, |·|, max) the flow is a differential
    inclusion, whose solutions slide along kinks, and the answer is *approximate*: the
    default method averages over kinks at a tolerance that never stalls, and solves once
    more at a coarser one to report an `error_estimate` in `stats`. The exact flow of
    networks with few enough kinks is there for the asking: `solver=hf.Filippov()`.

    **Arguments:**

    - `model`: any Equinox module that maps one sample to one output.
    - `data`: `(x, y)` with shapes `(m, …)`, cast to the dtype of the model's weights;
        with `objective`, whatever that takes.
    - `t1`: the final time, in the flow's units (a step of gradient descent with learning
        rate η takes time η).
    - `loss`: `(prediction, target) -> scalar`, averaged over samples.
    - `objective`: `(model, data) -> scalar`, instead of a loss.
    - `trainable`: an Equinox filter for the arrays that move (all floating-point ones).
    - `ts`: increasing times in [0, t1] to record at (101 equally spaced ones).
    - `rtol`, `atol`: tolerances of the local error. Default `rtol`: 1e-10 for smooth
        models in float64, 1e-5 in float32; 1e-4 for models with kinks. Default `atol`:
        `rtol` times the root mean square of the initial weights, so that small
        initializations are resolved.
    - `solver`, `stepsize_controller`, `dt0`: any of Diffrax's, run unaltered. Default:
        `Dopri8` (float64) or `Tsit5` (float32) for smooth models, `Heun` with a smallest
        step of 2·t1/`max_steps` for models with kinks. `dt0` is the first step, or the
        constant one for a solver without error estimate. Or `homoflow.Filippov()`, the
        exact flow through kinks, at an `rtol` of 1e-8 if none is given; then
        `grad_norms` are the speed ‖ẇ‖, the least norm in the sub-differential.
    - `laws`: law objects to record (those of `homoflow.laws`); `()` for none.
    - `project`: project onto the conserved laws after each step. Not available in this
        version: `None` and `False` leave the solver's own drift as it is.
    - `save_models`: also keep the model at every time of `ts`.
    - `adjoint`: how Diffrax differentiates through the solve (its default is
        `RecursiveCheckpointAdjoint`). With `BacksolveAdjoint` observables are computed
        after the solve, from all models at `ts`.
    - `estimate_error`: solve again at 4 times the tolerance (or with twice the constant
        step) and report twice the difference. Default: for homoflow's own choice of
        method on models with kinks. An estimate above about 0.1 says that the weights
        have not converged.
    - `max_steps`: of the solver.
    - `throw`: raise if the run does not finish; otherwise see `result`.
    - `progress`: `True` for a progress bar, or a Diffrax progress meter.

    **Returns:** a `homoflow.Trajectory`. Its `stats` hold `steps`, `rejected_steps`,
    `gradient_evaluations` (explicit Runge–Kutta solvers), `time_reached`,
    `law_violation`, `error_estimate` (relative error of the final weights),
    `loss_error_estimate` (largest absolute error of `losses`), `solver`, `why`, `kinks`.
    Those of `Filippov` also hold `crossings`, `entries` and `exits` (pairs of a sample
    and a unit that cross their kink, begin or cease to slide on it),
    `largest_sliding_set`, `forward_passes`, and `non_unique`: how often the inclusion
    had two solutions to go on with, at concave kinks, and one was taken.

    **Raises:** `ValueError` for bad input, before anything is compiled;
    `homoflow.TrajectoryError`, which holds what was computed, if the run does not finish.
    Under jit or vmap, where values are unknown, bad values become result codes instead.

    ```python
    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    flow = hf.flow(model, (x, x[:, :1]), t1=5.0)
    drift = flow.laws["neurons[1]"][-1] - flow.laws["neurons[1]"][0]
    ```
    """
    if project:
        raise ValueError(
            "`project=True` is not available in this version. Leave `project` out, and "
            "tighten `rtol` to make the laws drift less."
        )
    problem = pose(
        model,
        data,
        loss=loss,
        objective=objective,
        trainable=trainable,
        laws=laws,
    )
    if isinstance(solver, Filippov):
        _refuse_with_filippov(
            atol=atol,
            stepsize_controller=stepsize_controller,
            dt0=dt0,
            adjoint=adjoint,
            estimate_error=estimate_error or None,
            progress=progress or None,
        )
        trajectory = exact_flow(
            problem,
            solver,
            checked_span(t1, ts, problem.dtype),
            rtol=rtol,
            max_steps=_checked_max_steps(max_steps),
            save_models=save_models,
        )
        return raise_unless_successful(trajectory) if throw else trajectory
    method = choose_method(
        problem,
        rtol=rtol,
        atol=atol,
        solver=solver,
        controller=stepsize_controller,
        dt0=dt0,
        max_steps=_checked_max_steps(max_steps),
    )
    span = checked_span(t1, ts, problem.dtype)
    options = _Options(
        save_models=save_models,
        adjoint=dfx.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
        max_steps=max_steps,
    )
    coarser = None
    if method.is_averaging if estimate_error is None else estimate_error:
        coarser = _coarser(method)
    trajectory = _solve(problem, method, span, options, as_meter(progress))
    if coarser is not None:
        trajectory = _with_error_estimate(trajectory, problem, coarser, span, options)
    return raise_unless_successful(trajectory) if throw else trajectory


class _Options(eqx.Module):
    save_models: bool = eqx.field(static=True)
    adjoint: dfx.AbstractAdjoint
    max_steps: int = eqx.field(static=True)


@eqx.filter_jit
@full_matmul_precision()
def _solve(
    problem: Problem,
    method: Method,
    span: Span,
    options: _Options,
    meter: dfx.AbstractProgressMeter,
) -> Trajectory:
    weights = problem.weights()
    fault = fault_of(problem, span, method.rtol)
    # A faulty problem must not be integrated: nothing would be learned, slowly.
    sound = fault == RESULTS.successful
    t1 = jnp.where(sound, span.t1, 0)
    ts = jnp.where(sound, span.times(), 0)

    # Diffrax gets plain lists: a model's tree may hold more than arrays. And it
    # differentiates with respect to `args`, not to what a closure holds.
    leaves, structure = jax.tree.flatten(weights)
    given, fixed = eqx.partition((problem.frozen(), problem.data), eqx.is_array)

    def loss(w, given):
        frozen, data = eqx.combine(given, fixed)
        return problem.objective(eqx.combine(w, frozen), data)

    def field(t, leaves, given):
        del t
        gradient = jax.grad(loss)(jax.tree.unflatten(structure, leaves), given)
        return [-g for g in jax.tree.leaves(gradient)]

    def record(t, leaves, given):
        del t
        w = jax.tree.unflatten(structure, leaves)
        value, gradient = jax.value_and_grad(loss)(w, given)
        seen = observe(problem.laws, w, value, gradient)
        return seen, (leaves if options.save_models else None)

    controller = _controller(method, weights, t1)
    solution = dfx.diffeqsolve(
        dfx.ODETerm(field),
        method.solver,
        jnp.zeros_like(t1),
        t1,
        method.dt0,
        leaves,
        args=given,
        saveat=_saveat(options.adjoint, ts, t1, record),
        stepsize_controller=controller,
        adjoint=options.adjoint,
        event=_event(options.adjoint),
        max_steps=options.max_steps,
        throw=False,
        progress_meter=meter,
    )
    seen, saved, final, reached = _read(solution, options.adjoint, record, given)
    # Of a faulty problem nothing is recorded, not even the start.
    reached = jnp.where(sound, reached, -jnp.inf)
    final = jax.tree.unflatten(structure, final)
    if options.save_models:
        saved = jax.tree.unflatten(structure, saved)
    result = _result(fault, solution.result, seen, final)
    return _trajectory(
        problem, method, span, options, seen, saved, final, reached, result, solution
    )


def _controller(method: Method, weights: PyTree, t1: Array):
    if method.controller is not None:
        return method.controller
    assert method.rtol is not None
    atol = method.rtol * _scale(weights) if method.atol is None else method.atol
    if method.most_steps is None:
        # Steps that the clock cannot resolve lead nowhere: weights blow up in finite time.
        dtmin = jnp.finfo(t1.dtype).eps * t1
        return dfx.PIDController(rtol=method.rtol, atol=atol, dtmin=dtmin)
    return dfx.PIDController(
        rtol=method.rtol, atol=atol, dtmin=t1 / method.most_steps, force_dtmin=True
    )


def _scale(weights: PyTree) -> Float[Array, ""]:
    """Root mean square of the weights; 1 where they are all zero."""
    leaves = jax.tree.leaves(jax.lax.stop_gradient(weights))
    square = jnp.sum(jnp.stack([jnp.sum(w**2) for w in leaves]))
    mean = square / sum(w.size for w in leaves)
    return jnp.sqrt(jnp.where(mean > 0, mean, 1))


def _saveat(adjoint, ts: Array, t1: Array, record) -> dfx.SaveAt:
    if isinstance(adjoint, dfx.BacksolveAdjoint):
        # It can differentiate through saved states only, not through observables.
        return dfx.SaveAt(ts=jnp.append(ts, t1))
    return dfx.SaveAt(
        subs={"final": dfx.SubSaveAt(t1=True), "ts": dfx.SubSaveAt(ts=ts, fn=record)}
    )


def _event(adjoint) -> dfx.Event | None:
    if isinstance(adjoint, dfx.BacksolveAdjoint):
        return None

    def nonfinite(t, y, args, **kwargs):
        del t, args, kwargs
        return ~all_finite(y)

    return dfx.Event(nonfinite)


def _read(solution, adjoint, record, given):
    """Observations, saved weights, final weights and the time they belong to."""
    if isinstance(adjoint, dfx.BacksolveAdjoint):
        states = jax.tree.map(lambda y: y[:-1], solution.ys)
        final = jax.tree.map(lambda y: y[-1], solution.ys)
        seen, saved = jax.lax.map(lambda w: record(None, w, given), states)
        return seen, saved, final, solution.ts[-1]
    seen, saved = solution.ys["ts"]
    final = jax.tree.map(lambda y: y[0], solution.ys["final"])
    return seen, saved, final, solution.ts["final"][0]


def _result(
    fault: RESULTS, solved: dfx.RESULTS, seen: Observation, final: PyTree
) -> RESULTS:
    finite = all_finite((seen, final))
    result = RESULTS.where(finite, RESULTS.successful, RESULTS.nonfinite)
    known = (
        (dfx.RESULTS.max_steps_reached, RESULTS.max_steps_reached),
        (dfx.RESULTS.dt_min_reached, RESULTS.step_size_too_small),
        (dfx.RESULTS.event_occurred, RESULTS.nonfinite),
    )
    failed = RESULTS.where(
        solved == dfx.RESULTS.successful, result, RESULTS.solver_failed
    )
    for theirs, ours in known:
        failed = RESULTS.where(solved == theirs, ours, failed)
    return RESULTS.where(fault == RESULTS.successful, failed, fault)


def _trajectory(
    problem, method, span, options, seen, saved, final, reached, result, solution
) -> Trajectory:
    ts = span.times()
    ok = result == RESULTS.successful
    finite = jax.vmap(all_finite)(seen)
    # Times the solver never came to were left at inf by Diffrax.
    valid = finite & (ok | (ts <= reached)) & (jnp.cumsum(~finite) == 0)
    numbers = {
        "steps": solution.stats["num_accepted_steps"],
        "rejected_steps": solution.stats["num_rejected_steps"],
        "time_reached": time_reached(result, ts, valid, reached, span.t1),
    }
    evaluations = gradient_evaluations(method.solver, solution.stats["num_steps"])
    if evaluations is not None:
        numbers["gradient_evaluations"] = evaluations + ts.shape[0]
    facts = (*method.facts, ("clock", "flow time"))
    return recorded_trajectory(
        problem,
        ts,
        seen,
        valid,
        final=final,
        saved=saved if options.save_models else None,
        result=result,
        numbers=numbers,
        facts=facts,
    )


def _coarser(method: Method) -> Method:
    coarser = method.coarser()
    if coarser is None:
        raise ValueError(
            "`estimate_error` compares two tolerances, which are your "
            "`stepsize_controller`'s to choose: run the flow twice and `homoflow.compare` "
            "the two."
        )
    return coarser


def _with_error_estimate(
    trajectory: Trajectory,
    problem: Problem,
    coarser: Method,
    span: Span,
    options: _Options,
) -> Trajectory:
    """Adds the difference to a solve by a coarser method to `stats`."""
    # Only a figure is wanted: derivatives need not follow the second solve.
    still_problem, still_method, still_span = _without_derivatives(
        (problem, coarser, span)
    )
    coarse = _solve(
        still_problem, still_method, still_span, options, dfx.NoProgressMeter()
    )
    fine, rough = (
        jax.tree.leaves(eqx.filter(t.model, problem.mask)) for t in (trajectory, coarse)
    )
    difference = sum(jnp.sum((a - b) ** 2) for a, b in zip(fine, rough, strict=True))
    size = sum(jnp.sum(a**2) for a in fine)
    both = (trajectory.result == RESULTS.successful) & (
        coarse.result == RESULTS.successful
    )
    numbers = dict(trajectory.stats.numbers)
    numbers["error_estimate"] = jnp.where(
        both, SAFETY * jnp.sqrt(difference / size), jnp.nan
    )
    numbers["loss_error_estimate"] = jnp.where(
        both, SAFETY * jnp.max(jnp.abs(trajectory.losses - coarse.losses)), jnp.nan
    )
    if "gradient_evaluations" in numbers:
        numbers["gradient_evaluations"] += coarse.stats["gradient_evaluations"]
    stats = Stats(numbers, trajectory.stats.facts)
    return eqx.tree_at(lambda t: t.stats, trajectory, stats)


def _without_derivatives(tree: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_array(leaf) else leaf, tree
    )


def _refuse_with_filippov(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"`{name}` is for Diffrax's solvers: `homoflow.Filippov` takes `rtol` "
                "and `max_steps` only."
            )


def _checked_max_steps(max_steps: int) -> int:
    if not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"`max_steps` must be a positive integer; got {max_steps!r}.")
    return max_steps
