"""The solve of an equation by Diffrax, and that whose derivatives are taken."""

import dataclasses
from functools import partial

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._dynamics._base import AbstractDynamics
from .._jax._arrays import all_finite
from .._jax._vmap_as_loop import call_in_turn_on_cpu
from .._jax._when_differentiated import when_differentiated
from .._observe._time_grid import TimeGrid
from .._problem._problem import Problem
from .._solvers import (
    ProjectedSolver,
    ProjectedState,
    TangentControl,
    as_flow_solver,
)
from ._give_up import GiveUpEarly
from ._landing import LandingController
from ._settings import Settings
from ._vector_field import Equation, make_terms

#: Drift of the laws that waits to be undone, in units of the tolerance: until then it is no
#: larger than what steps may do to the weights, whose error is the same as without waiting.
_TOLERATED_DRIFT = 1.0
#: Where a solver remembers more numbers than this, one more pass through them is what
#: restoring steps costs, each of them: then only what is recorded is restored.
_MAX_REMEMBERED = 2**20


#: Adjoints that differentiate the steps: by checkpoints, or forwards.
_REVERSE = dfx.RecursiveCheckpointAdjoint
_FORWARD = dfx.ForwardMode, dfx.DirectAdjoint


class Options(eqx.Module):
    """How to solve: known before anything is compiled.

    - `may_be_differentiated`: false where it is known that nobody differentiates.
    """

    save_models: bool = eqx.field(static=True)
    adjoint: dfx.AbstractAdjoint
    max_steps: int = eqx.field(static=True)
    may_be_differentiated: bool = eqx.field(static=True)

    def for_trial(
        self,
        controller: dfx.AbstractStepSizeController,
        settings: Settings,
        span: TimeGrid,
    ) -> dfx.AbstractStepSizeController:
        """The step size control, that ends a trial once it has no prospect."""
        if not settings.gives_up:
            return controller
        return GiveUpEarly(controller, span.t1, self.max_steps)


class Solve(eqx.Module):
    """All that an equation's solve depends on."""

    problem: Problem
    dynamics: AbstractDynamics
    equation: Equation
    settings: Settings
    grid: TimeGrid
    span: TimeGrid
    meter: dfx.AbstractProgressMeter


def solve_equation(given: Solve, saveat: dfx.SaveAt, options: Options) -> dfx.Solution:
    """Diffrax's solution; where it is differentiated, with steps that are fit for that."""
    reverse = isinstance(options.adjoint, _REVERSE)
    forward = isinstance(options.adjoint, _FORWARD)
    is_followed = options.may_be_differentiated and (reverse or forward)
    solve = partial(_solve, options=options)
    if is_followed and _takes_unstable_steps(given.settings):
        plain, differentiated = solve, _solve_with_tangent_control
    elif is_followed and as_flow_solver(given.settings.solver).runs_in_turn:
        plain, differentiated = partial(call_in_turn_on_cpu, solve), _solve
    else:
        return solve(given, saveat)
    return when_differentiated(
        plain,
        partial(differentiated, options=options),
        _without_closures(given, saveat),
        in_reverse=reverse,
    )


def make_solver(given: Solve) -> dfx.AbstractSolver:
    """The solver with laws restored after its steps, where that is to be done."""
    stepper, _ = _stepper_and_controller(given)
    return _with_projection(stepper, given.settings, given.equation, given.grid)


def _solve(given: Solve, saveat: dfx.SaveAt, options: Options) -> dfx.Solution:
    settings, span, equation = given.settings, given.span, given.equation
    stepper, controller = _stepper_and_controller(given)
    solution = dfx.diffeqsolve(
        make_terms(equation, given.dynamics, settings, given.grid),
        _with_projection(stepper, settings, equation, given.grid),
        span.t0,
        span.t1,
        settings.dt0,
        equation.start,
        args=equation.args,
        saveat=saveat,
        stepsize_controller=options.for_trial(controller, settings, span),
        adjoint=options.adjoint,
        event=_event(options.adjoint, settings),
        max_steps=options.max_steps,
        throw=False,
        progress_meter=given.meter,
    )
    if not _takes_unstable_steps(settings):
        return solution
    # A slope is of no use at the end, and is another one where a tangent is followed.
    return _without_slopes(solution)


def _takes_unstable_steps(settings: Settings) -> bool:
    """Whether stability alone may bound the steps, whose sizes are homoflow's to choose."""
    solver = as_flow_solver(settings.solver)
    is_ours = settings.controller is None and not settings.is_averaging
    is_plain = not (solver.uses_memory or solver.scales_errors)
    return is_ours and is_plain and solver.is_explicit


def _solve_with_tangent_control(
    given: Solve, saveat: dfx.SaveAt, options: Options
) -> dfx.Solution:
    controlled = TangentControl(given.settings.solver)
    settings = dataclasses.replace(given.settings, solver=controlled)
    return _solve(dataclasses.replace(given, settings=settings), saveat, options)


