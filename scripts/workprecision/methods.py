"""What every method is to the study, and those that run inside `jax.jit`."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
from reference.midpoint import by_midpoint

import homoflow as hf

from .problems import Problem, flat

TOLERANCES = tuple(10.0**-k for k in range(2, 13))
#: Steps that no run of the exact flow here needs.
_EXACT_STEPS = 1_000_000


class Limit(NamedTuple):
    """Where a run is given up: at so many gradients, or CPU seconds.

    What runs inside one `jax.jit` is held to the gradients only.
    """

    gradients: int
    seconds: float


class Outcome(NamedTuple):
    """Weights at the time that was reached, and what they cost."""

    w: np.ndarray
    finished: bool
    gradients: float
    forward_passes: int = 0


Solve = Callable[[float], Outcome]


class Method(NamedTuple):
    """One way to integrate.

    - `kind`: "exact" follows kinks, "adaptive" methods take a tolerance, "fixed" ones a
        number of steps.
    - `needs`: the package that it comes from.
    - `settings`: tolerances or numbers of steps, each costlier than the one before.
    - `start(problem, limit)` compiles and warms up; what it returns solves at a setting.
    """

    name: str
    kind: Literal["exact", "adaptive", "fixed"]
    needs: str
    settings: tuple[float, ...]
    start: Callable[[Problem, Limit], Solve]


def filippov() -> Method:
    def start(problem: Problem, limit: Limit) -> Solve:
        def solve(rtol: float, t1: float = problem.t1) -> Outcome:
            flow = hf.flow(
                problem.model, problem.data, t1, ts=[0.0, t1], laws=(), rtol=rtol,
                loss=problem.loss, solver=hf.Filippov(max_active=problem.slots),
                max_steps=_EXACT_STEPS, throw=False,
            )  # fmt: skip
            return Outcome(
                flat(flow.model),
                bool(flow.result == hf.RESULTS.successful),
                float(flow.stats["gradient_evaluations"]),
                int(flow.stats["forward_passes"]),
            )

        solve(1e-4, 1e-3 * problem.t1)
        return solve

    return Method("homoflow Filippov", "exact", "homoflow", TOLERANCES[2:9:2], start)


def midpoint() -> Method:
    """Explicit midpoint with constant steps: it cannot stall, and is of order 1 here."""

    def start(problem: Problem, limit: Limit) -> Solve:
        gradient = problem.gradient

        @jax.jit
        def integrate(w, steps):
            return by_midpoint(gradient, w, problem.t1 / steps.astype(w.dtype), steps)

        def solve(steps: float) -> Outcome:
            w = np.asarray(integrate(problem.w0, jnp.asarray(int(steps))))
            return Outcome(w, bool(np.all(np.isfinite(w))), 2 * steps)

        solve(1)
        return solve

    steps = tuple(1000.0 * 4**k for k in range(7))
    return Method("midpoint, constant steps", "fixed", "jax", steps, start)


def diffrax(solver: dfx.AbstractERK) -> Method:
    """The count misses one gradient each time that the very first step is rejected."""
    tableau = solver.tableau
    assert isinstance(tableau, dfx.ButcherTableau)
    reused = int(tableau.fsal)
    per_step = tableau.num_stages - reused

    def start(problem: Problem, limit: Limit) -> Solve:
        term = dfx.ODETerm(lambda t, w, args: -problem.gradient(w))

        @jax.jit
        def integrate(w0, t1, tolerance):
            return dfx.diffeqsolve(
                term, solver, 0.0, t1, None, w0,
                stepsize_controller=dfx.PIDController(
                    rtol=tolerance, atol=tolerance * problem.scale
                ),
                max_steps=limit.gradients // per_step,
                throw=False,
            )  # fmt: skip

        def solve(tolerance: float, t1: float = problem.t1) -> Outcome:
            solution = integrate(problem.w0, t1, tolerance)
            assert solution.ys is not None
            w = np.asarray(solution.ys[-1])
            finished = solution.result == dfx.RESULTS.successful
            gradients = per_step * int(solution.stats["num_steps"])
            return Outcome(w, bool(finished), gradients + reused)

        solve(1e-2, 1e-3 * problem.t1)
        return solve

    name = f"Diffrax {type(solver).__name__}"
    return Method(name, "adaptive", "diffrax", TOLERANCES, start)
