"""The largest eigenvalues of Hessians against dense ones, with good and bad guesses."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from points import point_of

import homoflow as hf
from homoflow._jax import _top_eigenvalues
from homoflow._jax._top_eigenvalues import Known, top_eigenvalues
from homoflow._observe._sharpness import Sharpness, TopEigenvalues, hessian_eigenvalues
from homoflow._problem._problem import make_problem

RTOL = 1e-3
SIZE = 60


def spectrum(kind: str, rng) -> np.ndarray:
    return {
        "indefinite": rng.standard_normal(SIZE),
        "negative": -0.1 - rng.random(SIZE),
        "almost equal": np.r_[10, 9.999, 9.998, rng.random(SIZE - 3)],
        "steeper downwards": np.r_[-50 * np.ones(SIZE // 2), rng.random(SIZE // 2)],
        "one value": np.full(SIZE, 3.0),
        "all zero": np.zeros(SIZE),
        "a few outliers": np.r_[100, 50, 20, 0.1 * rng.standard_normal(SIZE - 3)],
        "low rank": np.r_[5, 4, np.zeros(SIZE - 2)],
    }[kind]


KINDS = (
    "indefinite", "negative", "almost equal", "steeper downwards", "one value", "all zero",
    "a few outliers", "low rank",
)  # fmt: skip


def matrices():
    rng = np.random.default_rng(0)
    spectra = np.stack([spectrum(kind, rng) for kind in KINDS])
    turns = np.linalg.qr(rng.standard_normal((len(KINDS), SIZE, SIZE)))[0]
    return turns, spectra, turns * spectra[:, None, :] @ turns.swapaxes(1, 2)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_the_largest_eigenvalues_of_dense_matrices(k, dtype):
    turns, spectra, dense = matrices()
    order = np.argsort(-spectra, axis=1)
    top = np.take_along_axis(spectra, order, axis=1)[:, :k]

    def eigenvectors(first):
        """Those of k eigenvalues, of which `first` is the largest."""
        places = order[:, first:][:, :k]
        return np.take_along_axis(turns, places[:, None, :], axis=2).swapaxes(1, 2)

    rng = np.random.default_rng(1)
    guesses = {
        "random": rng.standard_normal((len(KINDS), k, SIZE)),
        # Their residuals are 0 at once.
        "the smallest": eigenvectors(SIZE - k),
        # As where two eigenvalues have crossed.
        "the next": eigenvectors(k),
        "the largest": eigenvectors(0),
    }
    search = jax.jit(jax.vmap(lambda a, g: top_eigenvalues(lambda v: a @ v, g, RTOL)))
    norms = np.abs(spectra).max(axis=1)[:, None]
    for name, guess in guesses.items():
        found = search(jnp.asarray(dense, dtype), jnp.asarray(guess, dtype))
        assert found.values.dtype == dtype
        errors = np.abs(np.asarray(found.values) - top)
        assert np.all(errors <= 1.01 * RTOL * norms + 1e-30), (name, k)
        vectors = np.asarray(found.vectors, float)
        images = np.einsum("nij,nkj->nki", dense, vectors)
        images -= np.asarray(found.values)[..., None] * vectors
        residuals = np.linalg.norm(images, axis=2)
        assert np.all(residuals <= 1.01 * RTOL * norms + 1e-30)
        np.testing.assert_allclose(found.residuals, residuals, atol=1e-5 * norms.max())
        gram = np.einsum("nki,nli->nkl", vectors, vectors)
        np.testing.assert_allclose(gram - np.eye(k), 0, atol=1e-5)


def test_a_good_guess_saves_products():
    turns, spectra, dense = matrices()
    at = KINDS.index("indefinite")
    a, best = jnp.asarray(dense[at]), int(np.argmax(spectra[at]))
    search = jax.jit(lambda g: top_eigenvalues(lambda v: a @ v, g, RTOL))
    warm = search(jnp.asarray(turns[at][:, best])[None])
    cold = search(jr.normal(jr.key(0), (1, SIZE)))
    assert warm.num_products < cold.num_products
    assert warm.num_products > 8  # It has looked for others, all the same.


def follow(path, k, num_extra):
    """The largest of each diagonal, each known from the one before."""

    def step(carry, diagonal):
        guess, known = carry
        found = top_eigenvalues(lambda v: diagonal * v, guess, 3e-4, known)
        known = Known(found.vectors[-1], known.count + 1)
        return (found.vectors[:k], known), (found.values, found.num_products)

    guess = jr.normal(jr.key(5), (k, path.shape[1]))
    start = guess, Known(guess[-1], jnp.asarray(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_top_eigenvalues, "_MIN_STEPS_KNOWN", num_extra)
        return jax.jit(lambda c, p: jax.lax.scan(step, c, p))(start, path)[1]


@pytest.mark.parametrize("k", [1, 3])
def test_an_eigenvalue_that_nothing_pointed_to_is_found(k):
    """One of the bulk is the largest at once, in a direction of which nothing is known.

    With one guard and two steps; as a control, not without steps.
    """
    rng = np.random.default_rng(1)
    path = np.tile(np.sort(rng.exponential(0.08, 1000))[::-1], (40, 1))
    path[:, :4] = [3, 2.6, 2.2, 1.5]
    path[20:, 500] = 3.6
    top = -np.sort(-path, axis=1)[:, :k]
    values, products = follow(jnp.asarray(path), k, 2)
    np.testing.assert_allclose(values, top, atol=1e-6 * 3.6)
    assert np.all(products[1:20] == k + 4)
    assert np.mean(products[1:]) < k + 5
    values, _ = follow(jnp.asarray(path), k, 0)
    assert np.abs(values[20:, 0] - 3.6).max() > 0.1


def test_a_full_basis_is_thinned_out():
    size = 2000
    diagonal = 1 - (jnp.arange(size) / size) ** 0.5
    diagonal = diagonal.at[0].set(1.003)
    search = jax.jit(lambda g: top_eigenvalues(lambda v: diagonal * v, g, 1e-6))
    found = search(jr.normal(jr.key(1), (1, size)))
    assert found.num_products > 40
    np.testing.assert_allclose(found.values, [1.003], rtol=1e-9)


def test_what_was_not_found_is_nan():
    search = jax.jit(lambda f: top_eigenvalues(lambda v: f * v, jnp.ones((2, 5)), RTOL))
    lost = search(jnp.nan)
    assert np.all(np.isnan(lost.values))
    assert lost.num_products < 10
    impossible = jax.jit(
        lambda g: top_eigenvalues(lambda v: jnp.arange(500.0) ** 0.1 * v, g, 1e-30)
    )
    assert np.all(np.isnan(impossible(jr.normal(jr.key(0), (1, 500))).values))


def problem_of(dtype=jnp.float64):
    x = jr.normal(jr.key(1), (6, 3))
    net = hf.MLP((3, 4, 2), activation=jnp.tanh, key=jr.key(0), dtype=dtype)
    return make_problem(net, (x, x[:, :2]))


def dense_hessian(problem, weights):
    flat, unravel = ravel_pytree(weights)
    return np.asarray(jax.hessian(lambda v: problem.loss(unravel(v)))(flat))


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_the_observable_follows_a_path(dtype):
    """Along a path on which eigenvalues cross, at every point those of the Hessian."""
    problem = problem_of(dtype)
    flat, unravel = ravel_pytree(problem.weights)
    along = jr.normal(jr.key(4), flat.shape, flat.dtype)
    observable = Sharpness(k=2)

    def observe(carry, s):
        point = point_of(problem, unravel(flat + s * along))
        value, carry = observable(point, carry)
        return carry, value

    stops = jnp.linspace(0, 2, 15, dtype=dtype)
    start = observable.init(point_of(problem))
    _, found = jax.jit(lambda c: jax.lax.scan(observe, c, stops))(start)
    assert isinstance(found, TopEigenvalues)
    assert found.values.shape == found.residuals.shape == (15, 2)
    for s, values, residuals in zip(stops, found.values, found.residuals, strict=True):
        dense = np.linalg.eigvalsh(dense_hessian(problem, unravel(flat + s * along)))
        norm = np.abs(dense).max()
        tolerance = 1e-5 if dtype == jnp.float64 else 1e-4
        np.testing.assert_allclose(values, dense[-1:-3:-1], atol=tolerance * norm)
        assert np.all(residuals <= 1e-3 * norm)


def test_derivatives_are_those_of_dense_eigenvalues():
    problem = problem_of()
    flat, unravel = ravel_pytree(problem.weights)
    along = jr.normal(jr.key(5), flat.shape)
    start = Sharpness(k=2).init(point_of(problem)).guess

    def values(s):
        weights = unravel(flat + s * along)
        return hessian_eigenvalues(problem, weights, start)[0].values

    slopes = jax.jit(jax.jacrev(values))(0.0)
    forward = jax.jit(jax.jacfwd(values))(0.0)
    h = 1e-5
    ends = [
        np.linalg.eigvalsh(dense_hessian(problem, unravel(flat + s * along)))[-1:-3:-1]
        for s in (-h, h)
    ]
    expected = (ends[1] - ends[0]) / (2 * h)
    np.testing.assert_allclose(slopes, expected, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(forward, slopes, rtol=1e-10)


def test_bad_numbers_of_eigenvalues_are_refused():
    for k in (0, -1, True, 1.5):
        with pytest.raises((ValueError, TypeError)):
            Sharpness(k=k)
    problem = problem_of()
    with pytest.raises(ValueError, match="has no 21 eigenvalues"):
        Sharpness(k=21).init(point_of(problem))
    whole = Sharpness(k=20)
    point = point_of(problem)
    found, _ = jax.jit(lambda c: whole(point, c))(whole.init(point))
    expected = np.linalg.eigvalsh(dense_hessian(problem, problem.weights))[::-1]
    np.testing.assert_allclose(found.values, expected, atol=1e-10)
