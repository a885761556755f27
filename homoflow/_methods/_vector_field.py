"""A problem's dynamics as an equation for one plain vector, for Diffrax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from .._dynamics._base import AbstractDynamics, GradientFlow
from .._kinks import KinkShare, as_system
from .._observe._observables import observe
from .._problem._losses import is_squared
from .._problem._problem import Problem
from .._problem._residual_jacobian import residual_slopes
from .._rescaling import RescalingGroup
from ._diffrax_options import Method


class Equation(NamedTuple):
    """dv/dt = `field`(t, v, args), v(0) = `start`, for the state's leaves in a vector v.

    A Runge–Kutta method combines its stages leaf by leaf, and under `vmap` each leaf's
    stages are copied to where a matrix product wants them: for one vector that is done in
    half the time that a network's leaves take.

    - `args`: all numbers of the problem: Diffrax differentiates with respect to them, not
        to what a closure holds.
    - `restored`: `(v, args)` to v with the laws' initial values: between steps a solver
        interpolates, whatever the laws.
    - `record`: `(t, v, args)` to the observables, what the dynamics watch, and the
        weights if they are to be saved.
    - `curvature`: `(t, v, args)` to the rows of ∂r/∂w, where the field is −∇½‖r‖².
    - `weights`: those in v.
    - `orbit`: along which laws are kept, if any.
    """

    start: Float[Array, " size"]
    args: tuple[list[Array], Any, Any]
    field: Callable[..., Array]
    restored: Callable[..., Array]
    record: Callable[..., Any]
    curvature: Callable[..., Array] | None
    weights: Callable[[Array], PyTree]
    orbit: RescalingGroup | None


def equation_of(
    problem: Problem, dynamics: AbstractDynamics, method: Method, save_models: bool
) -> Equation:
    weights = problem.weights
    start, unravel = ravel_pytree(dynamics.start(problem, weights))
    posed = eqx.tree_at(lambda p: p.weights, problem, None)
    arrays, fixed = eqx.partition((posed, dynamics), eqx.is_array)
    given, places = jax.tree.flatten(arrays)
    orbit = RescalingGroup(method.kept, weights, unravel) if method.kept else None

    def known(given: list[Array]) -> tuple[Problem, AbstractDynamics]:
        return eqx.combine(jax.tree.unflatten(places, given), fixed)

    def field(t, v, args):
        del t
        posed, dynamics = known(args[0])
        return ravel_pytree(dynamics.velocity(posed, unravel(v)))[0]

    def restored(v, args):
        return v if orbit is None else orbit.project(v, args[2]).projected

    def record(t, v, args):
        del t
        posed, dynamics = known(args[0])
        state = unravel(v)
        w = dynamics.weights(state)
        value, gradient = jax.value_and_grad(posed.loss)(w)
        seen = observe(problem.laws, w, value, gradient)
        return seen, dynamics.watch(posed, state), (w if save_models else None)

    def curvature(t, v, args):
        del t
        posed, dynamics = known(args[0])
        slopes = residual_slopes(posed, dynamics.weights(unravel(v)))
        return jax.vmap(lambda row: ravel_pytree(row)[0])(slopes)

    has_residuals = isinstance(dynamics, GradientFlow) and is_squared(problem.objective)
    system = as_system(problem) if isinstance(method.solver, KinkShare) else None
    return Equation(
        start,
        (given, system, None if orbit is None else orbit.values(start)),
        field,
        restored,
        record,
        curvature if has_residuals else None,
        lambda v: dynamics.weights(unravel(v)),
        orbit,
    )
