"""What the mean of the steps does to laws, and what their oscillation does."""

import dataclasses
import functools
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = hf.MLP((2, 3, 1), activation="linear", key=jax.random.key(0))
X = jax.random.normal(jax.random.key(1), (8, 2))
DATA = (X, X[:, :1])
LAWS = hf.laws(MODEL, X[0])


def descend(**options):
    defaults = {"learning_rate": 0.1, "save_models": True, "laws": LAWS}
    return hf.descend(MODEL, DATA, 20, **defaults | options)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_parts_are_together_what_the_ledger_says(momentum):
    optimizer = functools.partial(optax.sgd, momentum=momentum)
    run = descend(optimizer=optimizer, ledger=True)
    split = hf.split_discretization(run, LAWS)
    for name, account in run.ledger.items():
        size = np.abs(account.discretization).max()
        difference = split[name].whole - account.discretization
        assert np.abs(difference).max() <= 1e-10 * size
        assert np.abs(split[name].oscillation).max() > 1e-6 * size


def test_a_swing_is_all_oscillation_and_a_drift_is_none():
    """w = a + (−1)ᵗ b + t c has u = c ∓ 2b: Σ q(u) is 4(t − 1)q(b) and the rest."""
    run = descend()
    times = np.arange(run.ts.size)

    def moved(swing, drift):
        def place(w):
            axes = (-1, *(1,) * w.ndim)
            sign, time = (a.reshape(axes) for a in (1.0 - 2 * (times % 2), 1.0 * times))
            return w + sign * swing * w + time * drift * w

        models = jax.tree.map(lambda w: place(w) if eqx.is_array(w) else w, MODEL)
        moving = dataclasses.replace(run, models=models)
        return hf.split_discretization(moving, LAWS)["neurons[1]"]

    q = LAWS["neurons[1]"].value(MODEL)
    terms = np.maximum(times - 1, 0)[:, None]
    np.testing.assert_allclose(
        moved(0.1, 0.02).oscillation, 4 * terms * 0.1**2 * q, atol=1e-14
    )
    np.testing.assert_allclose(moved(0.0, 0.02).oscillation, 0, atol=1e-14)
    np.testing.assert_allclose(
        moved(0.0, 0.02).mean, 0.02**2 * times[:, None] * q, atol=1e-14
    )


def test_at_the_edge_the_oscillation_is_what_the_central_flow_predicts():
    net = hf.MLP((2, 8, 8, 3), activation=(jnp.tanh, "linear"), key=jax.random.key(3))
    x = jax.random.normal(jax.random.key(9), (20, 2))
    y = jnp.stack([jnp.sin(2 * x[:, 0]), jnp.sin(2 * x[:, 1] + 1), x[:, 0]], 1)
    eta, steps = 0.1, 2000
    laws = hf.laws(net, x[0])
    gd = hf.descend(net, (x, 2 * y), steps, learning_rate=eta, save_models=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        central = hf.central_flow(
            net, (x, 2 * y), steps * eta, learning_rate=eta, ts=[0.0, steps * eta]
        )
    name = "layers[2]"
    split = hf.split_discretization(gd, laws)[name]
    predicted = central.observed["edge_drift"][name][-1]
    # Of the two the mean of the steps is the small part, and of the other sign.
    assert -0.1 * predicted < split.mean[-1] < 0
    assert abs(split.oscillation[-1] / predicted - 1) < 0.05


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda run: dataclasses.replace(run, models=None), "save_models=True"),
        (lambda run: jax.tree.map(lambda a: jnp.stack([a, a]), run), "one run"),
        (lambda run: descend(record_every=5), "every step is needed"),
    ],
)
def test_runs_that_will_not_do_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        hf.split_discretization(change(descend()), LAWS)
