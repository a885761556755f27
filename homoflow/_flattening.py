"""Trees as long vectors: what a solver does to each leaf it does once."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

Vectors = list[Float[Array, " _"]]


class Flattening(eqx.Module):
    """Trees with the structure, shapes and dtypes of `like`, as a vector for each dtype.

    A Runge–Kutta method combines its stages leaf by leaf, and under `vmap` each leaf's
    stages are copied to where a matrix product wants them: one vector is a multiple
    faster than a network's leaves. Solvers that take `jax.flatten_util.ravel_pytree` of
    their state find the weights of a network of one dtype in the order of its leaves.
    """

    structure: Any = eqx.field(static=True)
    leaves: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)

    def __init__(self, like: PyTree):
        leaves, self.structure = jax.tree.flatten(like)
        self.leaves = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves)

    def flat(self, tree: PyTree) -> Vectors:
        leaves = self.structure.flatten_up_to(tree)
        return [
            jnp.concatenate([jnp.ravel(leaves[i]) for i in places])
            for places in self._places()
        ]

    def tree(self, vectors: Vectors) -> PyTree:
        leaves = {}
        for places, vector in zip(self._places(), vectors, strict=True):
            start = 0
            for i in places:
                end = start + self.leaves[i].size
                leaves[i] = vector[start:end].reshape(self.leaves[i].shape)
                start = end
        in_order = [leaves[i] for i in range(len(leaves))]
        return jax.tree.unflatten(self.structure, in_order)

    def _places(self) -> list[list[int]]:
        """The leaves' numbers, by dtype."""
        places = {}
        for i, like in enumerate(self.leaves):
            places.setdefault(like.dtype, []).append(i)
        return list(places.values())
