"""A loss with its gradient, the products of its Hessian, and how these change."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ._symmetric import num_pairs, pair_weights, pairs

Product = Callable[[Array], Array]


class Curvature(NamedTuple):
    """L as a function of a vector, and its derivatives."""

    loss: Callable[[Array], Array]

    def gradient(self, w: Float[Array, " size"]) -> Float[Array, " size"]:
        return jax.grad(self.loss)(w)

    def linearize(self, w: Float[Array, " size"]) -> tuple[Array, Product]:
        """∇L and v ↦ ∇²L·v."""
        return jax.linearize(self.gradient, w)

    def slope(self, w: Array, u: Array, v: Array) -> Float[Array, " size"]:
        """∇_w(uᵀ∇²L(w)v) for constant u and v, which is the third derivative D³L[u, v]."""

        def along_v(w: Array) -> Array:
            return jax.jvp(self.gradient, (w,), (v,))[1]

        return jax.jvp(along_v, (w,), (u,))[1]

    def slopes(
        self, w: Array, vectors: Float[Array, "rows size"], num: Int[Array, ""]
    ) -> Float[Array, "pairs size"]:
        """The `slope` of each pair of the first `num` vectors, zero for all others.

        They are weighted as `as_vector` weights entries: with v = Σ_p x_p·slope_p the
        derivative of ⟨X, UᵀHU⟩ is v, if x is X's vector.
        """
        size = vectors.shape[0]
        rows, columns = (jnp.asarray(a) for a in pairs(size))
        weights = jnp.asarray(pair_weights(size), w.dtype)

        def fill(p: Array, slopes: Array) -> Array:
            slope = self.slope(w, vectors[rows[p]], vectors[columns[p]])
            return slopes.at[p].set(weights[p] * slope)

        empty = jnp.zeros((rows.size, w.size), w.dtype)
        return lax.fori_loop(0, num_pairs(num), fill, empty)
