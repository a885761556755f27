"""Weights as one vector, and laws as functions of it: for small models only."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from ..._jax._precision import full_matmul_precision
from .._law import Law
from ._jacobian import jacobian_of_laws
from ._random_points import LARGE_SIZES, SIZES, Probe, flatten_rows


class GradientField(eqx.Module):
    """(w, data) ↦ ∇L at a vector of weights; to be traced in double precision.

    Two of the same structure are the same to JAX, which compiles for one of them.
    """

    objective: Callable[[PyTree, PyTree], Any]
    frozen: PyTree
    unravel: Callable[[Any], PyTree] = eqx.field(static=True)

    def __call__(self, w: Any, data: Any) -> Any:
        def loss(v: Any) -> Any:
            return self.objective(eqx.combine(self.unravel(v), self.frozen), data)

        with full_matmul_precision():
            return jax.grad(loss)(w)


class VectorizedProblem:
    """Gradients of a probe's objective with respect to one vector of weights."""

    def __init__(self, probe: Probe):
        self.probe = probe
        self.template = eqx.filter(probe.model, probe.mask)
        self.frozen = eqx.filter(probe.model, probe.mask, inverse=True)
        with jax.enable_x64(True):
            flat, self.unravel = ravel_pytree(self.template)
        self.size = flat.size
        self.gradient = GradientField(probe.objective, self.frozen, self.unravel)

    def draw(self, count: int, seed: int) -> tuple[np.ndarray, Any]:
        """Random weights and data, stacked; some of the data are very large."""
        sizes = (*SIZES, *LARGE_SIZES)
        chosen = np.array([sizes[i % len(sizes)] for i in range(count)])
        weights, data = self.probe.draw(np.random.default_rng(seed), chosen)
        return flatten_rows(weights), data

    def unflatten(self, vector: np.ndarray) -> PyTree:
        """A vector as a pytree of NumPy arrays of the weights' shapes."""
        leaves, structure = jax.tree.flatten(self.template)
        ends = np.cumsum([leaf.size for leaf in leaves])
        parts = np.split(vector, ends[:-1])
        arrays = [p.reshape(a.shape) for p, a in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(structure, arrays)

    def jacobian(self, laws: tuple[Law, ...], w: np.ndarray) -> np.ndarray:
        """The gradients 2Aw + b of all laws at w, one in each row."""
        return jacobian_of_laws(laws, self.unflatten(w))
