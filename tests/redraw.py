"""Models at random weights, biases included: none of the structure of a fresh start."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import homoflow as hf


class Blank(hf.AbstractInitializer):
    """Zeros, for `redrawn` to replace: JAX would compile a draw for each new shape."""

    def __call__(self, key, specs, dtype):
        del key
        return [jnp.zeros(spec.shape, dtype) for spec in specs]


def redrawn(model, seed=0, std=0.7):
    """`model` with independent N(0, std²) entries in every floating-point array."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(std * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(
        lambda leaf: draw(leaf) if eqx.is_inexact_array(leaf) else leaf, model
    )
