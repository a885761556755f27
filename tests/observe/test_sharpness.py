"""The Hessian's largest eigenvalue against dense ones and finite differences."""

import warnings

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from edge_net import ETA, NET, X, Y
from jax.flatten_util import ravel_pytree
from problems import neuron

import homoflow as hf
from homoflow._jax._lanczos import largest_eigenvalue

RTOL = 1e-3


def spectrum(kind: str, size: int, rng) -> np.ndarray:
    return {
        "indefinite": rng.standard_normal(size),
        "negative": -0.1 - rng.random(size),
        "two almost equal": np.r_[10, 9.999, rng.random(size)][:size],
        "steeper downwards": np.r_[-50 * np.ones(size // 2), rng.random(size)][:size],
        "one value": np.full(size, 3.0),
    }[kind]


@pytest.mark.parametrize("size", [1, 200])
def test_lanczos_finds_the_largest_eigenvalue_of_dense_matrices(size):
    rng = np.random.default_rng(size)
    kinds = ["indefinite", "negative", "two almost equal", "steeper downwards",
             "one value"]  # fmt: skip
    spectra = np.stack([spectrum(kind, size, rng) for kind in kinds])
    turns = np.linalg.qr(rng.standard_normal((len(kinds), size, size)))[0]
    matrices = jnp.asarray(turns * spectra[:, None, :] @ turns.swapaxes(1, 2))
    found = jax.jit(
        jax.vmap(lambda a: largest_eigenvalue(lambda v: a @ v, size, a.dtype, RTOL))
    )(matrices)
    norms = np.abs(spectra).max(axis=1)
    assert np.all(np.abs(found.value - spectra.max(axis=1)) <= RTOL * norms)
    images = np.einsum("kij,kj->ki", matrices, found.vector)
    residuals = images - found.value[:, None] * found.vector
    assert np.all(np.linalg.norm(residuals, axis=1) <= RTOL * norms)
    # A basis of 32 does not hold these: it has started again.
    assert size < 200 or np.max(found.products) > 32


def test_an_eigenvalue_that_was_not_found_is_nan():
    @jax.jit
    def largest(factor):
        double = jnp.dtype(jnp.float64)
        return largest_eigenvalue(lambda v: factor * v, 5, double, RTOL).value

    assert np.isnan(largest(jnp.nan))
    assert largest(0.0) == 0
    np.testing.assert_allclose(largest(-2.0), -2, rtol=1e-14)


def test_sharpness_and_its_derivative_are_those_of_the_dense_hessian():
    model = hf.MLP((3, 4, 2), activation=jnp.tanh, key=jr.key(0))
    x, y = jr.normal(jr.key(1), (8, 3)), jr.normal(jr.key(2), (8, 2))
    weights, rest = eqx.partition(model, eqx.is_inexact_array)
    flat, unravel = jax.flatten_util.ravel_pytree(weights)

    def loss(w):
        outputs = jax.vmap(eqx.combine(unravel(w), rest))(x)
        return jnp.mean(0.5 * jnp.sum((outputs - y) ** 2, axis=1))

    hessian = jax.jit(jax.hessian(loss))

    def dense(w):
        return np.linalg.eigvalsh(np.asarray(hessian(w))).max()

    @jax.jit
    @jax.value_and_grad
    def ours(w):
        return hf.sharpness(eqx.combine(unravel(w), rest), (x, y))

    value, derivative = ours(flat)
    np.testing.assert_allclose(value, dense(flat), rtol=RTOL)
    along = np.random.default_rng(3).standard_normal(flat.size)
    step = 1e-5 * along
    slope = (dense(flat + step) - dense(flat - step)) / 2e-5
    # Of the derivative the error is of first order in the residual, over the gap.
    np.testing.assert_allclose(along @ np.asarray(derivative), slope, rtol=3e-2)


def test_bad_input_is_refused_at_the_door():
    model, (x, y) = neuron()
    with pytest.raises(ValueError, match="NaN or inf"):
        hf.sharpness(model, (x.at[0, 0].set(jnp.nan), y))


@pytest.mark.parametrize("end", ["largest", "smallest"])
def test_both_ends_of_the_spectrum_are_those_of_the_dense_hessian(end):
    model = hf.MLP((3, 5, 2), activation=jnp.tanh, key=jr.key(0))
    x = jr.normal(jr.key(1), (12, 3))
    data = (x, jnp.sin(x[:, :2]))
    problem = hf.make_problem(model, data)
    flat, unravel = jax.flatten_util.ravel_pytree(problem.weights)
    dense = np.linalg.eigvalsh(jax.hessian(lambda w: problem.loss(unravel(w)))(flat))
    assert dense[0] < 0 < dense[-1]
    wanted = dense[::-1][:3] if end == "largest" else dense[:3]
    found = hf.spectrum(model, data, 3, end=end)
    norm = np.abs(dense).max()
    assert np.all(np.abs(found.values - wanted) <= found.residuals + 1e-12 * norm)
    np.testing.assert_allclose(found.values, wanted, atol=1e-5 * norm)
    with pytest.raises(ValueError, match="end"):
        hf.spectrum(model, data, 3, end="both")
    with pytest.raises(ValueError, match="`k`"):
        hf.spectrum(model, data, 0)


def dense_top(problem, weights, k, scale=None):
    flat, unravel = ravel_pytree(weights)
    hessian = jax.hessian(lambda v: problem.loss(unravel(v)))(flat)
    if scale is not None:
        hessian = scale[:, None] * hessian * scale
    return np.linalg.eigvalsh(hessian)[::-1][:k]


@pytest.fixture(scope="module")
def edge_descent():
    """At the edge of stability, each step recorded, every fifth looked at."""
    observe = {
        "midpoints": hf.observe.Sharpness(k=2, every=5, at="midpoints"),
        "iterates": hf.observe.Sharpness(k=2, every=5),
    }
    run = hf.descend(
        NET, (X, Y), 300, learning_rate=ETA, laws=(), observe=observe, save_models=True
    )
    return run, hf.make_problem(NET, (X, Y))


def test_midpoints_are_those_of_three_steps(edge_descent):
    run, problem = edge_descent
    values = run.observed["midpoints"].values
    found = []
    for at in range(0, 301, 5):
        steps = [max(at - lag, 0) for lag in (2, 1, 0)]
        models = [jax.tree.map(lambda a, i=i: a[i], run.models) for i in steps]
        middle = jax.tree.map(lambda a, b, c: (a + 2 * b + c) / 4, *models)
        found.append(dense_top(problem, middle, 2))
    np.testing.assert_allclose(values, np.stack(found), rtol=1e-5)
    # Where descent swings, the iterates are sharper than what it swings around.
    swing = run.observed["iterates"].values[40:, 0] - values[40:, 0]
    assert np.abs(swing).max() > 1e-2 * values[40:, 0].max()


def test_midpoints_need_every_step():
    observe = {"sharpness": hf.observe.Sharpness(at="midpoints")}
    with pytest.raises(ValueError, match="record_every=1"):
        hf.descend(NET, (X, Y), 4, learning_rate=0.1, record_every=2, observe=observe)
    with pytest.raises(ValueError, match="record_every=1"):
        hf.flow(NET, (X, Y), 1.0, observe=observe)
    with pytest.raises(ValueError, match="midpoints"):
        hf.observe.Sharpness(at="middle")


def root_of_squares(b2, eps):
    """P of Adam before its next step, as Optax corrects its averages for their start."""

    def root(point):
        nu = optax.tree.get(point.memory, "nu")
        count = optax.tree.get(point.memory, "count").astype(float)
        correction = jnp.maximum(1 - b2**count, eps)
        return jax.tree.map(lambda s: jnp.sqrt(s / correction) + eps, nu)

    return root


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_preconditioned_spectra_are_those_of_the_dense_matrix(name):
    b2, eps = 0.99, 1e-4
    made = {
        "adam": lambda rate: optax.adam(rate, b2=b2, eps=eps),
        "rmsprop": lambda rate: optax.rmsprop(
            rate, decay=b2, eps=eps, eps_in_sqrt=False
        ),
    }[name]
    root = root_of_squares(b2, eps)
    if name == "rmsprop":

        def root(point):
            nu = optax.tree.get(point.memory, "nu")
            return jax.tree.map(lambda s: jnp.sqrt(s) + eps, nu)

    observe = {
        "sharpness": hf.observe.Sharpness(k=2, every=20, preconditioner=root),
        "roots": root,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It has no clock.
        run = hf.descend(
            NET,
            (X, Y),
            40,
            learning_rate=1e-3,
            optimizer=made,
            laws=(),
            observe=observe,
            save_models=True,
        )
    problem = hf.make_problem(NET, (X, Y))
    for row, at in enumerate((0, 20, 40)):
        model, roots = (
            jax.tree.map(lambda a, i=at: a[i], tree)
            for tree in (run.models, run.observed["roots"])
        )
        scale = 1 / np.sqrt(ravel_pytree(roots)[0])
        np.testing.assert_allclose(
            run.observed["sharpness"].values[row],
            dense_top(problem, model, 2, scale),
            rtol=1e-5,
        )
