"""Numbers that are known now, as opposed to traced ones."""

import jax
import jax.core
import numpy as np
from jax.extend.core import get_opaque_trace_state
from jaxtyping import PyTree

#: How JAX traces while homoflow is imported: not at all.
_OUTSIDE = get_opaque_trace_state(convention="flax")


def is_concrete(tree: PyTree) -> bool:
    """Whether no leaf is being traced by jit, vmap or grad."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def is_concrete_call(tree: PyTree) -> bool:
    """Whether a function of this is called by itself, not inside of jit, vmap or grad."""
    # What a function closes over may be traced, whatever the arguments.
    is_outside = get_opaque_trace_state(convention="flax") == _OUTSIDE
    return is_outside and is_concrete(tree)


def is_addressable(tree: PyTree) -> bool:
    """Whether no part of a concrete array is on another machine."""
    leaves = jax.tree.leaves(tree)
    return all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves)


def known_finite(tree: PyTree) -> bool:
    """Whether every floating-point leaf of a concrete pytree is free of NaN and inf.

    Parts of an array on other machines are not looked at.
    """
    return all(
        bool(np.isfinite(np.asarray(leaf)).all())
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "dtype")
        and jax.numpy.issubdtype(leaf.dtype, np.floating)
        and getattr(leaf, "is_fully_addressable", True)
    )
