"""The flow of a heavy ball: gradient descent with momentum, with mass and friction."""

from typing import Any, NamedTuple, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._jax._arrays import in_units, tree_norm
from .._jax._tracing import is_concrete
from .._laws import Laws, Rotation, rotations_of, torque
from .._observe._base import AbstractObservable, FunctionOfPoint, Point
from .._observe._recorder import LawValues, LawViolation
from .._problem._checks import (
    as_coefficient,
    check_learning_rate,
    check_mass,
    check_momentum,
)
from .._problem._problem import Problem
from .._results._status import RESULTS
from ._base import AbstractDynamics


class HeavyBallState(NamedTuple):
    """Weights, and m·dw/dt, which is as large as weights."""

    weights: PyTree
    impulse: PyTree


@final
class HeavyBall(AbstractDynamics):
    """m·d²w/dt² + dw/dt = −∇L(w).

    The equation of `homoflow.heavy_ball_flow`, which says more about it and about the
    arguments: either a `mass`, with a `velocity` at the start, or the `learning_rate` and
    `momentum` of the descent to follow.
    """

    mass: Float[Array, ""] | None = eqx.field(
        default=None, converter=as_coefficient(check_mass)
    )
    velocity_at_start: PyTree | None = None
    learning_rate: Float[Array, ""] | None = eqx.field(
        default=None, converter=as_coefficient(check_learning_rate)
    )
    momentum: Float[Array, ""] | None = eqx.field(
        default=None, converter=as_coefficient(check_momentum)
    )

    def __check_init__(self):
        of_descent = (self.learning_rate, self.momentum)
        both = all(number is not None for number in of_descent)
        neither = all(number is None for number in of_descent)
        if not ((self.mass is None and both) or (self.mass is not None and neither)):
            raise ValueError(
                "Give either `mass`, or both `learning_rate` and `momentum`, which "
                "determine the mass."
            )
        if self.velocity_at_start is not None and self.mass is None:
            raise ValueError(
                "`velocity` goes with `mass`: descent with momentum starts from rest."
            )

    @property
    def name(self) -> str:
        return "heavy-ball flow"

    @property
    def uses_samples(self) -> bool:
        return False

    def check(self, problem: Problem) -> None:
        if self.velocity_at_start is None:
            return
        arrays = jax.tree.leaves(self._checked_velocity(problem))
        if is_concrete(arrays) and not all(
            bool(jnp.all(jnp.isfinite(a))) for a in arrays
        ):
            raise ValueError("`velocity` contains NaN or inf.")

    def init(self, problem: Problem) -> HeavyBallState:
        mass = self._mass(problem.dtype)
        push = self._push(problem.dtype)
        velocity = jax.tree.map(jnp.zeros_like, problem.weights)
        if self.velocity_at_start is not None:
            velocity = self._checked_velocity(problem)
        impulse = jax.tree.map(
            lambda v, g: mass * (v + push * g),
            velocity,
            jax.grad(problem.loss)(problem.weights),
        )
        return HeavyBallState(problem.weights, impulse)

    def weights(self, state: HeavyBallState) -> PyTree:
        return state.weights

    def velocity(
        self, problem: Problem, t: Float[Array, ""], state: HeavyBallState
    ) -> HeavyBallState:
        del t
        gradient = jax.grad(problem.loss)(state.weights)
        moving = self._velocity_in(state)
        force = jax.tree.map(lambda g, v: -g - v, gradient, moving)
        return HeavyBallState(moving, force)

    def observables(self, laws: Laws) -> dict[str, AbstractObservable]:
        rotations = rotations_of(laws)
        return {
            "laws": FunctionOfPoint(
                function=_LawsAndCharges(LawValues(laws), rotations, self)
            ),
            "law_violation": FunctionOfPoint(
                function=_Violation(LawViolation(laws), rotations)
            ),
        }

    def stats(
        self, numbers: dict[str, Array], observed: dict[str, Any]
    ) -> dict[str, Array]:
        del observed
        return {"mass": self._mass(numbers["time_reached"].dtype)}

    def input_error(self) -> RESULTS:
        mass, push = self._mass(jnp.result_type(float)), self._push(jnp.float32)
        is_valid = jnp.isfinite(mass) & (mass > 0) & jnp.isfinite(push)
        return RESULTS.where(is_valid, RESULTS.successful, RESULTS.bad_coefficient)

    def _velocity_in(self, state: HeavyBallState) -> PyTree:
        mass = self._mass(jax.tree.leaves(state.weights)[0].dtype)
        return jax.tree.map(lambda p: p / mass, state.impulse)

    def _mass(self, dtype: Any) -> Array:
        if self.mass is not None:
            return jnp.asarray(self.mass, dtype)
        eta, mu = jnp.asarray(self.learning_rate, dtype), self._valid_momentum(dtype)
        return eta * (1 + mu) / (2 * (1 - mu) ** 2)

    def _push(self, dtype: Any) -> Array:
        """dw/dt at the start, in multiples of ∇L."""
        if self.mass is not None:
            return jnp.zeros((), dtype)
        mu = self._valid_momentum(dtype)
        return -(1 - mu) / (1 + mu)

    def _valid_momentum(self, dtype: Any) -> Array:
        # Out of range under a trace, it must not turn out as a mass that makes sense.
        mu = jnp.asarray(self.momentum, dtype)
        return jnp.where((mu >= 0) & (mu < 1), mu, jnp.nan)

    def _checked_velocity(self, problem: Problem) -> PyTree:
        weights = problem.weights
        try:
            chosen = eqx.filter(self.velocity_at_start, problem.mask)
        except ValueError:
            chosen = None
        places = jax.tree_util.tree_leaves_with_path(chosen)
        wanted = jax.tree_util.tree_leaves_with_path(weights)
        shapes, wanted_shapes = (
            {path: jnp.shape(leaf) for path, leaf in leaves}
            for leaves in (places, wanted)
        )
        if shapes != wanted_shapes:
            raise ValueError(
                "`velocity` must be a pytree like `model`, with an array of the same "
                "shape in place of every trained one."
            )
        arrays = [jnp.asarray(leaf, problem.dtype) for _, leaf in places]
        return jax.tree.unflatten(jax.tree.structure(weights), arrays)


@final
class _LawsAndCharges(eqx.Module):
    """The laws of gradient flow, and the charges of rotations beside them."""

    laws: LawValues
    rotations: tuple[Rotation, ...]
    ball: HeavyBall

    def __call__(self, point: Point) -> dict[str, Array]:
        moving = self.ball._velocity_in(point.state)
        charges = {r.name: r.value(point.weights, moving) for r in self.rotations}
        return {**self.laws(point), **charges}


@final
class _Violation(eqx.Module):
    """How far L is from what the laws and the charges need of it."""

    laws: LawViolation
    rotations: tuple[Rotation, ...]

    def __call__(self, point: Point) -> Array:
        violation = self.laws(point)
        if not self.rotations:
            return violation
        w, gradient = in_units(point.weights), in_units(point.gradient)
        scale = 2 * tree_norm(w) * tree_norm(gradient)
        turning = torque(self.rotations, w, gradient)
        turning = turning / jnp.where(scale > 0, scale, 1)
        return jnp.maximum(violation, jax.lax.stop_gradient(turning))
