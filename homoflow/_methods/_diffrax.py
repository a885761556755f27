"""Flows by Diffrax's solvers, and by homoflow's that are made like them."""

import dataclasses
from typing import Any, final

import diffrax as dfx
import equinox as eqx
import numpy as np
from jaxtyping import ArrayLike, Float

from .._dynamics._base import AbstractStochasticDynamics
from .._jax._arguments import check_flag, check_instance, check_number
from .._jax._enumerations import names_of
from .._jax._refuse_derivatives import refuse_derivatives
from .._problem._smoothness import kinks_of
from .._results._reason import REQUESTED, Reason
from .._results._status import RESULTS
from .._results._trajectory import Trajectory, with_facts
from ._base import AbstractMethod
from ._integrate import integrate
from ._projection_choice import ProjectionPlan, choose_projection
from ._sample_reduction import reduce_samples
from ._settings import Settings, make_settings
from ._task import Task

Number = float | int | Float[ArrayLike, ""]
#: Up to so many tolerances, laws need not be restored after every step.
_MAX_UNRESTORED_DRIFT = 10.0
_EXAMPLES = {
    dfx.AbstractSolver: "diffrax.Tsit5()",
    dfx.AbstractStepSizeController: "diffrax.PIDController(rtol=1e-6, atol=1e-9)",
    dfx.AbstractAdjoint: "diffrax.DirectAdjoint()",
}


@final
class Diffrax(AbstractMethod):
    """A flow by one of Diffrax's solvers, run unaltered.

    `homoflow.flow(…, solver=diffrax.Kvaerno5())` is short for
    `solver=homoflow.Diffrax(diffrax.Kvaerno5())`, with options in one place.

    **Arguments:**

    - `solver`: any of Diffrax's, or `homoflow.ExponentialAdams()`, `homoflow.Rodas5P()`,
        `homoflow.GaussLegendre()`.
    - `atol`: the absolute tolerance of the local error. Default: `rtol` times the root
        mean square of the initial weights, so that small initializations are resolved.
    - `stepsize_controller`: one of Diffrax's, in place of a PID controller at `rtol` and
        `atol`.
    - `dt0`: the first step, or the constant one for a solver without error estimate.
    - `adjoint`: how Diffrax differentiates through the solve. With `BacksolveAdjoint`
        observables are computed after the solve, from all models at `ts`.
    - `error_estimate`: solve again at 4 times the tolerance (or with twice the constant
        step) and report twice the difference.

    ```python
    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    method = hf.Diffrax(diffrax.Tsit5(), atol=1e-8, error_estimate=True)
    run = hf.flow(model, (x, x[:, :1]), 1.0, rtol=1e-6, solver=method)
    ```
    """

    solver: dfx.AbstractSolver
    atol: Number | None = None
    stepsize_controller: dfx.AbstractStepSizeController | None = None
    dt0: Number | None = None
    adjoint: dfx.AbstractAdjoint | None = None
    error_estimate: bool | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_option("solver", self.solver, dfx.AbstractSolver)
        check_options(self.stepsize_controller, self.adjoint)
        check_values(self.atol, self.dt0, self.error_estimate)

    def run(self, task: Task, reason: Reason = REQUESTED) -> Trajectory:
        task = reduce_samples(task)
        plan = choose_projection(task, is_default_solver=False, adjoint=self.adjoint)
        return run_diffrax(task, self, plan, reason)


def run_diffrax(
    task: Task,
    method: Diffrax,
    plan: ProjectionPlan,
    reason: Reason,
    max_forced_steps: float | None = None,
    *,
    restores_if_needed: bool = False,
) -> Trajectory:
    """The task by a Diffrax solver, with laws restored and facts for `stats`.

    `restores_if_needed`: laws are restored after steps only if they have drifted far
    without; what is recorded has them restored in any case.
    """
    kinks = kinks_of(task.given)
    _check_noise(task, method)
    if task.dynamics.has_edge:
        raise ValueError(
            f"The {task.dynamics.name} slides along the boundary of a set, which general "
            "solvers step across: pass `solver=homoflow.AlongEdge()`, or call "
            "`homoflow.central_flow`."
        )
    if kinks:
        task = _without_derivatives_through(task, kinks)
    settings = settings_of(task, method, plan, bool(kinks), max_forced_steps)
    task = with_error_estimate_of(task, method.error_estimate)
    facts = make_facts(task, type(method.solver).__name__, reason, kinks, plan)
    if restores_if_needed and plan.laws:
        watching = dataclasses.replace(settings, restores_steps=False)
        trajectory = integrate(task, watching, method.adjoint)
        if not _has_drifted_far(trajectory, settings):
            return with_facts(trajectory, facts)
    return with_facts(integrate(task, settings, method.adjoint), facts)


