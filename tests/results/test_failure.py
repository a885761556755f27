"""A batch of runs of which some fail: the error names them and keeps all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import homoflow as hf

STEPS = 4
#: Descent on ½w² multiplies w by 1 − η. The second run overflows, the others do not.
RATES = np.array([0.5, 1e200, 0.25])


def half_square(w, data):
    return 0.5 * jnp.sum(w**2) * data


def run(rate, throw=True):
    start = jnp.ones(1)
    return hf.descend(
        start,
        jnp.ones(()),
        STEPS,
        learning_rate=rate,
        objective=half_square,
        throw=throw,
    )


@pytest.fixture(scope="module")
def sweep():
    return jax.jit(jax.vmap(lambda rate: run(rate, throw=False)))(jnp.asarray(RATES))


def assert_all_is_kept(kept):
    expected = 0.5 * (1 - RATES[[0, 2], None]) ** (2 * np.arange(STEPS + 1))
    np.testing.assert_allclose(kept.losses[jnp.array([0, 2])], expected, rtol=1e-12)
    second = jax.tree.map(lambda a: a[1], kept)
    assert second.result == hf.RESULTS.diverged


def test_a_batch_names_the_runs_that_failed_and_keeps_all(sweep):
    with pytest.raises(
        hf.TrajectoryError, match="1 of 3 runs did not finish"
    ) as caught:
        hf.raise_unless_successful(sweep)
    assert "diverged: run 1 (to t =" in str(caught.value)
    assert caught.value.trajectory is sweep
    assert_all_is_kept(sweep)


def test_good_runs_come_back(sweep):
    good = jax.tree.map(lambda a: a[jnp.array([0, 2])], sweep)
    assert hf.raise_unless_successful(good) is good


def test_vmap_by_itself_names_them_and_keeps_all():
    with pytest.raises(hf.TrajectoryError, match=r"diverged: run 1 \(to") as caught:
        jax.vmap(run)(jnp.asarray(RATES))
    assert_all_is_kept(caught.value.trajectory)


def test_a_batch_of_batches_has_pairs_of_indices():
    grid = jnp.asarray(RATES[[0, 0, 2, 1]]).reshape(2, 2)
    with pytest.raises(hf.TrajectoryError, match=r"diverged: run \(1, 1\)") as caught:
        jax.vmap(jax.vmap(run))(grid)
    assert caught.value.trajectory.losses.shape == (2, 2, STEPS + 1)


@pytest.mark.parametrize("used", ["losses", "model"])
def test_a_compiled_batch_names_them_whatever_is_used(used):
    compiled = jax.jit(jax.vmap(lambda rate: getattr(run(rate), used)))
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(compiled(jnp.asarray(RATES)))
    message = str(caught.value)
    assert "diverged: run 1 (to t =" in message
    assert "homoflow.raise_unless_successful" in message
    np.testing.assert_array_equal(compiled(jnp.asarray(RATES[[0, 2, 0]])).shape[0], 3)
