"""Casts of all floating-point arrays in a pytree."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def cast_floats(tree: PyTree, dtype: jnp.dtype | type) -> PyTree:
    """The floating-point arrays of a pytree in `dtype`, all other leaves as they are."""
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if _is_float_array(leaf) else leaf, tree
    )


def widen_half_precision(tree: PyTree) -> PyTree:
    """Half precision in single: sums of squares are not for half precision."""

    def widen(leaf):
        is_half = _is_float_array(leaf) and jnp.finfo(leaf.dtype).bits < 32
        return cast_floats(leaf, jnp.float32) if is_half else leaf

    return jax.tree.map(widen, tree)


def _is_float_array(leaf: PyTree) -> bool:
    return eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
