"""Whether a quantity is conserved: its residual ⟨2Aw + b, ∇L(w)⟩ has to be 0."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PyTree, Scalar

from .._jax._arrays import in_units, tree_norm, tree_norm_of_any_size
from .._jax._compilation import fast_compile_jit
from .._jax._precision import full_matmul_precision
from ._law import Law

#: Sizes of the random weights at which a law has to hold.
_SIZES = (1.0, 1.0, 1.0, 0.02, 30.0, 1e3)

#: The largest residual, relative to the terms that cancel, that rounding explains; and
#: relative to terms with the largest gradient of all.
MAX_RESIDUAL, _ROUNDING = 1e-12, 2e-15
#: The same where so little of the gradient is left that its own rounding counts.
_WEAK_RESIDUAL, _WEAK_ROUNDING = 1e-6, 1e-10
#: A point is telling of a law if its terms are not smaller than this, relative to the
#: largest gradient and to what is usual; and so many telling points it takes.
_TELLING, MIN_TELLING = 1e-3, 3
#: Random vectors from which the norm of a large matrix is estimated.
_NUM_VECTORS = 4


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
    return residual(law, weights, gradient), residual(absolute(law), *sizes)


def absolute(law: Law) -> Law:
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


class Evidence(NamedTuple):
    """What one probe says of a law.

    - `error`: its residual, `terms`: the size of the terms that cancel in it.
    - `whole`: the size that terms would have if all gradients were as large as the largest.
    """

    error: float
    terms: float
    whole: float


def is_conserved(law: Law, points: Iterable[tuple[PyTree, PyTree]]) -> bool:
    """Whether a quantity is conserved at all points that say something of it.

    Where next to no gradient flows to what the law is made of, as behind a saturated
    softmax, what is left of it is rounding: such a point cannot refute a law by little,
    and cannot confirm one. It takes at least `MIN_TELLING` points that can.
    """
    return shows_conservation(collect_evidence(law, points))


def shows_conservation(evidence: Sequence[Evidence]) -> bool:
    """Whether residuals are rounding at all telling points, of which there are enough."""
    limits = residual_limits(evidence)
    return limits is not None and all(
        e.error <= limit for e, limit in zip(evidence, limits, strict=True)
    )


def residual_limits(evidence: Sequence[Evidence]) -> list[float] | None:
    """Up to where rounding explains the residual at each point.

    `None` if there are too few points that say anything.
    """
    reaches = [e.terms / e.whole if e.whole > 0 else 0.0 for e in evidence]
    usual = sorted(reaches)[-MIN_TELLING] if len(reaches) >= MIN_TELLING else 0.0
    if usual == 0:
        return None
    return [
        MAX_RESIDUAL * max(terms, usual * whole) + _ROUNDING * whole
        if reach >= _TELLING * usual
        else max(_WEAK_RESIDUAL * terms, _WEAK_ROUNDING * whole)
        for reach, (_, terms, whole) in zip(reaches, evidence, strict=True)
    ]


def collect_evidence(
    law: Law, points: Iterable[tuple[PyTree, PyTree]]
) -> list[Evidence]:
    """What the gradients at some points say of a law."""
    magnitude = absolute(law)
    evidence = []
    for weights, gradient in points:
        sizes = jax.tree.map(np.abs, weights)
        slopes = jax.tree.map(np.abs, gradient)
        largest = max(g.max(initial=0.0) for g in jax.tree.leaves(slopes))
        everywhere = jax.tree.map(lambda g, c=largest: np.full_like(g, c), gradient)
        values = (
            np.abs(residual(law, weights, gradient)),
            residual(magnitude, sizes, slopes),
            residual(magnitude, sizes, everywhere),
        )
        evidence.append(Evidence(*(float(np.max(v, initial=0.0)) for v in values)))
    return evidence


def relative_violation(
    laws: tuple[Law, ...],
    weights: PyTree,
    gradient: PyTree,
    large: frozenset[str] = frozenset(),
) -> Float[Array, " laws"]:
    """|⟨2Aw + b, g⟩| / (2‖w‖‖g‖ + ‖g‖), the largest component of each law.

    Of the matrix laws named in `large` the Frobenius norm, estimated from products with a
    few random vectors: it is no smaller, and takes no product of matrices.
    """
    gradient = in_units(gradient)
    scale = (2 * tree_norm_of_any_size(weights) + 1) * tree_norm(gradient)
    worst = [
        _estimated_norm(law, weights, gradient)
        if law.name in large
        else jnp.max(jnp.abs(time_derivative(law, weights, gradient)))
        for law in laws
    ]
    return jnp.stack(worst) / jnp.where(scale > 0, scale, 1)


def _estimated_norm(law: Law, weights: PyTree, gradient: PyTree) -> Float[Array, ""]:
    """‖2(wgᵀ)ₛ‖ of a matrix law, where E‖Rz‖² = ‖R‖² for z of independent signs."""
    units = law.shape(weights)[0]
    dtype = jax.tree.leaves(gradient)[0].dtype
    signs = jr.rademacher(jr.key(0), (units, _NUM_VECTORS), dtype)
    products = 2 * law.bilinear_times(weights, gradient, signs)
    return jnp.sqrt(jnp.sum(products**2) / _NUM_VECTORS)


@fast_compile_jit
@full_matmul_precision()
def violations_at_random_weights(
    laws: tuple[Law, ...],
    objective: Callable[[PyTree, PyTree], Scalar],
    model: PyTree,
    data: PyTree,
    mask: PyTree,
) -> Float[Array, " laws"]:
    """Each law's largest relative violation at a few random weights.

    The weights that `mask` selects are draws from N(0, 1), some of them far larger or
    smaller: nothing of the given weights' special structure (zeros, balance), nor a
    penalty that acts on large weights only, can make a false law look true. The violation
    is infinite if no gradient flows at any of them.
    """

    def violation_at(key, size):
        drawn = _redraw(model, mask, key, size)
        weights, frozen = eqx.partition(drawn, mask)
        gradient = jax.grad(lambda w: objective(eqx.combine(w, frozen), data))(weights)
        violations = relative_violation(laws, weights, gradient)
        # Where nothing flows, or all overflows, nothing is shown.
        is_telling = (tree_norm_of_any_size(gradient) > 0) & jnp.isfinite(
            jnp.max(violations)
        )
        return jnp.where(is_telling, violations, 0), is_telling

    keys = jr.split(jr.key(0), len(_SIZES))
    violations, is_telling = jax.vmap(violation_at)(keys, jnp.asarray(_SIZES))
    worst = jnp.max(violations, axis=0)
    return jnp.where(jnp.any(is_telling), worst, jnp.inf)


def threshold(dtype: jnp.dtype) -> float:
    """The violation up to which rounding explains it."""
    return 1e3 * float(jnp.finfo(dtype).eps)


def _redraw(model: PyTree, mask: PyTree, key, size) -> PyTree:
    leaves, structure = jax.tree.flatten(model)
    selected = jax.tree.leaves(mask)
    keys = jr.split(key, len(leaves))
    drawn = [
        size.astype(leaf.dtype) * jr.normal(k, leaf.shape, leaf.dtype) if s else leaf
        for k, leaf, s in zip(keys, leaves, selected, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)
