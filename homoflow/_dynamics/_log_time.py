"""Gradient flow of a loss of exponential type, in logarithmic time."""

from typing import final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._jax._compilation import fast_compile_jit
from .._problem._log_risk import LogRisk, against_log_risk, log_risk, sample_margins
from .._problem._losses import Risk
from .._problem._problem import Problem
from ._base import AbstractDynamics, Descent, State

#: σ is not made for more: (1 + s)^(1/degree) would hardly grow.
MAX_DEGREE = 20.0


@final
class LogTime(AbstractDynamics):
    """dw/dt = −∇L(w) in s = log(1 + t/`time_unit`),

        dw/ds = −(t + `time_unit`) ∇L = −exp(s + log `time_unit` + log L) ∇log L,

    and that in σ = (1 + s)^(1/`degree`) − 1, the variable of integration.

    On separable data L falls like 1/t, so that the right-hand side in s stays of order
    one, and every number in it is a number however late t is. The weights of a model of
    that degree of homogeneity grow like s^(1/degree), which is linearly in σ: so long
    steps can be linear steps. Another degree costs steps, and changes no result.
    """

    time_unit: Float[Array, ""]
    degree: Float[Array, ""]

    @property
    def name(self) -> str:
        return "gradient flow, in logarithmic time"

    @property
    def conserves_laws(self) -> bool:
        return True

    @property
    def stays_stiff(self) -> bool:
        return True

    def check(self, problem: Problem) -> None:
        reason = against_log_risk(problem)
        if reason is None and problem.dtype != jnp.float64:
            reason = (
                f"the weights are {problem.dtype.name}, in which margins that grow with "
                "log t are soon known to no digit: use float64 "
                "(`jax.config.update('jax_enable_x64', True)`)"
            )
        if reason is not None:
            raise ValueError(f"Logarithmic time is not for this problem: {reason}.")

    def descent(self, problem: Problem) -> Descent:
        assert isinstance(problem.objective, Risk)
        return Descent(LogRisk(problem.objective), self.pace, jnp.exp)

    def pace(self, t: Float[Array, ""], log_loss: Float[Array, ""]) -> Array:
        """How fast the weights move along −∇log L, in σ."""
        s = self.s_of(t)
        growth = self.degree * (1 + s) / (1 + t)
        return growth * jnp.exp(s + jnp.log(self.time_unit) + log_loss)

    def clock(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.time_unit * jnp.expm1(self.s_of(t))

    def s_of(self, sigma: Float[Array, "..."]) -> Float[Array, "..."]:
        """s at σ."""
        return jnp.expm1(self.degree * jnp.log1p(sigma))

    def sigma_at(self, log_t: Float[Array, "..."]) -> Float[Array, "..."]:
        """σ at the logarithm of a time."""
        return self.sigma_of(jax.nn.softplus(log_t - jnp.log(self.time_unit)))

    def sigma_of(self, s: Float[Array, "..."]) -> Float[Array, "..."]:
        """σ at s."""
        return jnp.expm1(jnp.log1p(s) / self.degree)

    def velocity(self, problem: Problem, t: Float[Array, ""], state: State) -> State:
        value, slope = jax.value_and_grad(lambda w: log_risk(problem, w))(state)
        pace = self.pace(t, value)
        return jax.tree.map(lambda g: -pace * g, slope)


@fast_compile_jit
def degree_of(problem: Problem) -> Float[Array, ""]:
    """The degree of homogeneity of the margins at the weights, by Euler's identity.

    ⟨∇m, w⟩ = degree·m for every margin m. Of margins that are not homogeneous it is one
    that fits best, at least 1, as it is where the loss is of another kind.
    """
    if against_log_risk(problem) is not None:
        return jnp.ones((), problem.dtype)

    def half_square(w):
        return 0.5 * jnp.sum(sample_margins(problem, w) ** 2)

    w = problem.weights
    size, along = jax.jvp(half_square, (w,), (w,))
    is_known = size > 0
    degree = along / jnp.where(is_known, 2 * size, 1)
    return jnp.clip(jnp.where(is_known, degree, 1), 1, MAX_DEGREE)
