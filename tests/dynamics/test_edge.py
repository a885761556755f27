"""What moves laws at the edge of stability: identities, slopes and multipliers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree

import homoflow as hf
from homoflow._dynamics.edge._complementarity import solve_complementarity
from homoflow._dynamics.edge._curvature import Curvature
from homoflow._dynamics.edge._secant import secant_shift
from homoflow._dynamics.edge._symmetric import as_matrix, as_vector, num_pairs

X = jax.random.normal(jax.random.key(1), (9, 3))
Y = jnp.sin(X[:, :2])


def model_with(activation, key=0):
    return hf.MLP((3, 4, 4, 2), activation=activation, key=jax.random.key(key))


MODELS = {
    "linear": (model_with("linear"), (X, Y), {}),
    "squares": (model_with(hf.Power(2)), (X, Y), {}),
    "factorization": (
        hf.MatrixFactorization(4, 3, 2, std=0.5, key=jax.random.key(3)),
        jax.random.normal(jax.random.key(4), (4, 3)),
        {"objective": hf.factorization_objective},
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def setting(request):
    """A curvature, its Hessian, laws as functions of vectors, and a random point."""
    model, data, options = MODELS[request.param]
    problem = hf.make_problem(model, data, **options)
    laws = hf.laws(model)
    w0, unravel = ravel_pytree(problem.weights)
    w = w0 + 0.3 * jax.random.normal(jax.random.key(5), w0.shape)
    curvature = Curvature(jax.jit(lambda w: problem.loss(unravel(w))))
    hessian = jax.jit(jax.hessian(curvature.loss))
    return curvature, hessian, laws, w, unravel


def test_laws_move_against_the_trace_with_the_oscillation(setting):
    """⟨Aw, ∇_w⟨H, Σ⟩⟩ = −tr((AH + HA)Σ) for any symmetric Σ [the twice differentiated
    ⟨Aw, ∇L⟩ = 0]."""
    curvature, hessian, laws, w, unravel = setting
    vectors = jax.random.normal(jax.random.key(6), (3, w.size))
    sizes = jnp.asarray([0.7, -0.2, 1.3])
    gradient = sum(
        s * curvature.slope(w, u, u) for s, u in zip(sizes, vectors, strict=True)
    )
    images = vectors @ hessian(w)
    assert len(laws)
    for law in laws:
        moved = law.bilinear(unravel(w), unravel(gradient))
        traces = [
            2 * s * law.bilinear(unravel(u), unravel(image))
            for s, u, image in zip(sizes, vectors, images, strict=True)
        ]
        scale = float(jnp.linalg.norm(gradient) * jnp.linalg.norm(w))
        np.testing.assert_allclose(moved, -sum(traces), atol=1e-12 * scale)
        assert np.max(np.abs(sum(traces))) > 1e-4 * scale


def test_sharpness_is_not_invariant_under_rescaling(setting):
    """⟨Aw, ∇S⟩ = −2S·q(u), with the slope of the eigenvalue by dense differences."""
    curvature, hessian, laws, w, unravel = setting
    values, vectors = np.linalg.eigh(hessian(w))
    u = jnp.asarray(vectors[:, -1])
    slope = curvature.slope(w, u, u)
    direction = jax.random.normal(jax.random.key(7), w.shape)
    h = 1e-5
    ends = [np.linalg.eigvalsh(hessian(w + s * h * direction))[-1] for s in (1, -1)]
    np.testing.assert_allclose(
        slope @ direction, (ends[0] - ends[1]) / (2 * h), rtol=1e-6
    )
    for law in laws:
        moved = law.bilinear(unravel(w), unravel(slope))
        expected = -2 * values[-1] * law.quadratic(unravel(u))
        atol = 1e-12 * float(jnp.linalg.norm(slope) * jnp.linalg.norm(w))
        np.testing.assert_allclose(moved, expected, atol=atol)


def test_slopes_are_those_of_the_hessians_entries(setting):
    curvature, hessian, _, w, _ = setting
    vectors = jax.random.normal(jax.random.key(8), (3, w.size))

    def block(w):
        return as_vector(vectors @ hessian(w) @ vectors.T)

    expected = jax.jit(jax.jacfwd(block))(w)
    found = jax.jit(curvature.slopes)(w, vectors, jnp.asarray(3))
    np.testing.assert_allclose(found, expected, atol=1e-10 * np.abs(expected).max())
    fewer = jax.jit(curvature.slopes)(w, vectors, jnp.asarray(2))
    np.testing.assert_allclose(fewer[:3], found[:3])
    assert not np.any(fewer[3:])


def test_symmetric_matrices_as_vectors_keep_products():
    drawn = jax.random.normal(jax.random.key(0), (2, 4, 4))
    a, b = drawn + drawn.swapaxes(1, 2)
    np.testing.assert_allclose(as_vector(a) @ as_vector(b), jnp.sum(a * b))
    np.testing.assert_allclose(as_matrix(as_vector(a), 4), a)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_multipliers_solve_the_complementarity_problem(size):
    """200 random problems: X ⪰ 0, Z ⪰ 0 and ⟨X, Z⟩ = 0; for one eigenvalue max(0, −z/m)."""
    rng = np.random.default_rng(size)
    count = num_pairs(size)
    slopes = rng.standard_normal((200, count, count + 2))
    gram = slopes @ slopes.swapaxes(1, 2)
    linear = rng.standard_normal((200, count))
    # Some with eigenvalues that would all rise, some with none.
    identity = np.asarray(as_vector(jnp.eye(size)))
    linear[::3] -= 4 * identity
    linear[1::3] += 4 * identity
    solve = jax.jit(jax.vmap(lambda m, z: solve_complementarity(m, z, size)))
    found = solve(jnp.asarray(gram), jnp.asarray(linear))
    ranks = np.zeros(size + 1, int)
    for m, z, x in zip(gram, linear, np.asarray(found.matrix), strict=True):
        slack = as_matrix(jnp.asarray(z) + m @ as_vector(jnp.asarray(x)), size)
        scale = np.linalg.norm(z)
        assert np.linalg.eigvalsh(x).min() >= -1e-12
        assert np.linalg.eigvalsh(slack).min() >= -1e-9 * scale
        assert abs(np.sum(x * slack)) <= 1e-9 * scale * (1 + np.linalg.norm(x))
        ranks[np.sum(np.linalg.eigvalsh(x) > 1e-7)] += 1
        if size == 1:
            np.testing.assert_allclose(x[0, 0], max(0, -z[0] / m[0, 0]), atol=1e-12)
    assert np.all(ranks > 0)  # None, some and all of the eigenvalues stay.


def test_multipliers_are_those_of_the_nearest_velocity():
    """min ‖v + g‖² subject to J(v) ⪯ 0, by SciPy from the velocities' side."""
    rng = np.random.default_rng(3)
    slopes, gradient = rng.standard_normal((3, 6)), rng.standard_normal(6)
    x = solve_complementarity(
        jnp.asarray(slopes @ slopes.T / 2), jnp.asarray(slopes @ gradient), 2
    ).matrix
    found = -gradient - np.asarray(as_vector(x)) @ slopes / 2

    def largest(v):
        return -np.linalg.eigvalsh(as_matrix(jnp.asarray(slopes @ v), 2))[-1]

    best = scipy.optimize.minimize(
        lambda v: np.sum((v + gradient) ** 2),
        found + 0.1,
        constraints={"type": "ineq", "fun": largest},
        method="SLSQP",
        options={"ftol": 1e-13, "maxiter": 500},
    )
    assert largest(found) >= -1e-9
    np.testing.assert_allclose(np.sum((found + gradient) ** 2), best.fun, rtol=1e-6)


def test_the_width_of_the_oscillation_moves_the_edge_by_the_fourth_derivative():
    """L = Σ s w²/2 + c w⁴/24: between w ± σe the slope is s + c(w²/2 + σ²/6)."""
    slopes, quartic = jnp.asarray([3.0, 2.9, 1.0]), jnp.asarray([0.6, -1.2, 0.0])
    curvature = Curvature(lambda w: jnp.sum(slopes * w**2 / 2 + quartic * w**4 / 24))
    w, threshold = jnp.asarray([0.3, 0.2, 0.1]), jnp.asarray(3.0)
    variances = jnp.asarray([0.04, 0.09])
    secants = slopes[:2] + quartic[:2] * (w[:2] ** 2 / 2 + variances / 6)

    def shift(num):
        kept = jnp.diag(jnp.where(jnp.arange(2) < num, variances, 0))
        num = jnp.asarray(num)
        return secant_shift(curvature, w, jnp.eye(3)[:2], kept, num, threshold)

    assert shift(0) == 0
    np.testing.assert_allclose(shift(1), secants[0] / threshold - 1, rtol=1e-12)
    np.testing.assert_allclose(shift(2), secants[1] / threshold - 1, rtol=1e-12)
