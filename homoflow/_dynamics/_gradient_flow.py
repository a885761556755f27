"""Gradient flow, perhaps with weight decay."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._problem._checks import as_coefficient, check_weight_decay
from .._problem._problem import Problem
from .._results._status import RESULTS
from ._base import AbstractDynamics, State


@final
class GradientFlow(AbstractDynamics):
    """dw/dt = −∇L(w), or −∇L(w) − λw with a `weight_decay` λ.

    With weight decay nothing is conserved: wᵀAw decays as e^{−2λt} and bᵀw as e^{−λt}, so
    that e^{2λt}·wᵀAw and e^{λt}·bᵀw are constant [Kunin et al. 2021]. Laws are recorded
    as they are; losses and gradient norms are those of L alone. It is the limit of
    descent with weight decay: with momentum μ, of decay that is coupled (added to the
    gradient). Decay that is decoupled (added to the velocity) has the limit (1 − μ)λ,
    because a step takes time η/(1−μ).

    ```python
    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    run = hf.flow(model, (x, x[:, :1]), 1.0, dynamics=hf.GradientFlow(weight_decay=0.1))
    ```
    """

    weight_decay: Float[Array, ""] | None = eqx.field(
        default=None, converter=as_coefficient(check_weight_decay)
    )

    @property
    def name(self) -> str:
        if self.weight_decay is None:
            return "gradient flow"
        return "gradient flow with weight decay"

    @property
    def is_gradient_flow(self) -> bool:
        return True

    @property
    def conserves_laws(self) -> bool:
        return self.weight_decay is None

    @property
    def uses_samples(self) -> bool:
        return False

    def velocity(self, problem: Problem, t: Float[Array, ""], state: State) -> State:
        del t
        gradient = jax.grad(problem.loss)(state)
        if self.weight_decay is None:
            return jax.tree.map(jnp.negative, gradient)
        decay = self.weight_decay
        return jax.tree.map(
            lambda g, w: -g - decay.astype(w.dtype) * w, gradient, state
        )

    def input_error(self) -> RESULTS:
        if self.weight_decay is None:
            return RESULTS.successful
        decay = self.weight_decay
        is_valid = jnp.isfinite(decay) & (decay >= 0)
        return RESULTS.where(is_valid, RESULTS.successful, RESULTS.bad_coefficient)
