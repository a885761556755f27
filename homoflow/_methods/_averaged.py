"""Approximate flows of networks with kinks, averaged over them."""

from typing import final

import diffrax as dfx
import equinox as eqx
from jaxtyping import ArrayLike, Float

from .._jax._tracing import is_concrete
from .._kinks import AveragedMidpoint, kinked_function
from .._problem._problem import Problem
from .._problem._smoothness import kinks_of
from .._results._reason import REQUESTED, Reason
from .._results._trajectory import Trajectory
from ._base import AbstractMethod
from ._defaults import MAX_FOLLOWED_PAIRS
from ._diffrax import Diffrax, check_options, check_values, run_diffrax
from ._projection_choice import choose_projection
from ._task import Task


@final
class Averaged(AbstractMethod):
    """The approximate flow of a network with kinks, as `solver` of `homoflow.flow`.

    What `flow` does by itself where it does not follow kinks one by one. Solvers for
    smooth equations stall where pre-activations are pinned at their kinks. This method
    has a smallest step of 2·(t1 − t0)/`max_steps`, so that it averages over kinks and
    never stalls: Heun's method, or beyond 20,000 pairs of a sample and a kink (with a
    homoflow loss, and kinks that `homoflow.Filippov` can follow) a midpoint step with
    each pair's mean slope. It solves once more at a coarser tolerance, and
    `stats["error_estimate"]` is twice the relative difference of the final weights, and at
    least `rtol` with Heun's method: above about 0.1 the weights have not converged.

    Ask for it by name where `flow` would choose the exact flow, to compare the two. It
    cannot be differentiated: steps over kinks leave out what a kink does to a derivative.

    **Arguments:** as for `homoflow.Diffrax`.

    ```python
    model = hf.MLP((3, 8, 1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    run = hf.flow(model, (x, x[:, :1]), 1.0, solver=hf.Averaged())
    print(run.stats["error_estimate"])
    ```
    """

    atol: float | int | Float[ArrayLike, ""] | None = None
    dt0: float | int | Float[ArrayLike, ""] | None = None
    adjoint: dfx.AbstractAdjoint | None = None
    error_estimate: bool | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_options(None, self.adjoint)
        check_values(self.atol, self.dt0, self.error_estimate)

    def run(self, task: Task, reason: Reason = REQUESTED) -> Trajectory:
        kinks = kinks_of(task.given)
        solver, how = self._solver(task, kinks)
        if reason is REQUESTED:
            reason = Reason("requested", f"asked for; {how.text}")
        method = Diffrax(
            solver,
            self.atol,
            dt0=self.dt0,
            adjoint=self.adjoint,
            error_estimate=self.error_estimate,
        )
        plan = choose_projection(task, is_default_solver=True, adjoint=self.adjoint)
        # Every step at the floor, and as many rejected ones, still reach the end.
        # A program that restores laws after steps takes half as long again to compile.
        watches = task.is_untraced and is_concrete((self.atol, self.dt0))
        return run_diffrax(
            task,
            method,
            plan,
            reason,
            task.max_steps / 2,
            restores_if_needed=watches and how.code == "nonsmooth_averaged",
        )

    def why(self, task: Task) -> Reason:
        """How kinks are averaged over."""
        return self._solver(task, kinks_of(task.given))[1]

    def _solver(
        self, task: Task, kinks: tuple[str, ...]
    ) -> tuple[dfx.AbstractSolver, Reason]:
        jumps = f"the gradient jumps at {', '.join(kinks)}"
        is_plain = task.dynamics.is_gradient_flow and task.dynamics.conserves_laws
        goes_back = isinstance(self.adjoint, dfx.BacksolveAdjoint)
        if is_plain and not goes_back and _has_many_pairs(task.problem):
            return AveragedMidpoint(), Reason(
                "nonsmooth_many_pairs",
                f"{jumps}, for more than {MAX_FOLLOWED_PAIRS:,} pairs of a sample and a "
                "kink: the slope of each is averaged over the step; the result is "
                "approximate",
            )
        return dfx.Heun(), Reason(
            "nonsmooth_averaged",
            f"{jumps}: Heun's method compares the two ends of a step and averages over "
            "kinks; the result is approximate",
        )


def _has_many_pairs(problem: Problem) -> bool:
    """Whether there are many kinks and all that is not smooth are kinks laid open."""
    if not problem.has_homoflow_loss:
        return False
    function, samples = kinked_function(problem), problem.num_samples
    assert samples is not None
    return function.count * samples > MAX_FOLLOWED_PAIRS and not function.unsupported