def _without_slopes(solution: dfx.Solution) -> dfx.Solution:
    state = solution.solver_state
    kept = state._replace(inner=None) if isinstance(state, ProjectedState) else None
    return eqx.tree_at(
        lambda s: s.solver_state, solution, kept, is_leaf=lambda leaf: leaf is None
    )


def _without_closures(given: Solve, saveat: dfx.SaveAt) -> tuple[Solve, dfx.SaveAt]:
    """The same with all numbers that a loss closes over, which JAX has to be shown."""
    equation = given.equation
    at = given.span.t0, equation.start, equation.args

    def convert(sub: dfx.SubSaveAt) -> dfx.SubSaveAt:
        if sub.fn is None or sub.ts is None:
            return sub
        return dataclasses.replace(sub, fn=eqx.filter_closure_convert(sub.fn, *at))

    field = eqx.filter_closure_convert(equation.field, *at)
    is_sub = lambda leaf: isinstance(leaf, dfx.SubSaveAt)  # noqa: E731
    subs = jax.tree.map(convert, saveat.subs, is_leaf=is_sub)
    given = dataclasses.replace(given, equation=equation._replace(field=field))
    return given, dataclasses.replace(saveat, subs=subs)


def _stepper_and_controller(
    given: Solve,
) -> tuple[dfx.AbstractSolver, dfx.AbstractStepSizeController]:
    settings, span, equation = given.settings, given.span, given.equation
    if settings.controller is not None:
        return settings.solver, settings.controller
    assert settings.rtol is not None
    assert settings.atol is not None
    assert settings.has_atol is not None
    default = settings.rtol * _scale(given.problem.weights)
    atol = jnp.where(settings.has_atol, settings.atol, default)
    # Steps that the clock cannot resolve lead nowhere: weights blow up in finite time.
    dtmin = jnp.finfo(span.t1.dtype).eps * span.t1
    if settings.max_forced_steps is not None:
        dtmin = (span.t1 - span.t0) / settings.max_forced_steps
    flow_solver = as_flow_solver(settings.solver)
    controller = flow_solver.make_controller(
        settings.rtol, atol, dtmin=dtmin, force_dtmin=settings.is_averaging
    )
    is_adaptive = isinstance(controller, dfx.AbstractAdaptiveStepSizeController)
    if flow_solver.lands_on_times and is_adaptive and not settings.is_averaging:
        # Where steps end is no part of the derivative by t1: from one recorded time to
        # the next, growth of the step size would amplify it without bound.
        step_ts = jax.lax.stop_gradient(span.times())
        clip = dfx.ClipStepSizeController(controller, step_ts=step_ts)
        controller = LandingController(clip)
    stepper = flow_solver.with_tolerances(settings.rtol, atol)
    if equation.curvature is not None:
        stepper = as_flow_solver(stepper).with_curvature(equation.curvature)
    return stepper, controller


def _with_projection(
    stepper: dfx.AbstractSolver, settings: Settings, equation: Equation, grid: TimeGrid
) -> dfx.AbstractSolver:
    """The solver with laws restored after its steps, where that is to be done."""
    orbit = equation.orbit
    if orbit is None or _remembers_much(stepper, equation):
        return stepper
    tolerated = _tolerated_drift(settings, grid)
    return ProjectedSolver(stepper, orbit, tolerated, settings.restores_steps)


def _scale(weights: PyTree) -> Float[Array, ""]:
    """Root mean square of the weights; 1 where they are all zero."""
    leaves = jax.tree.leaves(jax.lax.stop_gradient(weights))
    square = jnp.sum(jnp.stack([jnp.sum(w**2) for w in leaves]))
    mean = square / sum(w.size for w in leaves)
    return jnp.sqrt(jnp.where(mean > 0, mean, 1))


def _tolerated_drift(settings: Settings, grid: TimeGrid) -> Float[Array, ""]:
    """The drift, relative to ‖w‖², that may wait for the next step to be undone."""
    if settings.rtol is None:
        return jnp.zeros_like(grid.t1)
    return _TOLERATED_DRIFT * settings.rtol


def _remembers_much(solver: dfx.AbstractSolver, equation: Equation) -> bool:
    numbers = as_flow_solver(solver).num_remembered(equation.start.size)
    return numbers > _MAX_REMEMBERED


def _event(adjoint: dfx.AbstractAdjoint, settings: Settings) -> dfx.Event | None:
    # Where steps can be rejected those that are not finite are; and an event has what is
    # interpolated with copied in each step.
    can_reject = settings.controller is None and not settings.is_averaging
    if isinstance(adjoint, dfx.BacksolveAdjoint) or can_reject:
        return None

    def is_nonfinite(t, y, args, **kwargs):
        del t, args, kwargs
        return ~all_finite(y)

    return dfx.Event(is_nonfinite)
