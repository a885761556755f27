"""Models as users write them, all with inputs of 3 and outputs of 2 numbers.

Few shapes, so that one compiled program serves hundreds of calls.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import homoflow as hf

INPUTS, HIDDEN, OUTPUTS = 3, 4, 2


class Dense(eqx.Module):
    """b·f(a·x): two arrays, and any function between them."""

    a: Array
    b: Array
    f: Callable = eqx.field(static=True)

    def __call__(self, x):
        return self.b @ self.f(self.a @ x)


class Residual(hf.MLP):
    """A subclass with a forward pass of its own, without its parent's laws."""

    def __call__(self, x):
        hidden = jax.nn.relu(self.layers[0](x))
        hidden = hidden + jax.nn.relu(self.layers[1](hidden))
        return self.layers[2](hidden)


class Gated(eqx.Module):
    """A mixture of linear experts behind softmax gates."""

    gates: Array
    experts: Array

    def __call__(self, x):
        return jnp.einsum("e,eoi,i->o", jax.nn.softmax(self.gates @ x), self.experts, x)


class Stacked(eqx.Module):
    """Equal layers in a scan."""

    layers: Array
    last: Array
    f: Callable = eqx.field(static=True)

    def __call__(self, x):
        x, _ = jax.lax.scan(lambda h, w: (self.f(w @ h), None), x, self.layers)
        return self.last @ x


class Difference(eqx.Module):
    """(u² − v²)·x for each output, a diagonal linear network."""

    u: Array
    v: Array

    def __call__(self, x):
        return (self.u**2 - self.v**2) @ x


class Spectral(eqx.Module):
    """Complex numbers between real weights."""

    real: Array
    imaginary: Array
    last: Array

    def __call__(self, x):
        spectrum = jax.lax.complex(self.real, self.imaginary) * jnp.fft.rfft(x)
        return self.last @ jnp.tanh(jnp.fft.irfft(spectrum, INPUTS))


def _norm(z):
    return (z - z.mean()) / jnp.sqrt(z.var() + 1e-3)


def _loop(z):
    return jax.lax.fori_loop(0, 3, lambda i, h: h + 0.25 * jnp.sin(h + 0.1 * i), z)


def _choose(z):
    return jax.lax.cond(z[0] > 0, jnp.tanh, lambda z: 0.5 * z, z)


def _round_through(z):
    return z + jax.lax.stop_gradient(jnp.round(z) - z)


TABLE = np.linspace(-2, 2, 5)


def _table(z):
    return jnp.interp(z, TABLE, np.array([0.0, 1.0, 0.0, 1.0, 0.0]))


SMOOTH: dict[str, Callable] = {
    "identity": lambda z: z,
    "square": jnp.square,
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "softmax": jax.nn.softmax,
    "norm": _norm,
    "loop": _loop,
    "squared relu": lambda z: jax.nn.relu(z) ** 2,
}
KINKED: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "leaky relu": jax.nn.leaky_relu,
    "absolute value": jnp.abs,
    "hard tanh": jax.nn.hard_tanh,
    "root of square": lambda z: jnp.sqrt(z**2),
    "product with mask": lambda z: z * (z > 0),
    "where": lambda z: jnp.where(z > 0, z, 0.1 * z),
    "max of two": lambda z: jnp.maximum(z, z[::-1]),
    "selu": jax.nn.selu,
    "elu": lambda z: jax.nn.elu(z, 0.5),
    "table": _table,
}
#: The field itself jumps, by more than a kink's: no flow is unique.
JUMPING: dict[str, Callable] = {"choice": _choose, "rounded": _round_through}


#: A model from random numbers and the number of its hidden units.
Maker = Callable[[np.random.Generator, int], eqx.Module]


def dense(f: Callable) -> Maker:
    return lambda rng, k: Dense(_draw(rng, k, INPUTS), _draw(rng, OUTPUTS, k), f)


def mlp(activation: str, hidden_layers: int = 1, kind=hf.MLP) -> Maker:
    def make(rng, k):
        sizes = (INPUTS, *[k] * hidden_layers, OUTPUTS)
        model = kind(sizes, activation=activation, key=jax.random.key(0))
        return jax.tree.map(
            lambda leaf: (
                _draw(rng, *leaf.shape) if eqx.is_inexact_array(leaf) else leaf
            ),
            model,
        )

    return make


MODELS: dict[str, Maker] = {
    **{name: dense(f) for name, f in (SMOOTH | KINKED | JUMPING).items()},
    "linear MLP": mlp("linear"),
    "deep linear MLP": mlp("linear", 2),
    "ReLU MLP": mlp("relu"),
    "deep ReLU MLP": mlp("relu", 2),
    "residual": mlp("relu", 2, Residual),
    "gated": lambda rng, _: Gated(
        _draw(rng, 3, INPUTS), _draw(rng, 3, OUTPUTS, INPUTS)
    ),
    "stacked tanh": lambda rng, _: Stacked(
        _draw(rng, 2, INPUTS, INPUTS), _draw(rng, OUTPUTS, INPUTS), jnp.tanh
    ),
    "stacked ReLU": lambda rng, _: Stacked(
        _draw(rng, 2, INPUTS, INPUTS), _draw(rng, OUTPUTS, INPUTS), jax.nn.relu
    ),
    "difference": lambda rng, _: Difference(
        _draw(rng, OUTPUTS, INPUTS), _draw(rng, OUTPUTS, INPUTS)
    ),
    "spectral": lambda rng, _: Spectral(
        _draw(rng, 2), _draw(rng, 2), _draw(rng, OUTPUTS, INPUTS)
    ),
}


def _draw(rng: np.random.Generator, *shape: int) -> Array:
    return jnp.asarray(0.7 * rng.standard_normal(shape))


#: Models of the same kind that are smaller or plainer, for shrinking.
PLAINER = {
    "deep linear MLP": "linear MLP",
    "linear MLP": "identity",
    "deep ReLU MLP": "ReLU MLP",
    "residual": "ReLU MLP",
    "ReLU MLP": "relu",
    "stacked ReLU": "relu",
    "stacked tanh": "tanh",
    "where": "leaky relu",
}
