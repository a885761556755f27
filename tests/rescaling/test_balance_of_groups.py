"""`balance` beyond chains of layers: least norms against SciPy's minimization."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")
Arrays = dict[str, np.ndarray]


class Model(eqx.Module):
    """A function of parameters and one sample, as users write them."""

    p: dict[str, Any]
    fn: Callable = eqx.field(static=True)

    def __call__(self, x):
        return self.fn(self.p, x)


def recurrent(p, xs):
    h = jnp.zeros(3)
    return p["C"] @ jax.lax.scan(lambda h, x: (p["A"] @ h + p["B"] @ x, None), h, xs)[0]


def unrolled(p, xs):
    h = p["B"] @ xs[0]
    for x in xs[1:]:
        h = p["A"] @ h + p["B"] @ x
    return p["C"] @ h


def move_state(p: Arrays, g: np.ndarray) -> Arrays:
    back = np.linalg.inv(g)
    return {"A": g @ p["A"] @ back, "B": g @ p["B"], "C": p["C"] @ back}


def move_embedding(p: Arrays, g: np.ndarray) -> Arrays:
    back = np.linalg.inv(g)
    return {"E": p["E"] @ g, "H": back @ p["H"] @ back.T}


def mixed(p, x):
    h = p["W"] @ x
    return p["V"] @ jnp.concatenate([h[:3], jax.nn.relu(h[3:])])


def move_mixed(p: Arrays, g: np.ndarray) -> Arrays:
    """Three linear units; the diagonal of another matrix is for the ReLU units."""
    full = np.eye(5)
    full[:3, :3] = g
    return {"W": full @ p["W"], "V": p["V"] @ np.linalg.inv(full)}


CASES = {
    "recurrent": (
        recurrent,
        {"A": (3, 3), "B": (3, 2), "C": (2, 3)},
        (4, 2),
        move_state,
    ),
    "unrolled": (unrolled, {"A": (3, 3), "B": (3, 2), "C": (1, 3)}, (5, 2), move_state),
    "tied embedding": (
        lambda p, i: p["E"] @ (p["H"] @ p["E"][i]),
        {"E": (5, 3), "H": (3, 3)},
        (),
        move_embedding,
    ),
    "linear and ReLU units": (mixed, {"W": (5, 4), "V": (2, 5)}, (4,), move_mixed),
}


def square(p: Arrays) -> float:
    return sum(float((np.asarray(a) ** 2).sum()) for a in p.values())


def least_square(p: Arrays, move) -> float:
    """Over positive matrices, which is enough: rotations change no norm."""
    upper = np.triu_indices(3)

    def norm(s):
        symmetric = np.zeros((3, 3))
        symmetric[upper] = s
        return square(move(p, scipy.linalg.expm(symmetric + symmetric.T)))

    return scipy.optimize.minimize(norm, np.zeros(6), method="BFGS", tol=1e-10).fun


@pytest.mark.parametrize("name", CASES)
def test_units_that_one_array_meets_twice_or_that_are_few(name):
    fn, shapes, sample, move = CASES[name]
    rng = np.random.default_rng(2)
    arrays = {k: 0.6 * rng.standard_normal(s) for k, s in shapes.items()}
    made = Model({k: jnp.asarray(a) for k, a in arrays.items()}, fn)
    x = jnp.array(4) if sample == () else jnp.asarray(rng.standard_normal(sample))
    if name == "linear and ReLU units":
        # Of the ReLU units one by one the least is known: 2‖W[i, :]‖‖V[:, i]‖.
        for i in (3, 4):
            w, v = np.linalg.norm(arrays["W"][i]), np.linalg.norm(arrays["V"][:, i])
            arrays["W"][i] *= np.sqrt(v / w)
            arrays["V"][:, i] *= np.sqrt(w / v)
    balanced = hf.balance(made, x)
    least = least_square(arrays, move)
    assert square(balanced.p) == pytest.approx(least, rel=1e-5)
    assert square(balanced.p) < least * (1 + 1e-9)
    np.testing.assert_allclose(balanced(x), made(x), rtol=1e-10, atol=1e-12)
    for law in hf.laws(made, x):
        assert np.abs(law.value(balanced)).max() < 1e-12


class Stacked(eqx.Module):
    """Layers stacked in one array, run by a loop."""

    a: jax.Array
    W: jax.Array
    b: jax.Array
    act: Callable = eqx.field(static=True)

    def __call__(self, x):
        h, _ = jax.lax.scan(lambda h, w: (self.act(w @ h), None), self.a @ x, self.W)
        return self.b @ h


@pytest.mark.parametrize(
    ("act", "degree"), [(jax.nn.relu, "units"), (lambda z: z, "matrix")]
)
def test_stacked_layers(act, degree):
    """The same as layers of their own; laws are taken through a flow, too."""
    rng = np.random.default_rng(4)
    a, w, b = (
        0.7 * jnp.asarray(rng.standard_normal(s)) for s in ((3, 2), (2, 3, 3), (2, 3))
    )
    made = Stacked(a, w, b, act)
    x = jnp.array([0.4, -1.1])
    laws = hf.laws(made, x)
    assert {law.contraction for law in laws} >= {degree}
    balanced = hf.balance(made, x)
    gaps = [
        balanced.a @ balanced.a.T - balanced.W[0].T @ balanced.W[0],
        balanced.W[0] @ balanced.W[0].T - balanced.W[1].T @ balanced.W[1],
        balanced.W[1] @ balanced.W[1].T - balanced.b.T @ balanced.b,
    ]
    if degree == "units":  # The first units are linear: nothing stands before them.
        gaps[1:] = [jnp.diag(gap) for gap in gaps[1:]]
    assert max(float(jnp.abs(gap).max()) for gap in gaps) < 1e-12
    np.testing.assert_allclose(balanced(x), made(x), rtol=1e-10, atol=1e-12)
    if degree == "matrix":
        data = jnp.asarray(rng.standard_normal((6, 2))), jnp.ones((6, 2))
        run = hf.flow(made, data, 0.5, laws=laws, project=True)
        for value in run.laws.values():
            assert np.abs(value - value[:1]).max() < 1e-12
