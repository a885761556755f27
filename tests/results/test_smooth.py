"""Averages over time: against closed forms of oscillations."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = hf.MLP((2, 3, 1), activation="linear", key=jax.random.key(0))
X = jax.random.normal(jax.random.key(1), (8, 2))
DATA = (X, X[:, :1])
ETA = 0.01


@pytest.fixture(scope="module")
def run():
    return hf.descend(MODEL, DATA, 200, learning_rate=ETA, save_models=True)


def with_values(run, values):
    """The run with weights that are these numbers, and their squares as a law."""
    models = jax.tree.map(
        lambda a: (
            jnp.ones_like(a) * values.reshape(-1, *[1] * (a.ndim - 1))
            if eqx.is_array(a)
            else a
        ),
        run.models,
    )
    return dataclasses.replace(
        run,
        models=models,
        losses=values**2,
        grad_norms=values,
        laws={"square": values**2},
    )


def test_jumps_from_side_to_side_vanish_and_leave_their_square(run):
    """w = c + (−1)ᵗa has the mean c, and w² has c² + a²: exactly, by the midpoints."""
    jumps = jnp.where(jnp.arange(run.ts.size) % 2 == 0, 1.0, -1.0)
    mean = hf.smooth(with_values(run, 3 + 0.5 * jumps), window=0.2)
    for leaf in jax.tree.leaves(eqx.filter(mean.models, eqx.is_array)):
        np.testing.assert_allclose(leaf, 3, rtol=1e-12)
    np.testing.assert_allclose(mean.laws["square"], 9.25, rtol=1e-12)
    np.testing.assert_allclose(mean.losses, 9.25, rtol=1e-12)
    np.testing.assert_allclose(mean.grad_norms, np.sqrt(9.25), rtol=1e-12)


def test_what_changes_evenly_stays_as_it_is(run):
    line = 2 + 0.1 * run.ts
    mean = hf.smooth(with_values(run, line), window=0.3)
    leaf = jax.tree.leaves(eqx.filter(mean.models, eqx.is_array))[0]
    np.testing.assert_allclose(leaf[:, 0, 0], 2 + 0.1 * mean.ts, rtol=1e-12)
    kept = jax.tree.leaves(eqx.filter(mean.model, eqx.is_array))[0]
    np.testing.assert_allclose(kept, leaf[-1], rtol=1e-15)
    # Half a window, and the four midpoints' two steps, are missing at either end.
    np.testing.assert_allclose(mean.ts[0] - run.ts[0], 0.15 + 2 * ETA)
    np.testing.assert_allclose(run.ts[-1] - mean.ts[-1], 0.15 + 2 * ETA)


def test_models_of_a_run_without_them_are_left_as_they_are(run):
    mean = hf.smooth(dataclasses.replace(run, models=None), window=0.2)
    assert mean.models is None
    assert mean.ts.size == mean.losses.size < run.ts.size


def test_what_cannot_be_averaged_is_refused(run):
    with pytest.raises(ValueError, match="at least 8"):
        hf.smooth(run, window=0.05)
    with pytest.raises(ValueError, match="shorter than the run"):
        hf.smooth(run, window=3.0)
    with pytest.raises(ValueError, match="equally spaced"):
        hf.smooth(hf.flow(MODEL, DATA, 1.0, ts=[0.0, 0.1, 1.0]), window=0.2)
    with pytest.raises(ValueError, match="index a batch"):
        hf.smooth(jax.tree.map(lambda a: a[None], eqx.filter(run, eqx.is_array)), 0.2)
    with pytest.raises(TypeError, match="trajectory"):
        hf.smooth(MODEL, 0.2)
