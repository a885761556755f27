"""Norm and finiteness of all arrays in a pytree."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree


def tree_norm(tree: PyTree) -> Float[Array, ""]:
    """‖w‖₂ of a pytree of arrays."""
    return jnp.sqrt(jnp.sum(jnp.stack([jnp.sum(x**2) for x in jax.tree.leaves(tree)])))


def tree_norm_of_any_size(tree: PyTree) -> Float[Array, ""]:
    """The same where squares of single numbers may overflow, or be 0 by underflow."""
    unit = unit_of(tree)
    return unit * tree_norm([x / unit for x in jax.tree.leaves(tree)])


def unit_of(tree: PyTree) -> Float[Array, ""]:
    """The largest |entry|, by which the tree may be divided: 1 where it is 0 or inf."""
    leaves = jax.tree.leaves(tree)
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in leaves]))
    return jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)


def unit_if_tiny(x: Float[Array, "..."]) -> Float[Array, ""]:
    """The largest |entry| where all squares may underflow; else 1, which rounds nothing."""
    unit = unit_of(x)
    return jnp.where(unit < jnp.finfo(x.dtype).tiny ** (1 / 3), unit, 1)


def in_units(tree: PyTree) -> PyTree:
    """The arrays divided by the largest |entry| of all: products do not underflow."""
    unit = unit_of(tree)
    return jax.tree.map(lambda x: x / unit, tree)


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every floating-point array is free of NaN and inf."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    finite = [jnp.isfinite(leaf).ravel() for leaf in leaves]
    # One reduction: XLA compiles two kernels for each.
    return jnp.all(jnp.concatenate([jnp.ones(1, bool), *finite]))
