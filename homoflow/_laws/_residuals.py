"""Whether a quantity is conserved: its residual ⟨2Aw + b, ∇L(w)⟩ has to be 0."""

import dataclasses
from collections.abc import Callable, Iterable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PyTree, Scalar

from .._jax._arrays import tree_norm
from .._jax._precision import full_matmul_precision
from ._law import Law

#: Random weights at which a law has to hold.
_NUM_POINTS = 3


#: The largest residual, relative to the terms that cancel, that rounding explains.
MAX_RESIDUAL = 1e-12


def time_derivative(law: Law, weights: PyTree, velocity: PyTree) -> Array:
    """⟨2Aw + b, v⟩, the rate at which a law changes along v: 0 for v = ∇L if it is one."""
    return 2 * law.bilinear(weights, velocity) + law.linear(velocity)


def residual(law: Law, weights: PyTree, gradient: PyTree) -> np.ndarray:
    """⟨2Aw + b, g⟩ of arrays of NumPy, in their own precision."""
    quadratic = (2 * p for p in law.quadratic_products(weights, gradient))
    linear = law.linear_products(gradient)
    return np.asarray(sum((*quadratic, *linear)))


def residual_and_scale(
    law: Law, weights: PyTree, gradient: PyTree
) -> tuple[np.ndarray, np.ndarray]:
    """⟨2Aw + b, g⟩ of arrays of NumPy, and the sum of its terms' absolute values."""
    sizes = (jax.tree.map(np.abs, tree) for tree in (weights, gradient))
    return residual(law, weights, gradient), residual(_absolute(law), *sizes)


def _absolute(law: Law) -> Law:
    """The law with the absolute values of all its coefficients."""
    return dataclasses.replace(
        law,
        quadratic_terms=tuple(t.absolute() for t in law.quadratic_terms),
        linear_terms=tuple(t.absolute() for t in law.linear_terms),
        entries=tuple(e.absolute() for e in law.entries),
    )


def max_relative_residual(law: Law, points: Iterable[tuple[PyTree, PyTree]]) -> float:
    """The largest residual of a law at some points, relative to what cancels there."""
    worst = 0.0
    for weights, gradient in points:
        difference, scale = residual_and_scale(law, weights, gradient)
        largest = np.max(scale, initial=0.0)
        if largest > 0:
            worst = max(worst, float(np.max(np.abs(difference)) / largest))
    return worst


def relative_violation(
    laws: tuple[Law, ...], weights: PyTree, gradient: PyTree
) -> Float[Array, " laws"]:
    """|⟨2Aw + b, g⟩| / (2‖w‖‖g‖ + ‖g‖), the largest component of each law."""
    size_g = tree_norm(gradient)
    scale = 2 * tree_norm(weights) * size_g + size_g
    worst = [jnp.max(jnp.abs(time_derivative(law, weights, gradient))) for law in laws]
    return jnp.stack(worst) / jnp.where(scale > 0, scale, 1)


@eqx.filter_jit
@full_matmul_precision()
def violations_at_random_weights(
    laws: tuple[Law, ...],
    objective: Callable[[PyTree, PyTree], Scalar],
    model: PyTree,
    data: PyTree,
    mask: PyTree,
) -> Float[Array, " laws"]:
    """Each law's largest relative violation at a few random weights.

    The weights that `mask` selects are N(0, 1) draws: nothing of the given weights'
    special structure (zeros, balance) can make a false law look true.
    """

    def violation_at(key):
        drawn = _redraw(model, mask, key)
        weights, frozen = eqx.partition(drawn, mask)
        gradient = jax.grad(lambda w: objective(eqx.combine(w, frozen), data))(weights)
        return relative_violation(laws, weights, gradient)

    return jnp.max(jax.vmap(violation_at)(jr.split(jr.key(0), _NUM_POINTS)), axis=0)


def threshold(dtype: jnp.dtype) -> float:
    """The violation up to which rounding explains it."""
    return 1e3 * float(jnp.finfo(dtype).eps)


def _redraw(model: PyTree, mask: PyTree, key) -> PyTree:
    leaves, structure = jax.tree.flatten(model)
    selected = jax.tree.leaves(mask)
    keys = jr.split(key, len(leaves))
    drawn = [
        jr.normal(k, leaf.shape, leaf.dtype) if s else leaf
        for k, leaf, s in zip(keys, leaves, selected, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)
