"""Noether charges of rotations: what heavy-ball flow conserves, up to its friction."""

import functools
import operator

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ._law import Law, Laws, Term


class Rotation(eqx.Module):
    """Σ X Ẋᵀ − Ẋ Xᵀ over the arrays X that turn together, X → OX with O orthogonal.

    Units that only meet linear maps may be mixed by any invertible matrix, W₁ → GW₁ and
    W₂ → W₂G⁻¹. The symmetric generators of these give the matrix law W₁W₁ᵀ − W₂ᵀW₂ of
    gradient flow; the skew ones are rotations, under which W₁ and W₂ᵀ turn alike.
    """

    name: str = eqx.field(static=True)
    terms: tuple[Term, ...]
    blocks: int = eqx.field(static=True, default=1)

    def value(self, weights: PyTree, velocity: PyTree) -> Float[Array, "*blocks n n"]:
        """The charge: a skew matrix, or one for each block of units."""
        charges = (
            self._charge(term.rows(weights), term.rows(velocity)) for term in self.terms
        )
        return functools.reduce(operator.add, charges)

    def _charge(self, rows: Array, velocity: Array) -> Array:
        if self.blocks > 1:
            shape = self.blocks, rows.shape[0] // self.blocks, -1
            rows, velocity = rows.reshape(shape), velocity.reshape(shape)
        product = rows @ velocity.swapaxes(-1, -2)
        return product - product.swapaxes(-1, -2)


def rotations_of(laws: Laws) -> tuple[Rotation, ...]:
    """The rotations behind matrix laws: `rotations[1]` behind `matrix[1]`."""
    return tuple(
        Rotation(
            "rotations[" + law.name.partition("[")[2], law.quadratic_terms, law.blocks
        )
        for law in laws
        if _comes_from_mixing(law)
    )


def _comes_from_mixing(law: Law) -> bool:
    """Whether the law can be that of X → GX, Y → G⁻ᵀY for all invertible G."""
    only_terms = not law.linear_terms and not law.entries
    alike = all(abs(term.coefficient) == 1 for term in law.quadratic_terms)
    return law.contraction == "matrix" and only_terms and alike


def torque(
    rotations: tuple[Rotation, ...], weights: PyTree, gradient: PyTree
) -> Float[Array, ""]:
    """The largest entry of all charges with ∇L as velocity: 0 if L is symmetric."""
    return jnp.max(
        jnp.stack([jnp.max(jnp.abs(r.value(weights, gradient))) for r in rotations])
    )
