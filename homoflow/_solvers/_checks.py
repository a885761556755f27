"""States that are one long vector."""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def require_single_dtype(solver: str, y0: PyTree) -> None:
    """`ValueError` unless all arrays have one floating-point dtype."""
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(y0)}
    are_floating = all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)
    if len(dtypes) != 1 or not are_floating:
        named = ", ".join(sorted(str(dtype) for dtype in dtypes)) or "nothing"
        raise ValueError(
            f"{solver} needs a state of one floating-point dtype; got {named}."
        )
