"""Linear laws, which any Runge–Kutta method keeps, beside projection."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")
X = jax.random.normal(jax.random.key(1), (30, 4))
CLASSES = jax.random.randint(jax.random.key(2), (30,), 0, 3)


def run_of(activation: str, sizes, **options) -> hf.Trajectory:
    model = hf.MLP(sizes, activation=activation, key=jax.random.key(0))
    return hf.flow(
        model, (X, CLASSES), 10.0, loss=hf.SoftmaxCrossEntropy(), rtol=1e-3,
        ts=[5.0, 10.0], throw=False, **options,
    )  # fmt: skip


def column_sums(model) -> np.ndarray:
    return np.asarray(model.layers[-1].weight).sum(axis=0)


@pytest.mark.filterwarnings("ignore:The relative error of the final weights")
@pytest.mark.parametrize(
    ("activation", "sizes"),
    [("linear", (4, 6, 3)), ("relu", (4, 6, 3)), ("linear", (4, 5, 5, 3))],
)
def test_projection_keeps_the_sums_over_outputs(activation, sizes):
    model = hf.MLP(sizes, activation=activation, key=jax.random.key(0))
    # Of smooth models it is what nothing is.
    run = run_of(activation, sizes, solver=hf.Averaged())
    assert run.stats["projection"].startswith("on")
    np.testing.assert_allclose(column_sums(run.model), column_sums(model), atol=1e-13)
    size = sum(float(v[0]) for v in run.squared_norms.values())
    for name, values in run.laws.items():
        assert np.max(np.abs(values - values[0])) < 1e-13 * size, name


def test_without_projection_laws_do_drift():
    run = run_of("linear", (4, 6, 3), project=False)
    values = run.laws["matrix[1]"]
    assert np.max(np.abs(values - values[0])) > 1e-4


def test_laws_given_alone_keep_the_linear_ones_too():
    """What is not recorded is conserved all the same."""
    model = hf.MLP((4, 6, 3), activation="linear", key=jax.random.key(0))
    run = run_of("linear", (4, 6, 3), laws=[hf.laws(model)["matrix[1]"]])
    assert list(run.laws) == ["matrix[1]"]
    np.testing.assert_allclose(column_sums(run.model), column_sums(model), atol=1e-13)


class Attention(eqx.Module):
    """Softmax over keys W_k x_j + b: a bias of keys shifts all scores of a query alike."""

    query: jax.Array
    key: jax.Array
    bias: jax.Array
    value: jax.Array

    def __call__(self, x):
        queries, keys = x @ self.query.T, x @ self.key.T + self.bias
        return jax.nn.softmax(queries @ keys.T) @ (x @ self.value.T)


def test_a_bias_that_does_nothing_stays():
    draws = jax.random.split(jax.random.key(3), 4)
    shapes = (3, 2), (3, 2), (3,), (2, 2)
    arrays = (jax.random.normal(k, s) for k, s in zip(draws, shapes, strict=True))
    model = Attention(*arrays)
    x = jax.random.normal(jax.random.key(4), (6, 5, 2))
    run = hf.flow(model, (x, jnp.sin(x)), 2.0, laws=hf.laws(model, x[0]), rtol=1e-6)
    np.testing.assert_allclose(run.model.bias, model.bias, atol=1e-13)
    # The softmax is invariant to G of W_q → GW_q, W_k → G⁻ᵀW_k, and this is restored.
    assert run.stats["projection"].startswith("on")
    values = model.query @ model.query.T - model.key @ model.key.T
    after = run.model.query @ run.model.query.T - run.model.key @ run.model.key.T
    # The law has b bᵀ in it, which stays.
    np.testing.assert_allclose(values, after, atol=1e-12)