def _has_drifted_far(trajectory: Trajectory, settings: Settings) -> bool:
    """Whether laws have drifted by more than what a step may do to the weights."""
    assert settings.rtol is not None
    if str(names_of(trajectory.result, RESULTS)) == "max_steps_reached":
        return False
    drift = np.asarray(trajectory.stats["projected_drift"])
    return bool(drift > _MAX_UNRESTORED_DRIFT * np.asarray(settings.rtol))


def _without_derivatives_through(task: Task, kinks: tuple[str, ...]) -> Task:
    """The task, whose result cannot be differentiated: that would be wrong.

    Where a pre-activation passes its kink the derivative of the flow jumps (the saltation
    matrix I + (v₊ − v₋)∇zᵀ/⟨∇z, v₋⟩). The derivative of a step over the kink has no
    such factor, however small the step.
    """
    message = (
        f"The gradient jumps at {', '.join(kinks)}: derivatives through "
        "steps over kinks leave out what each jump contributes. Use forward mode "
        "(`jax.jvp`, `jax.jacfwd`) through the exact flow, "
        "`solver=homoflow.Filippov()`, or finite differences."
    )
    problem, dynamics = refuse_derivatives((task.problem, task.dynamics), message)
    given = task.given if task.given is not task.problem else problem
    return dataclasses.replace(task, problem=problem, given=given, dynamics=dynamics)


def settings_of(
    task: Task,
    method: Diffrax,
    plan: ProjectionPlan,
    has_kinks: bool,
    max_forced_steps: float | None = None,
) -> Settings:
    """The settings of a method's options, with the laws to restore."""
    settings = make_settings(
        task.problem.dtype,
        method.solver,
        rtol=task.rtol,
        atol=method.atol,
        controller=method.stepsize_controller,
        dt0=method.dt0,
        has_kinks=has_kinks,
        max_forced_steps=max_forced_steps,
    )
    return dataclasses.replace(
        settings,
        restored_laws=plan.laws,
        translations=plan.translations,
        gives_up=task.is_trial,
    )


def make_facts(
    task: Task,
    solver_name: str,
    reason: Reason,
    kinks: tuple[str, ...],
    plan: ProjectionPlan,
) -> tuple[tuple[str, Any], ...]:
    """What is known of a run before it starts, for `stats`."""
    facts = {
        "solver": solver_name,
        "solver_reason": reason,
        "dynamics": task.dynamics.name,
        "nonsmooth_ops": ", ".join(kinks) or "none found",
        "projection": plan.note,
    }
    if task.sample_reduction is not None:
        facts["sample_reduction"] = task.sample_reduction
    return tuple(facts.items())


def with_error_estimate_of(task: Task, error_estimate: bool | None) -> Task:
    """The task with a method's own wish for an error estimate."""
    if error_estimate is None:
        return task
    if task.estimate_error not in (None, error_estimate):
        raise ValueError(
            "`estimate_error` of `flow` and `error_estimate` of its `solver` contradict "
            "each other: give one of them."
        )
    return dataclasses.replace(task, estimate_error=error_estimate)


def check_option(name: str, value: Any, expected: type) -> None:
    """`TypeError` unless an option is an instance of what it should be, or `None`."""
    example = _EXAMPLES[expected]
    check_instance(name, value, expected, f"one of Diffrax's, such as `{example}`")


def check_options(controller: Any, adjoint: Any) -> None:
    """`TypeError` unless they are instances of Diffrax's classes, or `None`."""
    if controller is not None:
        expected = dfx.AbstractStepSizeController
        check_option("stepsize_controller", controller, expected)
    if adjoint is not None:
        check_option("adjoint", adjoint, dfx.AbstractAdjoint)


def check_values(atol: Any, dt0: Any, error_estimate: Any) -> None:
    """`TypeError` or `ValueError` unless these are numbers and a flag, or `None`."""
    for name, value in (("atol", atol), ("dt0", dt0)):
        if value is not None:
            check_number(name, value)
    check_flag("error_estimate", error_estimate, may_be_none=True)


def _check_noise(task: Task, method: Diffrax) -> None:
    if not isinstance(task.dynamics, AbstractStochasticDynamics):
        return
    if task.grid is None or method.error_estimate or task.estimate_error:
        raise ValueError(
            f"The {task.dynamics.name} is stochastic: `t1=inf` and `estimate_error` are "
            "for deterministic equations."
        )
