"""Gradient flow in the logarithms of the weights, for starts that vanish."""

from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from .._jax._compilation import fast_compile_jit
from .._jax._precision import full_matmul_precision
from .._jax._tracing import is_concrete_call
from .._problem._problem import Problem
from .._problem._smoothness import kinks_of
from ._base import AbstractDynamics, State

#: The logarithm of the smallest weight at which growth rates are evaluated: its square is
#: a number, and too small to matter beside 1.
_LOWEST = -300.0
#: How far the loss may change, relative to it, when one weight changes sign.
_EVEN = 1e-10


@final
class LogWeights(AbstractDynamics):
    """dw/dt = −∇L(w) as dz/dt = −(∂L/∂w)/w in z = log|w|, from e^`log_size` times w(0).

    Where every weight acts by its square alone, as in diagonal linear networks
    f(x) = Σ (u² − v²)x, w = 0 is invariant and the growth rates on the right-hand side are
    smooth down to w = 0. Growth by hundreds of orders of magnitude is motion of z at a
    constant speed, and a weight below the smallest float is a number.

    `signs` are those of the weights, which they keep.
    """

    log_size: Float[Array, ""]
    signs: PyTree[Array]

    @property
    def name(self) -> str:
        return "gradient flow, in logarithms of the weights"

    @property
    def stays_stiff(self) -> bool:
        return True

    def check(self, problem: Problem) -> None:
        reason = against_log_weights(problem)
        if reason is not None:
            raise ValueError(
                f"Logarithms of the weights are not for this model: {reason}."
            )

    def init(self, problem: Problem) -> State:
        return jax.tree.map(
            lambda w: jnp.log(jnp.abs(w)) + self.log_size, problem.weights
        )

    def weights(self, state: State) -> PyTree:
        return jax.tree.map(lambda s, z: s * jnp.exp(z), self.signs, state)

    def weights_velocity(self, state: State, velocity: State) -> PyTree:
        return jax.tree.map(jnp.multiply, self.weights(state), velocity)

    def velocity(self, problem: Problem, t: Float[Array, ""], state: State) -> State:
        del t
        above = jax.tree.map(lambda z: jnp.maximum(z, _LOWEST), state)
        w = self.weights(above)
        return jax.tree.map(lambda g, w: -g / w, jax.grad(problem.loss)(w), w)


def against_log_weights(problem: Problem) -> str | None:
    """Why a flow cannot be followed in logarithms of the weights; `None` if it can."""
    if problem.dtype != jnp.float64:
        return f"the weights are {problem.dtype.name}, and it needs float64"
    if kinks_of(problem):
        return f"the gradient jumps at {', '.join(kinks_of(problem))}"
    if not is_concrete_call(problem):
        return None
    if not all(np.all(np.asarray(w)) for w in jax.tree.leaves(problem.weights)):
        return "a weight is 0, which has no logarithm: leave it out of `trainable`"
    if float(_oddness(problem)) > _EVEN:
        return (
            "the loss changes with the sign of a weight, so that the weight may pass "
            "through 0: they are for models in which each weight acts by its square, such "
            "as diagonal linear networks"
        )
    return None


@fast_compile_jit
@full_matmul_precision()
def _oddness(problem: Problem) -> Float[Array, ""]:
    """The largest relative change of the loss when one weight changes sign."""
    flat, unravel = ravel_pytree(problem.weights)
    keys = jax.random.split(jax.random.key(0), 2)

    def at(key):
        w = jax.random.normal(key, flat.shape, flat.dtype)
        loss = problem.loss(unravel(w))
        flipped = jax.lax.map(
            lambda i: problem.loss(unravel(w.at[i].multiply(-1))), jnp.arange(w.size)
        )
        scale = jnp.abs(loss) + jnp.max(jnp.abs(flipped))
        return jnp.max(jnp.abs(flipped - loss)) / jnp.where(scale > 0, scale, 1)

    return jnp.max(jax.lax.map(at, keys))
