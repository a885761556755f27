"""The flow that gradient descent follows to second order in its learning rate."""

from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._jax._tracing import is_concrete
from .._laws import Laws
from .._observe._base import AbstractObservable
from .._observe._sharpness import Sharpness
from .._problem._checks import as_coefficient, check_learning_rate, check_momentum
from .._problem._problem import Problem
from .._problem._smoothness import kinks_of
from .._results._status import RESULTS
from .._results._trajectory import Trajectory
from ._base import AbstractDynamics, State
from ._expansion import (
    error_in_descent,
    start_of_slow_motion,
    warn_unless_trajectory_expands,
)


@final
class Modified(AbstractDynamics):
    """dw/dt = −∇L − (η̃/2) ∇²L ∇L, with η̃ = η(1+μ)/(1−μ)² for heavy ball.

    The equation of `homoflow.modified_flow`, which says more about it.
    """

    learning_rate: Float[Array, ""] = eqx.field(
        converter=as_coefficient(check_learning_rate)
    )
    momentum: Float[Array, ""] = eqx.field(
        default=0.0, converter=as_coefficient(check_momentum)
    )

    @property
    def name(self) -> str:
        return "modified flow"

    @property
    def uses_samples(self) -> bool:
        return False

    @property
    def has_memory(self) -> bool:
        momentum = self.momentum
        return not (is_concrete(momentum) and bool(jnp.asarray(momentum) == 0))

    def obstacle(self, problem: Problem) -> str | None:
        kinks = kinks_of(problem)
        if not kinks:
            return None
        return (
            f"The gradient jumps at {', '.join(kinks)}: there is no expansion in the "
            "learning rate there, since each crossing of a kink adds an error of first "
            "order that depends on where in a step it falls. Take a smooth model, "
            "`homoflow.flow`, or `homoflow.predict_drift` for an approximate account of "
            "the laws. If there are no kinks all the same, pass a `solver`, such as "
            "`diffrax.Dopri8()`."
        )

    def init(self, problem: Problem) -> State:
        """The start of the slow motion that heavy ball settles to."""
        return start_of_slow_motion(problem, *self._coefficients(problem.weights))

    def velocity(self, problem: Problem, t: Float[Array, ""], state: State) -> State:
        del t
        eta, mu = self._coefficients(state)
        half = eta * (1 + mu) / (1 - mu) ** 2 / 2
        gradient, product = jax.linearize(jax.grad(problem.loss), state)
        return jax.tree.map(lambda g, hg: -g - half * hg, gradient, product(gradient))

    def observables(self, laws: Laws) -> dict[str, AbstractObservable]:
        del laws
        return {"sharpness": Sharpness()}

    def stats(
        self, numbers: dict[str, Array], observed: dict[str, Any]
    ) -> dict[str, Array]:
        products = jnp.nansum(observed["sharpness"].num_products)
        if "gradient_evaluations" in numbers:
            products = products + numbers["gradient_evaluations"]
        return {"hessian_vector_products": products}

    def warn(self, trajectory: Trajectory) -> None:
        warn_unless_trajectory_expands(trajectory, self.learning_rate, self.momentum)

    def input_error(self) -> RESULTS:
        return error_in_descent(self.learning_rate, self.momentum)

    def _coefficients(self, state: State) -> tuple[Array, Array]:
        dtype = jax.tree.leaves(state)[0].dtype
        return jnp.asarray(self.learning_rate, dtype), jnp.asarray(self.momentum, dtype)
