"""Matrix laws of wide layers: a summary by default, whole by name."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import homoflow as hf
from homoflow._laws import _as_laws
from homoflow._laws._residuals import relative_violation

X = jr.normal(jr.key(1), (6, 3))
DATA = X, jnp.sin(X[:, :2])
WIDTH = 5


@pytest.fixture(autouse=True)
def few_entries(monkeypatch):
    """As if 24 entries were many; the code does not look at the number otherwise."""
    monkeypatch.setattr(_as_laws, "MAX_WHOLE", WIDTH**2 - 1)


@functools.cache
def model():
    return hf.MLP((3, WIDTH, 4, 2), activation="linear", key=jr.key(0))


def descend(**options):
    options = {"learning_rate": 0.05, "save_models": True, **options}
    return hf.descend(model(), DATA, 40, **options)


def expected(models):
    """H = W₁W₁ᵀ − W₂ᵀW₂ by NumPy, at all recorded times."""
    w, v = (np.asarray(layer.weight) for layer in models.layers[:2])
    return w @ w.swapaxes(1, 2) - v.swapaxes(1, 2) @ v


def test_what_is_recorded_of_a_large_law_is_that_of_numpy():
    run = descend()
    h = expected(run.models)[::4]
    summary = run.observed["matrix[1]"]
    assert dict(run.observed_every)["matrix[1]"] == 4
    np.testing.assert_allclose(summary.norm, np.linalg.norm(h, axis=(1, 2)), rtol=1e-13)
    drift = np.linalg.norm(h - h[0], axis=(1, 2))
    np.testing.assert_allclose(summary.drift, drift, rtol=1e-9, atol=1e-15)
    assert drift[-1] > 1e-6
    diagonal = np.diagonal(h, axis1=1, axis2=2)
    np.testing.assert_allclose(summary.diagonal, diagonal, rtol=1e-12, atol=1e-15)


def test_smaller_laws_and_laws_by_name_are_whole():
    run = descend()
    assert set(run.laws) == {
        "neurons[1]",
        "layers[1]",
        "neurons[2]",
        "layers[2]",
        "matrix[2]",
    }
    assert "matrix[1]" in run.stats["laws_note"]
    named = descend(laws=hf.laws(model()))
    assert not named.observed
    np.testing.assert_allclose(
        named.laws["matrix[1]"], expected(named.models), rtol=1e-12, atol=1e-15
    )


def test_a_flow_restores_the_diagonal_of_a_large_law_and_all_of_it_if_asked():
    run = hf.flow(model(), DATA, 5.0, rtol=1e-4)
    size = sum(float(squares[0]) for squares in run.squared_norms.values())
    diagonal = run.observed["matrix[1]"].diagonal
    assert np.max(np.abs(diagonal - diagonal[0])) <= 1e-13 * size
    assert "neurons[1]" in run.stats["projection"]
    assert "not matrix[1] beyond that" in run.stats["projection"]
    # Beside the diagonal it errs as the weights do.
    assert np.max(run.observed["matrix[1]"].drift) > 1e-9 * size
    whole = hf.flow(model(), DATA, 5.0, rtol=1e-4, project=True)
    assert np.all(whole.observed["matrix[1]"].drift <= 1e-13 * size)
    assert "restores matrix[1]" in whole.stats["projection"]
    # The control: a flow whose laws are not restored.
    loose = hf.flow(model(), DATA, 5.0, project=False, rtol=1e-4)
    unrestored = loose.observed["matrix[1]"].diagonal
    assert np.max(np.abs(unrestored - unrestored[0])) > 1e-9 * size


def test_an_account_is_of_the_laws_that_are_recorded():
    ledger = descend(ledger=True).ledger
    assert ledger is not None
    assert set(ledger) == set(descend().laws)


def test_the_estimate_shows_what_is_no_law():
    (law,) = (law for law in hf.laws(model()) if law.name == "matrix[1]")
    weights, other = (hf.MLP((3, WIDTH, 4, 2), key=jr.key(k)) for k in (1, 2))
    exact = relative_violation((law,), weights, other)
    estimate = relative_violation((law,), weights, other, frozenset({law.name}))
    assert exact[0] > 1e-3
    assert 1 <= estimate[0] / exact[0] <= 4 * WIDTH


def test_under_jit_and_vmap_it_is_the_same():
    def summary(rate):
        return descend(learning_rate=rate, save_models=False).observed["matrix[1]"]

    rates = jnp.array([0.02, 0.05])
    together = jax.jit(jax.vmap(summary))(rates)
    for i, rate in enumerate(rates):
        alone = summary(rate)
        np.testing.assert_allclose(together.norm[i], alone.norm, rtol=1e-12)
        np.testing.assert_allclose(
            together.drift[i], alone.drift, rtol=1e-6, atol=1e-14
        )
