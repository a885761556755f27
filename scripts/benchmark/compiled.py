"""Methods that run inside `jax.jit`: homoflow, Diffrax, gradient descent."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import homoflow as hf

from .problems import Problem, flat

TOLERANCES = tuple(10.0**-k for k in range(2, 12))
#: Steps on which the cost of one is measured, and the most that anyone may take.
_TRIAL_STEPS, _MOST_STEPS = 30, 100_000_000
#: Points of a reference path.
_PATH_TIMES = 9


class Outcome(NamedTuple):
    """Final weights of so many seeds, and what they cost.

    `gradients` is NaN where the method does not count them.
    """

    ends: np.ndarray
    finished: bool
    gradients: float
    facts: str = ""


Solve = Callable[[float], Outcome]


class Method(NamedTuple):
    """One way to integrate.

    - `needs`: the package that it comes from.
    - `start(problem, seconds)` compiles and warms up; what it returns solves at a
        setting, a tolerance or a number of steps, and gives up after about so many
        seconds of CPU time.
    - `settings(problem, path)`: each costlier than the one before; `path` holds points
        of the flow.
    - `most_weights`: beyond this many it is not tried (dense matrices).
    - `only_softplus`: whether it is one for softplus networks alone.
    """

    name: str
    kind: Literal["homoflow", "peer", "descent"]
    needs: str
    start: Callable[[Problem, float], Solve]
    settings: Callable[[Problem, np.ndarray], tuple[float, ...]] = (
        lambda problem, path: TOLERANCES
    )
    most_weights: float = math.inf
    only_softplus: bool = False


def with_our_softplus(method: Method) -> Method:
    """A peer that is given the gradient which homoflow makes of a softplus network."""
    library, _, rest = method.name.partition(" ")

    def start(problem: Problem, seconds: float) -> Solve:
        return method.start(replace(problem, is_quick=True), seconds)

    name = f"{library}* {rest}"
    return method._replace(name=name, start=start, only_softplus=True)


def homoflow(
    name: str = "homoflow", solver: dfx.AbstractSolver | None = None
) -> Method:
    """`flow` as its users call it, with everything decided anew in each call."""

    def start(problem: Problem, seconds: float) -> Solve:
        def flow(model, rtol: float, t1: float, max_steps: int):
            return hf.flow(
                model, problem.data, t1, ts=[0.0, t1], laws=(), rtol=rtol,
                objective=problem.objective, solver=solver, max_steps=max_steps,
                throw=False,
            )  # fmt: skip

        def solve(rtol: float, max_steps: int, t1: float = problem.t1) -> Outcome:
            if problem.seeds == 1:
                run = flow(problem.model, rtol, t1, max_steps)
            else:
                each = eqx.filter_vmap(lambda model: flow(model, rtol, t1, max_steps))
                run = each(problem.model)
            finished = np.all(np.asarray(run.result == hf.RESULTS.successful))
            count = run.stats["gradient_evaluations"]
            return Outcome(
                flat(run.model, problem.seeds), bool(finished),
                jnp.nan if count is None else float(jnp.max(count)), run.stats["solver"],
            )  # fmt: skip

        most = _affordable(lambda most: solve(1e-6, most), seconds)
        for rtol in (1e-3, 1e-6):  # Each tolerance may have a solver of its own.
            solve(rtol, most, 1e-6 * problem.t1)
        return lambda rtol: solve(rtol, most)

    return Method(name, "homoflow", "homoflow", start)


def diffrax(solver: dfx.AbstractSolver, most_weights: float = math.inf) -> Method:
    def start(problem: Problem, seconds: float) -> Solve:
        term = dfx.ODETerm(lambda t, w, args: -jax.grad(problem.risk)(w))

        def integrate(w0, t1, tolerance, most):
            solution = dfx.diffeqsolve(
                term, solver, 0.0, t1, None, w0,
                stepsize_controller=dfx.PIDController(
                    rtol=tolerance, atol=tolerance * problem.scale
                ),
                max_steps=most, throw=False,
            )  # fmt: skip
            assert solution.ys is not None
            is_done = solution.result == dfx.RESULTS.successful
            return solution.ys[-1], is_done, solution.stats["num_steps"]

        # Under vmap a solver pays for both branches of its choices: not for one seed.
        def integrate_all(w0s, *rest):
            if problem.seeds == 1:
                return jax.tree.map(lambda a: jnp.stack([a]), integrate(w0s[0], *rest))
            return jax.vmap(lambda w0: integrate(w0, *rest))(w0s)

        compiled = jax.jit(integrate_all, static_argnums=3)

        def solve(tolerance: float, most: int, t1: float = problem.t1) -> Outcome:
            ends, finished, steps = map(
                np.asarray, compiled(problem.starts, t1, tolerance, most)
            )
            gradients = _stages(solver) * float(np.max(steps))
            return Outcome(ends, bool(np.all(finished)), gradients)

        most = _affordable(lambda most: solve(1e-6, most), seconds)
        solve(1e-2, most, 1e-6 * problem.t1)
        return lambda tolerance: solve(tolerance, most)

    name = f"Diffrax {type(solver).__name__}"
    return Method(name, "peer", "diffrax", start, most_weights=most_weights)


def gradient_descent() -> Method:
    """Its first setting is the fewest steps that are stable all along the flow."""

    def start(problem: Problem, seconds: float) -> Solve:
        gradient = jax.vmap(jax.grad(problem.risk))

        @jax.jit
        def descend(w, steps):
            step = problem.t1 / steps.astype(w.dtype)
            return jax.lax.fori_loop(0, steps, lambda _, w: w - step * gradient(w), w)

        def solve(steps: float) -> Outcome:
            ends = np.asarray(descend(problem.starts, jnp.asarray(int(steps))))
            return Outcome(ends, bool(np.all(np.isfinite(ends))), steps)

        solve(1)
        trial = 200
        each = _cpu_seconds(lambda: solve(trial)) / trial

        def within_limit(steps: float) -> Outcome:
            if steps * each > seconds:
                return Outcome(problem.starts, False, steps)
            return solve(steps)

        return within_limit

    def settings(problem: Problem, path: np.ndarray) -> tuple[float, ...]:
        fewest = math.ceil(problem.t1 * _largest_curvature(problem, path) / 2)
        return tuple(float(fewest * 4**k) for k in range(6))

    return Method("gradient descent", "descent", "jax", start, settings)


def reference_path(problem: Problem, tolerance: float) -> np.ndarray:
    """Weights of the judged seeds at equal times from 0 to t1, by Diffrax's Dopri8.

    Of shape (seeds, times, weights).
    """
    term = dfx.ODETerm(lambda t, w, args: -jax.grad(problem.risk)(w))

    @jax.jit
    @jax.vmap
    def integrate(w0):
        return dfx.diffeqsolve(
            term, dfx.Dopri8(), 0.0, problem.t1, None, w0,
            saveat=dfx.SaveAt(ts=problem.t1 * jnp.linspace(0, 1, _PATH_TIMES)),
            stepsize_controller=dfx.PIDController(
                rtol=tolerance, atol=tolerance * problem.scale
            ),
            max_steps=_MOST_STEPS,
        ).ys  # fmt: skip

    return np.asarray(integrate(problem.starts[: problem.judged]))


def _largest_curvature(problem: Problem, path: np.ndarray) -> float:
    """Of the Hessian at the points of a path, by power iteration."""

    @jax.jit
    def curvature(w):
        def product(v):
            return jax.jvp(jax.grad(problem.risk), (w,), (v,))[1]

        def again(_, v):
            image = product(v)
            return image / jnp.linalg.norm(image)

        v = jax.lax.fori_loop(0, 100, again, jnp.ones_like(w))
        return v @ product(v)

    return max(float(curvature(w)) for w in path.reshape(-1, problem.size))


def _stages(solver: dfx.AbstractSolver) -> float:
    """Gradients a step of an explicit method; NaN for an implicit one."""
    if not isinstance(solver, dfx.AbstractERK):
        return math.nan
    tableau = solver.tableau
    assert isinstance(tableau, dfx.ButcherTableau)
    return tableau.num_stages - int(tableau.fsal)


def _affordable(solve: Callable[[int], Any], seconds: float) -> int:
    """How many steps take so many seconds, by what a few take."""
    if seconds == math.inf:
        return _MOST_STEPS
    solve(_TRIAL_STEPS)
    each = _cpu_seconds(lambda: solve(_TRIAL_STEPS)) / _TRIAL_STEPS
    return min(max(int(seconds / each), 2 * _TRIAL_STEPS), _MOST_STEPS)


def _cpu_seconds(run: Callable[[], Any]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started
