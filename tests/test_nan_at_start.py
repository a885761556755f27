"""A loss or gradient that is NaN or inf at the start is named as such, by every method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import homoflow as hf

AT_START = hf.RESULTS.nonfinite_at_start
ZERO, ONE = jnp.zeros(2), jnp.ones(2)


def norm(w, data):
    """‖w‖ has a value at 0, and its gradient w / ‖w‖ is NaN there."""
    return data * jnp.sqrt(jnp.sum(w**2))


def guarded(w, data):
    """The branch that is not taken makes the gradient NaN all the same."""
    square = jnp.sum(w**2)
    return data * jnp.where(square > 0, jnp.exp(-jnp.sqrt(square)), 1.0)


def logarithm(w, data):
    """log‖w‖² is −inf at 0."""
    return data * jnp.log(jnp.sum(w**2))


def quotient(w, data):
    """0 / 0 at 0."""
    return data * jnp.sum(w) / jnp.sum(w**2)


def flow(w, objective=guarded, t1=1.0, **options):
    options = {"ts": [0.0, 0.5], **options}
    return hf.flow(w, jnp.ones(()), t1, objective=objective, throw=False, **options)


def descend(w, objective=guarded):
    return hf.descend(
        w, jnp.ones(()), 3, learning_rate=0.1, objective=objective, throw=False
    )


def assert_nothing_is_known(run):
    assert run.result == AT_START
    assert "NaN or inf at the start" in hf.RESULTS[run.result]
    assert np.all(np.isnan(np.asarray(run.losses)))


@pytest.mark.parametrize("objective", [norm, guarded, logarithm, quotient])
@pytest.mark.parametrize("run", [flow, descend])
def test_nan_at_the_start_is_named(run, objective):
    assert_nothing_is_known(run(ZERO, objective))


@pytest.mark.parametrize("run", [flow, descend])
def test_of_a_batch_only_the_runs_that_start_there(run):
    sweep = jax.jit(jax.vmap(run))(jnp.stack([ZERO, ONE]))
    first, second = (jax.tree.map(lambda a, i=i: a[i], sweep) for i in range(2))
    assert_nothing_is_known(first)
    assert second.result == hf.RESULTS.successful
    assert np.all(np.isfinite(np.asarray(second.losses)))
    np.testing.assert_allclose(second.losses[0], np.exp(-np.sqrt(2.0)), rtol=1e-14)


def test_under_jit_with_times_that_begin_later():
    runs = jax.jit(jax.vmap(lambda w: flow(w, ts=[0.5, 0.75])))
    sweep = runs(jnp.stack([ZERO, ONE]))
    first, second = (jax.tree.map(lambda a, i=i: a[i], sweep) for i in range(2))
    assert_nothing_is_known(first)
    assert second.result == hf.RESULTS.successful


@pytest.mark.parametrize(
    "options",
    [
        {"ts": [0.5, 0.75]},
        {"t1": jnp.inf, "ts": None, "objective": norm},
        {"solver": hf.Averaged()},
        {"weight_decay": 0.1},
    ],
    ids=["recorded later", "to a stationary point", "averaged", "with decay"],
)
def test_whatever_the_method_and_the_times(options):
    run = flow(ZERO, **options)
    assert run.result == AT_START


def test_what_fails_later_is_not_called_so():
    """dw/dt = w² from 1 is 1/(1 − t), which ends at t = 1."""

    def blow_up(w, data):
        return -data * jnp.sum(w**3) / 3

    run = flow(jnp.ones(1), blow_up, t1=2.0, ts=[0.0, 0.5, 1.5])
    assert run.result not in (AT_START, hf.RESULTS.successful)
    np.testing.assert_allclose(run.losses[:2], [-1 / 3, -8 / 3], rtol=1e-6)


def test_the_error_says_so():
    with pytest.raises(hf.TrajectoryError, match="NaN or inf at the start"):
        hf.raise_unless_successful(descend(ZERO))
