"""Gauss–Newton's matrix of a squared loss, as a factor."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._jaxpr import use_fast_softplus
from ._losses import Risk
from ._problem import Problem


def residual_slopes(
    problem: Problem, weights: PyTree
) -> PyTree[Float[Array, "residuals ..."]]:
    """∂r/∂w of L = ½‖r(w)‖²: the rows of G, where GᵀG is near L's Hessian.

    The Hessian is GᵀG + Σ r_i ∇²r_i: the same where residuals are small or the model is
    linear in its weights. Costs a gradient for each output of the model.
    """
    x, _ = problem.data
    assert isinstance(problem.objective, Risk)
    samples = jax.tree.leaves(x)[0].shape[0]

    @use_fast_softplus
    def predicted(weights: PyTree, x: PyTree) -> Array:
        return jnp.ravel(eqx.combine(weights, problem.frozen)(x))

    slopes = jax.vmap(jax.jacrev(predicted), in_axes=(None, 0))(weights, x)
    scale = jnp.sqrt(1 / samples) if problem.objective.is_mean else 1.0
    return jax.tree.map(
        lambda a: jnp.asarray(scale, a.dtype) * a.reshape(-1, *a.shape[2:]), slopes
    )
