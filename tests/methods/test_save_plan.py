"""What is recorded while a solve runs is what is recorded of its states afterwards."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import homoflow as hf

TS = np.linspace(0, 3.0, 7)


@pytest.fixture
def problem():
    model = hf.MLP((3, 4, 2), activation="linear", key=jr.key(0))
    x = jr.normal(jr.key(1), (6, 3))
    return model, (x, x[:, :2] ** 2)


def both_ways(run, monkeypatch):
    """`run` with states kept, and with none; nothing is compiled for another."""
    afterwards = run()
    jax.clear_caches()
    monkeypatch.setattr("homoflow._methods._save_plan.MAX_STORED", 0)
    along = run()
    jax.clear_caches()
    return afterwards, along


def arrays_of(model):
    return jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))


def assert_close(afterwards, along):
    for one, other in zip(*map(jax.tree.leaves, (afterwards, along)), strict=True):
        if eqx.is_inexact_array(one):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


def test_losses_laws_and_models_of_a_projected_flow(problem, monkeypatch):
    runs = both_ways(
        lambda: hf.flow(*problem, 3.0, ts=TS, save_models=True), monkeypatch
    )
    assert_close(*runs)
    for run in runs:
        assert run.stats["projection"].startswith("on")
        for name, values in run.laws.items():
            assert np.abs(values - values[0]).max() < 1e-13, name
    # The end is the last of the times.
    for last, end in zip(*map(arrays_of, (runs[0].models, runs[0].model)), strict=True):
        np.testing.assert_array_equal(last[-1], end)


def test_a_flow_that_stops_midway(problem, monkeypatch):
    def run():
        return hf.flow(
            *problem, 3.0, ts=TS, laws=(), rtol=1e-8, max_steps=12, throw=False
        )

    afterwards, along = both_ways(run, monkeypatch)
    assert_close(afterwards, along)
    known = np.isfinite(afterwards.losses)
    assert 0 < known.sum() < len(TS)
    reached = float(afterwards.stats["time_reached"])
    np.testing.assert_array_equal(known, reached >= TS)


def test_derivatives(problem, monkeypatch):
    model, data = problem

    @eqx.filter_grad
    def slope(model):
        return jnp.sum(jnp.sin(hf.flow(model, data, 3.0, ts=TS, laws=()).losses))

    assert_close(*both_ways(lambda: slope(model), monkeypatch))


class _Stiff(eqx.Module):
    w: jax.Array


def test_the_derivative_by_the_final_time_is_the_velocity_of_a_stiff_flow():
    # Steps of an explicit solver are bounded by stability here, and cut at each time.
    rates = jnp.array([1.0, 7.0, 60.0, 400.0])

    def objective(model, _):
        return 0.5 * jnp.sum(rates * model.w**2) + 0.1 * jnp.sum(model.w**4)

    def run(t1):
        model = _Stiff(jnp.array([1.0, -0.5, 0.3, 0.8]))
        return hf.flow(model, None, t1, objective=objective, laws=(), throw=False)

    def ends(t1):
        flow = run(t1)
        return (flow.model.w, flow.losses), flow

    by_time = jax.jit(jax.jacrev(ends, has_aux=True))
    (of_weights, of_losses), flow = by_time(jnp.asarray(3.0))
    velocity = -jax.grad(lambda m: objective(m, None))(flow.model).w
    np.testing.assert_allclose(of_weights, velocity, rtol=1e-8, atol=1e-12)
    # The i-th time is i/100 of the last.
    expected = -jnp.linspace(0, 1, 101) * flow.grad_norms**2
    np.testing.assert_allclose(of_losses, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("quick_compilation")
def test_forward_mode_takes_an_adjoint_and_says_so():
    """Of w' = −rate·w the end is e^{−rate·t}; by the rate, −t times that."""

    def end(rate, **options):
        def objective(model, _):
            return 0.5 * rate * jnp.sum(model.w**2)

        run = hf.flow(
            _Stiff(jnp.ones(1)), None, 0.7, objective=objective, laws=(), **options
        )
        return run.model.w[0]

    def slope(**options):
        return jax.jvp(lambda rate: end(rate, **options), (2.0,), (1.0,))[1]

    with pytest.raises(TypeError, match=r"adjoint=diffrax\.ForwardMode\(\)"):
        slope()
    forward = slope(adjoint=dfx.ForwardMode())
    np.testing.assert_allclose(forward, -0.7 * np.exp(-1.4), rtol=1e-7)
