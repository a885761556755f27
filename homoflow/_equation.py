"""A problem's dynamics as an equation between plain vectors, for Diffrax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from ._curvature import residual_slopes
from ._dynamics import AbstractDynamics, GradientFlow
from ._flattening import Flattening, Vectors
from ._kinks import KinkShare, as_system
from ._losses import is_squared
from ._method import Method
from ._observables import observe
from ._orbits import Orbit
from ._problem import Problem


class Equation(NamedTuple):
    """dv/dt = `field`(t, v, args), v(0) = `start`, for the state's leaves in vectors v.

    - `args`: all numbers of the problem: Diffrax differentiates with respect to them, not
        to what a closure holds.
    - `record`: `(t, v, args)` to the observables, what the dynamics watch, and the
        weights if they are to be saved.
    - `curvature`: `(t, v, args)` to the rows of ∂r/∂w, where the field is −∇½‖r‖².
    - `weights`: those in v.
    - `orbit`: along which laws are kept, if any.
    """

    start: Vectors
    args: tuple[list[Array], Any, Any]
    field: Callable[..., Vectors]
    record: Callable[..., Any]
    curvature: Callable[..., Vectors] | None
    weights: Callable[[Vectors], PyTree]
    orbit: Orbit | None


def equation_of(
    problem: Problem, dynamics: AbstractDynamics, method: Method, save_models: bool
) -> Equation:
    weights = problem.weights()
    state = dynamics.start(problem, weights)
    flattening = Flattening(state)
    start = flattening.flat(state)
    posed = eqx.tree_at(lambda p: p.model, problem, problem.frozen())
    arrays, fixed = eqx.partition((posed, dynamics), eqx.is_array)
    given, places = jax.tree.flatten(arrays)
    orbit = Orbit(method.kept, weights, flattening) if method.kept else None

    def known(given: list[Array]) -> tuple[Problem, AbstractDynamics]:
        return eqx.combine(jax.tree.unflatten(places, given), fixed)

    def field(t, vectors, args):
        del t
        posed, dynamics = known(args[0])
        return flattening.flat(dynamics.velocity(posed, flattening.tree(vectors)))

    def record(t, vectors, args):
        del t
        posed, dynamics = known(args[0])
        if orbit is not None:
            # Between steps a solver interpolates, whatever the laws.
            vectors = orbit.restoring(vectors, args[2]).restored
        state = flattening.tree(vectors)
        w = dynamics.weights(state)
        value, gradient = jax.value_and_grad(posed.loss)(w)
        seen = observe(problem.laws, w, value, gradient)
        return seen, dynamics.watch(posed, state), (w if save_models else None)

    def curvature(t, vectors, args):
        del t
        posed, dynamics = known(args[0])
        w = dynamics.weights(flattening.tree(vectors))
        return jax.vmap(flattening.flat)(residual_slopes(posed, w))

    has_residuals = isinstance(dynamics, GradientFlow) and is_squared(problem.objective)
    system = as_system(problem) if isinstance(method.solver, KinkShare) else None
    return Equation(
        start,
        (given, system, None if orbit is None else orbit.values(start)),
        field,
        record,
        curvature if has_residuals else None,
        lambda vectors: dynamics.weights(flattening.tree(vectors)),
        orbit,
    )
