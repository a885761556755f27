"""Small problems that several test files share, so that each is compiled once.

`relu_gradient` is the oracle for networks with kinks: NumPy, written out by hand.
`midpoint` is the one for their flow.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

import homoflow as hf

SAMPLES = 12


class Neuron(eqx.Module):
    """A user-written smooth model: one array, and a function among its leaves."""

    w: Array
    fn: Callable = jnp.tanh

    def __call__(self, x):
        return self.fn(jnp.dot(self.w, x))


def neuron(dtype=jnp.float64) -> tuple[Neuron, tuple[Array, Array]]:
    x, noise = _draw(1, (SAMPLES, 2)), _draw(2, (SAMPLES,))
    model = Neuron(jnp.array([0.3, -0.5], dtype))
    return model, (x, jnp.tanh(x[:, 0] + x[:, 1]) + 0.1 * noise)


def linear_regression() -> tuple[hf.MLP, tuple[Array, Array]]:
    """A single layer x ↦ Wx: a convex quadratic with a closed-form flow."""
    x, noise = _draw(3, (SAMPLES, 3)), _draw(4, (SAMPLES, 2))
    model = hf.MLP((3, 2), key=jr.key(5))
    return model, (x, x[:, :2] - x[:, 1:] + 0.3 * noise)


def relu_regression(seed: int = 0) -> tuple[hf.MLP, tuple[Array, Array]]:
    """A small ReLU network whose flow slides along kinks."""
    x, y = _draw(6, (SAMPLES, 3)), _draw(7, (SAMPLES, 2))
    return hf.MLP((3, 8, 2), key=jr.key(seed)), (x, y)


def arrays_of(model) -> list[np.ndarray]:
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    return [np.asarray(leaf) for leaf in leaves]


def saved(trajectory: hf.Trajectory) -> Any:
    """The models of a run with `save_models`."""
    assert trajectory.models is not None
    return trajectory.models


def flat(model) -> np.ndarray:
    return np.concatenate([leaf.ravel() for leaf in arrays_of(model)])


def relative_error(model, truth) -> float:
    """‖w − w*‖ / ‖w*‖ over all arrays."""
    return float(np.linalg.norm(flat(model) - truth) / np.linalg.norm(truth))


def relu_gradient(weights: list[np.ndarray], x: np.ndarray, y: np.ndarray):
    """∇ of (1/m) Σ ½‖f(x_i) − y_i‖²; leading axes of the weights are a batch."""
    inputs, before = [x], []
    for w in weights:
        before.append(inputs[-1] @ w.swapaxes(-1, -2))
        inputs.append(np.maximum(before[-1], 0))
    error = (before[-1] - y) / len(x)
    gradients = []
    for w, h in zip(weights[::-1], range(len(weights) - 1, -1, -1), strict=True):
        gradients.insert(0, error.swapaxes(-1, -2) @ inputs[h])
        if h:
            error = (error @ w) * (before[h - 1] > 0)
    return gradients


@eqx.filter_jit
def midpoint(model, data, t1, steps) -> Array:
    """Explicit midpoint with constant steps, on autodiff's gradient: flat weights."""
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    w0, unravel = jax.flatten_util.ravel_pytree(arrays)
    x, y = data

    def loss(w):
        predictions = jax.vmap(eqx.combine(unravel(w), rest))(x)
        return 0.5 * jnp.sum((predictions - y) ** 2) / len(x)

    gradient, step = jax.grad(loss), t1 / steps.astype(w0.dtype)

    def one(_, w):
        return w - step * gradient(w - 0.5 * step * gradient(w))

    return jax.lax.fori_loop(0, steps, one, w0)


def _draw(seed: int, shape: tuple[int, ...]) -> Array:
    return jr.normal(jr.key(seed), shape)
