"""What is recorded at one point of a trajectory."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._laws import Laws, relative_violation


class Observation(eqx.Module):
    """Loss, laws and norms at one w, from a loss and gradient already computed.

    `law_violation` is the largest |⟨2Aw + b, g⟩| / (2‖w‖‖g‖ + ‖g‖) over all laws: a
    certificate, made anew at every recorded point, that they are laws of the
    objective in use.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    squared_norms: dict[str, Float[Array, ""]]
    laws: dict[str, Float[Array, "..."]]
    law_violation: Float[Array, ""]


def observe(laws: Laws, weights: PyTree, loss: Array, gradient: PyTree) -> Observation:
    """The observation at `weights`, a model with `None` for all that is not trained."""
    squares = {
        jax.tree_util.keystr(path).lstrip("."): jnp.sum(leaf**2)
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights)
    }
    grad_squares = jnp.stack([jnp.sum(g**2) for g in jax.tree.leaves(gradient)])
    if len(laws):
        violation = jnp.max(relative_violation(laws.items, weights, gradient))
    else:
        violation = jnp.zeros_like(loss)
    return Observation(
        loss=loss,
        grad_norm=jnp.sqrt(jnp.sum(grad_squares)),
        squared_norms=squares,
        laws=laws.values(weights),
        law_violation=violation,
    )
