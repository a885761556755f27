"""Models that count, look up, mask and loop inside, beside SciPy.

What a flow makes of integers that come from the input, of tables, of numbers of Python, of
arrays without entries and of solves inside of a model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import model
from scipy.integrate import solve_ivp

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")
RNG = np.random.default_rng(5)
NUMBERS = jnp.asarray(RNG.standard_normal((6, 3)))
TOKENS = jnp.asarray(RNG.integers(0, 4, (6, 3)))
PADDED = NUMBERS.at[1, 2].set(0.0).at[4, 1:].set(0.0)
KNOTS = jnp.array([-1.0, 0.0, 1.0])


class UserModel(NamedTuple):
    """A function of arrays and an input, shapes of the arrays, inputs."""

    function: Callable
    shapes: dict[str, tuple[int, ...]]
    x: jax.Array = NUMBERS


def masked_mean(p, x):
    is_word = (x != 0).astype(x.dtype)
    return p["V"] @ jnp.tanh(p["w"] * jnp.sum(x * is_word) / jnp.sum(is_word))


def solved_inside(p, x):
    def field(t, h, w):
        return jnp.tanh(w @ h)

    end = diffrax.diffeqsolve(
        diffrax.ODETerm(field), diffrax.Midpoint(), 0.0, 1.0, 0.25, x, args=p["W"]
    )  # fmt: skip
    assert end.ys is not None
    return p["V"] @ end.ys[0]


def counted(p, x):
    times = jnp.clip(jnp.floor(jnp.abs(x[0]) * 3).astype(int), 0, 3)
    powers = jnp.stack([jnp.ones(3), p["w"] * x, (p["w"] * x) ** 2, (p["w"] * x) ** 3])
    return p["V"] @ powers[times]


def is_odd(x):
    return jnp.floor(x).astype(int) % 2 == 1


@jax.jit
def power_of(z, exponent):
    return z**exponent


MODELS = {
    "one-hot tokens": UserModel(
        lambda p, x: p["V"] @ jnp.tanh(jnp.sum(jax.nn.one_hot(x, 4) @ p["E"], 0)),
        {"E": (4, 3), "V": (2, 3)},
        TOKENS,
    ),
    "padding mask": UserModel(masked_mean, {"w": (3,), "V": (2, 3)}, PADDED),
    "buckets": UserModel(
        lambda p, x: p["V"] @ jnp.tanh(p["B"][jnp.digitize(x[0], KNOTS)] * x),
        {"B": (4, 3), "V": (2, 3)},
    ),
    "parity": UserModel(
        lambda p, x: (
            p["V"] @ (is_odd(x[0]).astype(x.dtype) * jnp.tanh(p["W"] @ x))
        ),
        {"W": (3, 3), "V": (2, 3)},
    ),
    "relu as a product": UserModel(
        lambda p, x: p["V"] @ ((z := p["W"] @ x) * (z > 0).astype(z.dtype)),
        {"W": (3, 3), "V": (2, 3)},
    ),
    "table of the input": UserModel(
        lambda p, x: p["V"] @ jnp.interp(x, KNOTS, p["t"]), {"t": (3,), "V": (2, 3)}
    ),
    "spline of the input": UserModel(
        lambda p, x: p["V"] @ (p["c"][jnp.searchsorted(KNOTS, x)] * x**2),
        {"c": (4,), "V": (2, 3)},
    ),
    "numbers of Python through jit": UserModel(
        lambda p, x: p["V"] @ power_of(p["W"] @ x, 2), {"W": (3, 3), "V": (2, 3)}
    ),
    "array without entries": UserModel(
        lambda p, x: p["V"] @ jnp.tanh(jnp.concatenate([x, p["none"]])),
        {"V": (2, 3), "none": (0,)},
    ),
    "solve inside": UserModel(solved_inside, {"W": (3, 3), "V": (2, 3)}),
    "power that is counted": UserModel(counted, {"w": (3,), "V": (2, 3)}),
}  # fmt: skip


def by_scipy(made, x, y, t1: float) -> np.ndarray:
    start, unravel = ravel_pytree(made)

    def risk(w):
        return jnp.mean(jnp.sum((jax.vmap(unravel(w))(x) - y) ** 2, axis=1)) / 2

    slope = jax.jit(jax.grad(risk))
    solution = solve_ivp(
        lambda t, w: -np.asarray(slope(w)), (0, t1), start, "DOP853", rtol=1e-10,
        atol=1e-12, max_step=t1 / 200,
    )  # fmt: skip
    return solution.y[:, -1]


@pytest.mark.parametrize("name", MODELS)
def test_flow_and_descent_of_models_as_users_write_them(name):
    given = MODELS[name]
    made = model(given.function, **given.shapes)
    made = jax.tree.map(lambda a: 0.4 * a if eqx.is_array(a) else a, made)
    y = jnp.asarray(np.random.default_rng(6).standard_normal((6, 2)))
    truth, t1 = by_scipy(made, given.x, y, 0.5), 0.5
    run = hf.flow(made, (given.x, y), t1)
    found = np.asarray(ravel_pytree(run.model)[0])
    assert np.linalg.norm(truth - np.asarray(ravel_pytree(made)[0])) > 1e-2
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-7)
    steps: Any = 64
    gd = hf.descend(made, (given.x, y), steps, learning_rate=t1 / steps)
    error = np.linalg.norm(np.asarray(ravel_pytree(gd.model)[0]) - truth)
    assert 1e-6 < error < 0.05
