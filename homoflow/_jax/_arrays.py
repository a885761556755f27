"""The Euclidean norm of all arrays in a pytree."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def tree_norm(tree: PyTree) -> Float[Array, ""]:
    """‖w‖₂ of a pytree of arrays."""
    return jnp.sqrt(jnp.sum(jnp.stack([jnp.sum(x**2) for x in jax.tree.leaves(tree)])))
