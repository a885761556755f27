"""A tagged catalogue of small problems, and what tests do to models.

Several test files share them, so that each problem is compiled once.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

import homoflow as hf

SAMPLES = 12
ASSERTED = Path(__file__).parent.parent / "docs" / "data" / "asserted.json"
_PROBLEMS: list[tuple[Callable, frozenset[str]]] = []


def tags(*names: str) -> Callable:
    """Enters a function that returns (model, data) into the catalogue."""

    def enter(problem: Callable) -> Callable:
        _PROBLEMS.append((problem, frozenset(names)))
        return problem

    return enter


def problems(tag: str) -> list[Callable]:
    """The problems of the catalogue with that tag."""
    return [problem for problem, names in _PROBLEMS if tag in names]


class Neuron(eqx.Module):
    """A user-written smooth model: one array, and a function among its leaves."""

    w: Array
    fn: Callable = jnp.tanh

    def __call__(self, x):
        return self.fn(jnp.dot(self.w, x))


@tags("smooth", "nonlinear")
def neuron(dtype=jnp.float64) -> tuple[Neuron, tuple[Array, Array]]:
    x, noise = _draw(1, (SAMPLES, 2)), _draw(2, (SAMPLES,))
    model = Neuron(jnp.array([0.3, -0.5], dtype))
    return model, (x, jnp.tanh(x[:, 0] + x[:, 1]) + 0.1 * noise)


@tags("smooth", "linear", "two outputs")
def linear_regression() -> tuple[hf.MLP, tuple[Array, Array]]:
    """A single layer x ↦ Wx: a convex quadratic with a closed-form flow."""
    x, noise = _draw(3, (SAMPLES, 3)), _draw(4, (SAMPLES, 2))
    model = hf.MLP((3, 2), key=jr.key(5))
    return model, (x, x[:, :2] - x[:, 1:] + 0.3 * noise)


@tags("kinks", "nonlinear", "two outputs")
def relu_regression(seed: int = 0) -> tuple[hf.MLP, tuple[Array, Array]]:
    """A small ReLU network whose flow slides along kinks."""
    x, y = _draw(6, (SAMPLES, 3)), _draw(7, (SAMPLES, 2))
    return hf.MLP((3, 8, 2), key=jr.key(seed)), (x, y)


def _draw(seed: int, shape: tuple[int, ...]) -> Array:
    return jr.normal(jr.key(seed), shape)


# Models at random weights, biases included: none of the structure of a fresh start.


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


# Models as functions of a dictionary of parameters.


class Model(eqx.Module):
    """A function of parameters and one sample (or batch), as users write them."""

    p: dict[str, Any]
    fn: Callable = eqx.field(static=True)

    def __call__(self, x):
        return self.fn(self.p, x)


def model(fn, **shapes) -> Model:
    rng = np.random.default_rng(0)
    arrays = {name: jnp.asarray(rng.standard_normal(s)) for name, s in shapes.items()}
    return Model(arrays, fn)


# What tests read.


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


def asserted(subject: str) -> dict[str, Any]:
    """Bounds that tests hold the code to, and which the documentation prints."""
    return json.loads(ASSERTED.read_text(encoding="utf-8"))[subject]


def separable(seed=3, dim=3, samples=12):
    x = jax.random.normal(jax.random.key(seed), (samples, dim))
    normal = jnp.ones(dim) / np.sqrt(dim)
    y = jnp.sign(x @ normal)
    return x + 0.3 * y[:, None] * normal, y
