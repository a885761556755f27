"""A network whose descent comes to the edge of stability, with two eigenvalues in turn."""

import equinox as eqx
import jax
import jax.numpy as jnp

import homoflow as hf


class Net(eqx.Module):
    """tanh, then two linear layers, between which every entry of a matrix is conserved."""

    first: jax.Array
    second: jax.Array
    third: jax.Array

    def __init__(self, key, width=8):
        keys = jax.random.split(key, 3)
        scale = width**-0.5
        self.first = jax.random.normal(keys[0], (width, 2))
        self.second = scale * jax.random.normal(keys[1], (width, width))
        self.third = scale * jax.random.normal(keys[2], (3, width))

    def __call__(self, x):
        return self.third @ (self.second @ jnp.tanh(self.first @ x))


X = jax.random.normal(jax.random.key(9), (20, 2))
Y = 2 * jnp.stack(
    [jnp.sin(2 * X[:, 0]), jnp.sin(2 * X[:, 1] + 1), jnp.cos(2 * X[:, 0] - X[:, 1])], 1
)
NET = Net(jax.random.key(1))
ETA, T1 = 0.1, 40.0
THRESHOLD = 2 / ETA
TS = jnp.linspace(0, T1, 11)
#: The shapes are shared, so that the flow is compiled once.
LAWS = hf.laws(NET, X[0])
