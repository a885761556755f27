"""Numbers that are known now, as opposed to traced ones."""

import jax
import jax.core
import numpy as np
from jaxtyping import PyTree


def is_concrete(tree: PyTree) -> bool:
    """Whether no leaf is being traced by jit, vmap or grad."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def is_concrete_call(tree: PyTree) -> bool:
    """Whether a function of this is called by itself, not inside of jit, vmap or grad."""
    # A constant is traced inside of what is being compiled, whatever the arguments.
    return is_concrete((tree, jax.numpy.zeros(())))


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
