"""Weights as one vector, and laws as functions of it: for small models only."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from .._precision import full_matmul_precision
from ._law import Law
from ._probe import _SIZES, Probe


class FlatProblem:
    """Gradients of a probe's objective with respect to one vector of weights."""

    def __init__(self, probe: Probe):
        self.probe = probe
        self.template = eqx.filter(probe.model, probe.mask)
        self.frozen = eqx.filter(probe.model, probe.mask, inverse=True)
        with jax.enable_x64(True):
            flat, self.unravel = ravel_pytree(self.template)
        self.size = flat.size

    def gradient(self, w: Any, data: Any) -> Any:
        """∇L at a vector of weights; to be traced in double precision."""
        with full_matmul_precision():
            return jax.grad(
                lambda v: self.probe.objective(
                    eqx.combine(self.unravel(v), self.frozen), data
                )
            )(w)

    def drawn(self, count: int, seed: int) -> tuple[np.ndarray, Any]:
        """Random weights and data, stacked."""
        draws = [
            self.probe.drawn(np.random.default_rng((seed, i)), *_SIZES[i % len(_SIZES)])
            for i in range(count)
        ]
        weights = np.stack([_raveled(w) for w, _ in draws])
        return weights, stacked([data for _, data in draws])

    def jacobian(self, laws: tuple[Law, ...]) -> Callable[[np.ndarray], np.ndarray]:
        """w ↦ the gradients of all laws, one in each row."""

        def values(w):
            tree = self.unravel(w)
            return jnp.concatenate([law.value(tree).reshape(-1) for law in laws])

        jacobian = jax.jit(jax.jacrev(values))

        def evaluated(w):
            if not laws:
                return np.zeros((0, self.size))
            with jax.enable_x64(True):
                return np.asarray(jacobian(w))

        return evaluated


def stacked(trees: list[Any]) -> Any:
    """Pytrees of arrays as one, with a new first axis."""
    return jax.tree.map(
        lambda *leaves: np.stack(leaves) if hasattr(leaves[0], "shape") else leaves[0],
        *trees,
    )


def _raveled(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
