"""Whether a proposed law is one, by the master fact: ⟨2Aw + b, ∇L(w)⟩ = 0."""

from collections.abc import Callable, Iterable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PyTree, Scalar

from .._jax._arrays import tree_norm
from .._jax._precision import full_matmul_precision
from ._law import Entries, Law, contracted, leaf_at, rows_of

#: Random weights at which a law has to hold.
_POINTS = 3


def law_rate(law: Law, weights: PyTree, gradient: PyTree) -> Float[Array, "..."]:
    """⟨2Aw + b, g⟩, the rate at which a law would fall along −g: 0 if it is one."""
    return 2 * law.bilinear(weights, gradient) + law.linear(gradient)


#: The violation, relative to the terms that cancel, up to which rounding explains it.
LIMIT = 1e-12


def rate_and_size(
    law: Law, weights: PyTree, gradient: PyTree
) -> tuple[np.ndarray, np.ndarray]:
    """⟨2Aw + b, g⟩ of arrays of NumPy, and the sum of its terms' absolute values."""
    rate, size = np.zeros(()), np.zeros(())
    for terms, is_linear in ((law.quadratic_terms, False), (law.linear_terms, True)):
        for term in terms:
            g = rows_of(term, leaf_at(gradient, term.path))
            w = np.ones_like(g) / 2
            if not is_linear:
                w = rows_of(term, leaf_at(weights, term.path))
            c = 2 * term.coefficient
            rate = rate + c * contracted(law.contraction, law.blocks, w, g)
            size = size + abs(c) * contracted(
                law.contraction, law.blocks, abs(w), abs(g)
            )
    for entries in law.entries:
        share = entries.of(weights, gradient)
        is_linear = entries.other_path is None
        absolute = Entries(
            entries.path,
            entries.index,
            tuple(map(abs, entries.coefficients)),
            entries.other_path,
            entries.other_index,
        )
        sizes = (jax.tree.map(abs, tree) for tree in (weights, gradient))
        rate = rate + (1 if is_linear else 2) * share
        size = size + (1 if is_linear else 2) * absolute.of(*sizes)
    return np.asarray(rate), np.asarray(size)


def violation(law: Law, points: Iterable[tuple[PyTree, PyTree]]) -> float:
    """The largest violation of a law at some points, relative to what cancels there."""
    worst = 0.0
    for weights, gradient in points:
        rate, size = rate_and_size(law, weights, gradient)
        largest = np.max(size, initial=0.0)
        if largest > 0:
            worst = max(worst, float(np.max(np.abs(rate)) / largest))
    return worst


def relative_violation(
    laws: tuple[Law, ...], weights: PyTree, gradient: PyTree
) -> Float[Array, " laws"]:
    """|⟨2Aw + b, g⟩| / (2‖w‖‖g‖ + ‖g‖), the largest component of each law."""
    size_g = tree_norm(gradient)
    scale = 2 * tree_norm(weights) * size_g + size_g
    worst = [jnp.max(jnp.abs(law_rate(law, weights, gradient))) for law in laws]
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

    def violation(key):
        drawn = _redrawn(model, mask, key)
        weights, frozen = eqx.partition(drawn, mask)
        gradient = jax.grad(lambda w: objective(eqx.combine(w, frozen), data))(weights)
        return relative_violation(laws, weights, gradient)

    return jnp.max(jax.vmap(violation)(jr.split(jr.key(0), _POINTS)), axis=0)


def threshold(dtype: jnp.dtype) -> float:
    """The violation up to which rounding explains it."""
    return 1e3 * float(jnp.finfo(dtype).eps)


def _redrawn(model: PyTree, mask: PyTree, key) -> PyTree:
    leaves, structure = jax.tree.flatten(model)
    selected = jax.tree.leaves(mask)
    keys = jr.split(key, len(leaves))
    drawn = [
        jr.normal(k, leaf.shape, leaf.dtype) if s else leaf
        for k, leaf, s in zip(keys, leaves, selected, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)
