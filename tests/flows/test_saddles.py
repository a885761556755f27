"""Saddles of deep linear networks: ranks, and dates against closed forms."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import homoflow as hf
from homoflow import StationaryKind

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIGMAS = np.array([3.0, 1.5, 0.6])
#: L = ½‖W − diag(σ)‖².
DATA = (jnp.sqrt(3.0) * jnp.eye(3), jnp.sqrt(3.0) * jnp.diag(SIGMAS))


def net(depth, size):
    """Every layer `size` times the identity: balanced, and aligned with the targets."""
    model = hf.MLP((3,) * (depth + 1), activation="linear", key=jax.random.key(0))
    return jax.tree.map(
        lambda w: size * jnp.eye(3) if eqx.is_inexact_array(w) else w, model
    )


def half_way(sigma):
    """The a of ½(σ − a)² = ¼σ²."""
    return sigma * (1 - 1 / np.sqrt(2))


@pytest.mark.parametrize("digits", [3, 12, 30])
def test_a_linear_net_of_two_layers_gains_rank_by_rank(digits):
    size = 10.0**-digits
    # a' = 2a(σ − a) for each singular value a of the product, from s².
    a = half_way(SIGMAS)
    odds = np.log(a / (SIGMAS - a)) + np.log(SIGMAS - size**2) - 2 * np.log(size)
    dates = odds / (2 * SIGMAS)
    ts = np.linspace(0, dates[-1] + 10, 1201)
    run = hf.flow(
        net(2, size), DATA, ts[-1], ts=ts, save_models=True, laws=(),
        solver=hf.Rodas5P(), rtol=1e-8,
    )  # fmt: skip
    found = hf.saddles(run, DATA)
    assert [s.ranks["layers[0].weight"] for s in found] == [0, 1, 2]
    assert [s.ranks["layers[1].weight"] for s in found] == [0, 1, 2]
    for i, saddle in enumerate(found):
        assert saddle.kind == StationaryKind.strict_saddle
        np.testing.assert_allclose(saddle.loss, np.sum(SIGMAS[i:] ** 2) / 2, rtol=1e-6)
        np.testing.assert_allclose(saddle.smallest_eigenvalue, -SIGMAS[i], rtol=1e-6)
        # At s = 1e-3 the next mode has begun to grow before.
        others = 0.1 if digits == 3 else 1e-6
        assert abs(saddle.departure - dates[i]) < 0.1 * saddle.time_error + others
        order = dates[i] * SIGMAS[i] / -np.log(size)
        assert abs(order - 1) < 1 / (digits * np.log(10))
        # The way out is along the mode that grows.
        way = np.abs(np.asarray(saddle.escape.layers[0].weight))
        assert np.unravel_index(np.argmax(way), (3, 3)) == (i, i)


@pytest.mark.parametrize("digits", [4, 6, 10])
def test_a_linear_net_of_three_layers_waits_for_a_power_of_the_start(digits):
    size = 10.0**-digits

    def date(sigma):
        # w' = w²(σ − w³) for each singular value of a layer, in 1/w.
        end = half_way(sigma) ** (1 / 3)
        return scipy.integrate.quad(
            lambda z: 1 / (sigma - z**-3), 1 / end, 1 / size, limit=500,
            points=[2 / end, 10 / end, 1e3 / end], epsrel=1e-10,
        )[0]  # fmt: skip

    dates = np.array([date(sigma) for sigma in SIGMAS])
    np.testing.assert_allclose(dates * size * SIGMAS, 1, atol=20 * size)
    ts = np.concatenate([[0.0], np.geomspace(0.1 / size, 1.2 * dates[-1], 400)])
    run = hf.flow(
        net(3, size), DATA, ts[-1], ts=ts, save_models=True, laws=(),
        solver=hf.Rodas5P(), rtol=1e-8,
    )  # fmt: skip
    found = hf.saddles(run, DATA)
    assert [s.ranks["layers[1].weight"] for s in found] == [0, 1, 2]
    for saddle, exact in zip(found, dates, strict=True):
        assert abs(saddle.departure - exact) <= 1.01 * saddle.time_error
        assert abs(saddle.smallest_eigenvalue) < 10 * size
    assert found[0].kind == StationaryKind.degenerate_saddle


def test_a_large_start_passes_no_saddle():
    run = hf.flow(net(2, 1.0), DATA, 20.0, save_models=True)
    assert hf.saddles(run, DATA) == ()


def test_a_slow_valley_is_no_saddle():
    # ‖∇L‖ falls by 1e4 and rises no more: a valley that ends in a minimum.
    class Valley(eqx.Module):
        w: jax.Array

        def __call__(self, x):
            return x @ self.w

    x = jnp.diag(jnp.array([1.0, 1e-2]))
    data = (x, x @ jnp.ones(2))
    run = hf.flow(Valley(jnp.array([3.0, -2.0])), data, 1e4, save_models=True)
    assert run.grad_norms[20] < 1e-3 * run.grad_norms[0]
    assert run.losses[20] > 2 * run.losses[-1]
    assert hf.saddles(run, data) == ()


def test_a_slow_stretch_without_a_stationary_point_is_no_saddle():
    # L = −w − 0.98 sin w: ‖∇L‖ falls to 0.02 at w = π and rises again.
    def objective(w, data):
        del data
        return jnp.sum(-w - 0.98 * jnp.sin(w))

    run = hf.flow(
        jnp.zeros(1), None, 60.0, objective=objective, save_models=True,
        ts=np.linspace(0, 60, 601), rtol=1e-8,
    )  # fmt: skip
    lowest = int(np.argmin(run.grad_norms))
    assert 0 < lowest < 600
    assert run.grad_norms[lowest] < 0.03 < 1 < np.max(run.grad_norms[lowest:])
    assert hf.saddles(run, None, objective=objective) == ()


def test_a_run_that_ends_on_a_saddle_has_not_left_it():
    run = hf.flow(net(2, 1e-6), DATA, 3.0, save_models=True)
    (saddle,) = hf.saddles(run, DATA)
    assert np.isnan(saddle.departure)
    assert saddle.ranks["layers[0].weight"] == 0
    assert "loss 5.805" in repr(saddle)


def test_what_they_need_is_asked_for():
    bare = hf.flow(net(2, 1.0), DATA, 1.0)
    with pytest.raises(ValueError, match="save_models=True"):
        hf.saddles(bare, DATA)
    kept = hf.flow(net(2, 1.0), DATA, 1.0, save_models=True)
    with pytest.raises(ValueError, match="between 0 and 1"):
        hf.saddles(kept, DATA, tolerance=2.0)
    relu = hf.MLP((3, 3, 3), activation="relu", key=jax.random.key(0))
    kinked = hf.flow(relu, DATA, 0.1, save_models=True)
    with pytest.raises(ValueError, match="jumps at"):
        hf.saddles(kinked, DATA)
