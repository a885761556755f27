"""A task as an equation for one plain vector, for Diffrax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from .._dynamics._base import AbstractDynamics, AbstractStochasticDynamics
from .._observe._base import Point
from .._observe._recorder import Recorder
from .._observe._time_grid import TimeGrid
from .._problem._losses import is_squared
from .._problem._problem import Problem
from .._problem._residual_jacobian import residual_slopes
from .._rescaling import RescalingGroup
from .._solvers import as_flow_solver
from ._settings import Settings

#: The resolution of a Brownian path, relative to the constant step, or to the length of
#: the run where steps are adaptive.
_PATH_TOLERANCE = 2.0**-4
_ADAPTIVE_PATH_TOLERANCE = 2.0**-16


class Equation(NamedTuple):
    """dv/dt = `field`(t, v, args), v(t0) = `start`, for the state's leaves in a vector v.

    A Runge–Kutta method combines its stages leaf by leaf, and under `vmap` each leaf's
    stages are copied to where a matrix product wants them: for one vector that is done in
    half the time that a network's leaves take.

    - `args`: all numbers of the problem, what the solver needs of it, the laws' initial
        values, and what observables start from. Diffrax differentiates with respect to
        these, not to what a closure holds.
    - `restore_laws`: `(v, args)` to v with the laws' initial values: between steps a
        solver interpolates, whatever the laws.
    - `point_at`: `(t, v, args)` to the point that observables see, and their recorder.
    - `curvature`: `(t, v, args)` to the rows of ∂r/∂w, where the field is −∇½‖r‖².
    - `weights`: those in v.
    - `noise`: `(t, v, args)` to the factors of dB, for stochastic dynamics.
    - `orbit`: along which laws are restored, if any; `recorder`: of the observables.
    """

    start: Float[Array, " size"]
    args: tuple[list[Array], Any, Any, Any]
    field: Callable[..., Array]
    restore_laws: Callable[..., Array]
    point_at: Callable[..., tuple[Point, Recorder]]
    curvature: Callable[..., Array] | None
    weights: Callable[[Array], PyTree]
    noise: Callable[..., Array] | None
    orbit: RescalingGroup | None
    recorder: Recorder


def make_equation(
    problem: Problem,
    shown: Problem | None,
    dynamics: AbstractDynamics,
    recorder: Recorder,
    settings: Settings,
    grid: TimeGrid,
) -> Equation:
    """The equation; observables see the data of `shown`, or of the problem itself."""
    start, unravel = ravel_pytree(dynamics.init(problem))
    numbers, unpack = _pack(problem, shown, dynamics, recorder)
    orbit = _make_orbit(settings, problem.weights, unravel)

    def field(t, v, args):
        problem, _, dynamics, _ = unpack(args)
        return ravel_pytree(dynamics.velocity(problem, t, unravel(v)))[0]

    def restore_laws(v, args):
        return v if orbit is None else orbit.project(v, args[2]).projected

    def point_at(t, v, args):
        problem, shown, dynamics, recorder = unpack(args)
        state = unravel(v)
        w = dynamics.weights(state)
        loss, gradient = jax.value_and_grad(problem.loss)(w)
        at, pace = _clock_and_pace(dynamics, grid, t)

        def compute_velocity():
            of_state = dynamics.velocity(problem, t, state)
            of_weights = dynamics.weights_velocity(state, of_state)
            return jax.tree.map(lambda v: v / pace.astype(v.dtype), of_weights)

        return Point(at, shown, w, loss, gradient, state, compute_velocity), recorder

    def curvature(_, v, args):
        problem, _, dynamics, _ = unpack(args)
        slopes = residual_slopes(problem, dynamics.weights(unravel(v)))
        return jax.vmap(lambda row: ravel_pytree(row)[0])(slopes)

    def noise(t, v, args):
        problem, _, dynamics, _ = unpack(args)
        assert isinstance(dynamics, AbstractStochasticDynamics)
        return ravel_pytree(dynamics.noise(problem, t, unravel(v)))[0]

    has_residuals = dynamics.is_gradient_flow and is_squared(problem.objective)
    is_stochastic = isinstance(dynamics, AbstractStochasticDynamics)
    of_solver = as_flow_solver(settings.solver).problem_args(problem)
    targets = None if orbit is None else orbit.values(start)
    carries = recorder.start(lambda: point_at(grid.t0, start, (numbers,))[0])
    return Equation(
        start,
        (numbers, of_solver, targets, carries),
        field,
        restore_laws,
        point_at,
        curvature if has_residuals else None,
        lambda v: dynamics.weights(unravel(v)),
        noise if is_stochastic else None,
        orbit,
        recorder,
    )


def _clock_and_pace(
    dynamics: AbstractDynamics, grid: TimeGrid, t: Array
) -> tuple[Array, Array]:
    """What the clock shows at t of the grid, and how fast it goes there."""
    return jax.jvp(
        lambda t: dynamics.clock(grid.on_clock(t)), (t,), (jnp.ones_like(t),)
    )


def _make_orbit(
    settings: Settings, weights: PyTree, unravel: Callable[[Array], PyTree]
) -> RescalingGroup | None:
    laws, translations = settings.restored_laws, settings.translations
    return RescalingGroup(laws, weights, unravel, translations) if laws else None


def _pack(
    problem: Problem,
    shown: Problem | None,
    dynamics: AbstractDynamics,
    recorder: Recorder,
) -> tuple[list[Array], Callable[[Any], tuple[Problem, Problem, Any, Recorder]]]:
    """All numbers as a list, and a function from `args` back to what they are part of."""
    if shown is not None:
        shown = _without_weights(shown)
    known = (_without_weights(problem), shown, dynamics, recorder)
    arrays, static = eqx.partition(known, eqx.is_array)
    numbers, structure = jax.tree.flatten(arrays)

    def unpack(args):
        arrays = jax.tree.unflatten(structure, args[0])
        problem, shown, dynamics, recorder = eqx.combine(arrays, static)
        return problem, problem if shown is None else shown, dynamics, recorder

    return numbers, unpack


def make_terms(
    equation: Equation, dynamics: AbstractDynamics, settings: Settings, grid: TimeGrid
) -> dfx.AbstractTerm:
    """The equation as Diffrax's terms: a drift, and noise where there is any."""
    drift = dfx.ODETerm(equation.field)
    if equation.noise is None:
        return drift
    assert isinstance(dynamics, AbstractStochasticDynamics)
    factors, v = equation.noise, equation.start
    step = settings.dt0 if settings.controller is not None else None
    tolerance = (grid.t1 - grid.t0) * _ADAPTIVE_PATH_TOLERANCE
    if step is not None:
        tolerance = step * _PATH_TOLERANCE
    path = dfx.VirtualBrownianTree(
        grid.t0,
        grid.t1,
        tol=tolerance,
        shape=jax.ShapeDtypeStruct(v.shape, v.dtype),
        key=dynamics.key,
        levy_area=getattr(settings.solver, "minimal_levy_area", dfx.BrownianIncrement),
    )
    diffusion = dfx.ControlTerm(
        lambda t, v, args: lx.DiagonalLinearOperator(factors(t, v, args)), path
    )
    return dfx.MultiTerm(drift, diffusion)


def _without_weights(problem: Problem) -> Problem:
    """The problem without its own weights: those are in the state."""
    return eqx.tree_at(lambda p: p.weights, problem, None)
