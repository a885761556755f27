"""Gradient flow, with the integrals that predict how descent will move its laws."""

from typing import Any, NamedTuple, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._jax._arrays import tree_norm_of_any_size
from .._laws import Laws
from .._observe._base import AbstractObservable, FunctionOfPoint, Point
from .._observe._sharpness import Sharpness
from .._problem._losses import Risk
from .._problem._problem import Problem
from .._results._stats import DIFFERENCE_SAFETY
from ._base import AbstractDynamics

#: Samples whose gradients are in memory at one time.
_CHUNK = 64


class DriftState(NamedTuple):
    """Weights and integrals, which are kept in units that make them as large as weights."""

    weights: PyTree
    mean: dict[str, Array]
    noise: dict[str, Array] | None
    unit: Float[Array, ""]


class DriftIntegrals(NamedTuple):
    """∫q(∇L) dt of every law and, if asked for, ∫tr(A S) dt."""

    mean: dict[str, Array]
    noise: dict[str, Array] | None


@final
class FlowWithDrift(AbstractDynamics):
    """dw/dt = −∇L(w), with ∫q(∇L) and, with `has_noise`, ∫tr(A S) of every law."""

    laws: Laws
    has_noise: bool = eqx.field(static=True)

    @property
    def name(self) -> str:
        return "gradient flow with integrals of the drift"

    @property
    def uses_samples(self) -> bool:
        return self.has_noise

    def init(self, problem: Problem) -> DriftState:
        weights = problem.weights
        speed = tree_norm_of_any_size(jax.grad(problem.loss)(weights))
        # ∫|∇L|² is about |∇L||w| where weights move as far as they are long.
        unit = speed * jnp.sqrt(jnp.asarray(problem.num_weights, speed.dtype))
        unit = jax.lax.stop_gradient(unit)
        zeros = jax.tree.map(jnp.zeros_like, self.laws.values(weights))
        return DriftState(
            weights,
            zeros,
            zeros if self.has_noise else None,
            jnp.where(unit > 0, unit, 1),
        )

    def weights(self, state: DriftState) -> PyTree:
        return state.weights

    def velocity(
        self, problem: Problem, t: Float[Array, ""], state: DriftState
    ) -> DriftState:
        del t

        def of_all(square):
            # One zero stands for all components of a law that is linear.
            return jax.tree.map(
                lambda q, i: jnp.broadcast_to(q, i.shape), square, state.mean
            )

        gradient = jax.grad(problem.loss)(state.weights)
        square = self._quadratic(gradient, state.unit)
        noise = None
        if self.has_noise:
            each = self._mean_square(problem, state)
            noise = of_all(jax.tree.map(jnp.subtract, each, square))
        velocity = jax.tree.map(jnp.negative, gradient)
        return DriftState(velocity, of_all(square), noise, jnp.zeros_like(state.unit))

    def observables(self, laws: Laws) -> dict[str, AbstractObservable]:
        del laws
        return {"drift": FunctionOfPoint(function=_integrals), "sharpness": Sharpness()}

    def error_figures(
        self, observed: dict[str, Any], coarse: dict[str, Any]
    ) -> dict[str, Array]:
        fine, rough = observed["drift"], coarse["drift"]
        return {"drift_error_estimate": _relative_difference(fine, rough)}

    def _quadratic(self, gradient: PyTree, unit: Array) -> dict[str, Array]:
        """q(g) in that unit: divided first, since small gradients' squares are 0."""
        root = jnp.sqrt(unit)
        scaled = jax.tree.map(lambda g: g / root, gradient)
        return {law.name: law.quadratic(scaled) for law in self.laws}

    def _mean_square(self, problem: Problem, state: DriftState) -> dict[str, Array]:
        """The mean over samples of q(∇L_i), where L is the mean of the L_i."""
        risk, count = problem.objective, problem.num_samples
        assert isinstance(risk, Risk)
        assert count is not None
        scale = 1 if risk.is_mean else count

        def square_at(sample: tuple[Any, Array]) -> dict[str, Array]:
            x, y = sample

            def loss(weights):
                return scale * risk.loss(problem.model_at(weights)(x), y)

            return self._quadratic(jax.grad(loss)(state.weights), state.unit)

        each = jax.lax.map(square_at, problem.data, batch_size=min(count, _CHUNK))
        return jax.tree.map(lambda q: jnp.mean(q, axis=0), each)


def _integrals(point: Point) -> DriftIntegrals:
    state = point.state
    mean, noise = jax.tree.map(lambda i: i * state.unit, (state.mean, state.noise))
    return DriftIntegrals(mean, noise)


def _relative_difference(fine: DriftIntegrals, coarse: DriftIntegrals) -> Array:
    """Twice the largest difference of the integrals, each relative to its law's largest."""

    def relative(a, b):
        size = jnp.max(jnp.abs(a))
        return jnp.max(jnp.abs(a - b)) / jnp.where(size > 0, size, 1)

    differences = jax.tree.leaves(jax.tree.map(relative, fine, coarse))
    if not differences:
        return jnp.zeros(())
    worst = jnp.max(jnp.stack(differences), initial=0)
    return DIFFERENCE_SAFETY * jax.lax.stop_gradient(worst)
