"""Rows of the Jacobian J = ∂z/∂w for a few pairs, and how flat weights are laid out."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._jaxpr import PiecewiseSmoothFunction

_Leaf = TypeVar("_Leaf")


class Rows(NamedTuple):
    """J_k = ∇_w z_k for the pairs k in the slots.

    A weight matrix that enters only once, as Wx (most of a network does), has an outer
    product for its gradient. That is kept as its two factors, `deltas[i][k]` and
    `vectors[i][k]`. The gradients of all other weights are the columns of `explicit`.
    """

    explicit: Float[Array, "slots explicit"]
    deltas: list[Float[Array, "slots _"]]
    vectors: list[Float[Array, "slots _"]]

    def truncate(self, count: int) -> "Rows":
        """The first rows."""
        return Rows(
            self.explicit[:count],
            [delta[:count] for delta in self.deltas],
            [vector[:count] for vector in self.vectors],
        )

    def gram(self) -> Float[Array, "slots slots"]:
        """J Jᵀ."""
        factored = (
            (v @ v.T) * (d @ d.T)
            for v, d in zip(self.vectors, self.deltas, strict=True)
        )
        return sum(factored, start=self.explicit @ self.explicit.T)

    def squared_norms(self) -> Float[Array, " slots"]:
        """The diagonal of J Jᵀ."""
        factored = (
            jnp.sum(v**2, 1) * jnp.sum(d**2, 1)
            for v, d in zip(self.vectors, self.deltas, strict=True)
        )
        return sum(factored, start=jnp.sum(self.explicit**2, 1))


class WeightLayout(eqx.Module):
    """Where each weight array is in the flat weights, and how `Rows` hold its gradient.

    Of `template`, a tree of the weights, only the shapes matter. The leaves of
    `function.products` have outer products for gradients; those of
    `function.convolutions` have sums of outer products over positions.
    """

    function: PiecewiseSmoothFunction = eqx.field(static=True)
    template: PyTree

    @property
    def num_leaves(self) -> int:
        return len(jax.tree.leaves(self.template))

    def unravel(self, w: Float[Array, " weights"]) -> PyTree:
        """The tree of weights from flat ones."""
        return jax.flatten_util.ravel_pytree(self.template)[1](w)

    def jvp(self, rows: Rows, v: Float[Array, " weights"]) -> Float[Array, " slots"]:
        """J v."""
        leaves = jax.tree.leaves(self.unravel(v))
        out = rows.explicit @ self.ravel_explicit(self.explicit(leaves), v.dtype)
        for p, delta, vector in zip(
            self.function.products, rows.deltas, rows.vectors, strict=True
        ):
            matrix = leaves[p.leaf].T if p.is_transposed else leaves[p.leaf]
            out = out + jnp.sum((delta @ matrix) * vector, 1)
        return out

    def vjp(self, rows: Rows, v: Float[Array, " slots"]) -> Float[Array, " weights"]:
        """Jᵀ v."""
        deltas = [delta * v[:, None] for delta in rows.deltas]
        return self.assemble(v @ rows.explicit, deltas, rows.vectors)

    def assemble(
        self, explicit: Array, deltas: list[Array], vectors: list[Array]
    ) -> Float[Array, " weights"]:
        """Flat weights: each matrix is deltasᵀ · vectors, the others are in `explicit`."""
        leaves, structure = jax.tree.flatten(self.template)
        out: list[Array | None] = [None] * len(leaves)
        for p, delta, vector in zip(
            self.function.products, deltas, vectors, strict=True
        ):
            matrix = delta.T @ vector
            out[p.leaf] = matrix.T if p.is_transposed else matrix
        start = 0
        for i, leaf in enumerate(leaves):
            if out[i] is None:
                out[i] = explicit[start : start + leaf.size].reshape(leaf.shape)
                start += leaf.size
        return jax.flatten_util.ravel_pytree(jax.tree.unflatten(structure, out))[0]

    def explicit(self, leaves: Sequence[_Leaf]) -> list[_Leaf]:
        """The leaves whose gradients `Rows` hold as columns."""
        in_factors = {p.leaf for p in self.function.products}
        return [a for i, a in enumerate(leaves) if i not in in_factors]

    def ravel_explicit(self, arrays: list[Array], dtype: Any) -> Array:
        return jnp.concatenate([jnp.zeros(0, dtype), *(a.ravel() for a in arrays)])

    def unfactored(self, leaves: Sequence[_Leaf]) -> list[_Leaf]:
        """The leaves that are neither in a product nor in a convolution."""
        factored = {p.leaf for p in self.function.factored}
        return [a for i, a in enumerate(leaves) if i not in factored]

    def insert_unfactored(self, leaves: list[Array], unfactored: list[Array]) -> PyTree:
        """The tree of weights with other values for the leaves that are `unfactored`."""
        factored = {p.leaf for p in self.function.factored}
        values: Iterator[Array] = iter(unfactored)
        inserted = [
            leaf if i in factored else next(values) for i, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(jax.tree.structure(self.template), inserted)

    def sums_samples_first(self) -> bool:
        """Whether one gradient per sample would cost far more than that of their sum.

        All weights, once for each sample, take much memory, and operations may be slow
        with another weight for each sample. Neither is so where the weights outside of
        products and convolutions are few and are vectors (biases, say).
        """
        unfactored = self.unfactored(jax.tree.leaves(self.template))
        outputs = self.function.count
        outputs += sum(math.prod(p.shape) for p in self.function.factored)
        has_matrix = any(sum(n > 1 for n in a.shape) > 1 for a in unfactored)
        return has_matrix or sum(a.size for a in unfactored) > outputs
