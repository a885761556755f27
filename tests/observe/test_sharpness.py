"""The Hessian's largest eigenvalue against dense ones and finite differences."""

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
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
