"""When `flow` follows kinks exactly without being asked, and what it says of it."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array
from problems import flat, linear_regression, relative_error, relu_regression

import homoflow as hf

T1 = 10.0
TS = np.linspace(0, T1, 3)


def flow(seed=0, **options):
    return hf.flow(*relu_regression(seed), T1, **{"ts": TS, "laws": (), **options})


@pytest.fixture(scope="module")
def exact():
    return flow(solver=hf.Filippov(), rtol=1e-8)


def test_kinks_are_followed_by_default(exact):
    chosen = flow()
    assert chosen.stats["solver"] == "Filippov"
    assert chosen.stats["solver_reason"].code == "nonsmooth_exact"
    assert exact.stats["solver_reason"].code == "requested"
    np.testing.assert_array_equal(flat(chosen.model), flat(exact.model))
    np.testing.assert_array_equal(chosen.losses, exact.losses)


class Recurrent(eqx.Module):
    """A user's model with kinks inside a loop, where they are not followed."""

    weight: Array
    out: Array

    def __call__(self, x):
        def step(h, _):
            return jax.nn.relu(self.weight @ h + x), None

        return self.out @ jax.lax.scan(step, x, None, length=2)[0]


def total(model, data):
    x, y = data
    return 0.5 * jnp.mean(jnp.sum((jax.vmap(model)(x) - y) ** 2, 1))


@pytest.mark.filterwarnings("ignore:The relative error of the final weights")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dt0": 1e-3}, "`dt0`"),
        ({"adjoint": dfx.DirectAdjoint()}, "`adjoint`"),
        ({"objective": total}, "custom `objective`"),
        ({"weight_decay": 0.1}, "`weight_decay`"),
        ({"solver": hf.Auto(follow_kinks=False)}, "it is not wanted"),
    ],
)
def test_otherwise_it_averages_and_says_why(options, reason):
    averaged = flow(**{"max_steps": 2000, **options})
    assert averaged.stats["solver"] == "Heun"
    assert "approximate (not the exact flow: " in str(averaged.stats["solver_reason"])
    assert reason in str(averaged.stats["solver_reason"])
    assert averaged.stats["error_estimate"] > 0


def test_float32_is_exact_too():
    x, y = relu_regression()[1]
    model = hf.MLP((3, 8, 2), key=jr.key(0), dtype=jnp.float32)
    exact = hf.flow(model, (x, y), 1.0)
    assert exact.stats["solver"] == "Filippov"
    assert exact.losses.dtype == jnp.float32


@pytest.mark.filterwarnings("ignore:The relative error of the final weights")
def test_kinks_in_a_loop_are_named():
    keys = jr.split(jr.key(0), 2)
    model = Recurrent(*(jr.normal(key, (3, 3)) for key in keys))
    x = jr.normal(jr.key(1), (5, 3))
    averaged = hf.flow(model, (x, x), 1.0, max_steps=2000)
    assert averaged.stats["solver"] == "Heun"
    assert "scan" in str(averaged.stats["solver_reason"])


@pytest.mark.filterwarnings("ignore:The relative error of the final weights")
def test_too_many_pairs_average(monkeypatch):
    monkeypatch.setattr("homoflow._methods._rules.MAX_FOLLOWED_PAIRS", 95)
    averaged = flow(max_steps=2000)
    assert averaged.stats["solver"] == "Heun"
    assert "96 pairs of a sample and a kink" in str(averaged.stats["solver_reason"])


@pytest.mark.filterwarnings("ignore:The relative error of the final weights")
def test_averaging_can_be_asked_for(exact):
    averaged = flow(rtol=1e-5, solver=hf.Averaged())
    assert averaged.stats["solver"] == "Heun"
    assert "not the exact flow" not in str(averaged.stats["solver_reason"])
    error = relative_error(averaged.model, flat(exact.model))
    assert 1e-8 < error < averaged.stats["error_estimate"]


def test_averaging_is_for_smooth_models_what_nothing_is():
    model, data = linear_regression()
    plain = hf.flow(model, data, 1.0)
    named = hf.flow(model, data, 1.0, solver=hf.Averaged())
    assert dict(plain.stats) == dict(named.stats)
    np.testing.assert_array_equal(flat(plain.model), flat(named.model))


def test_it_is_the_same_flow_inside_of_jit_and_vmap(exact):
    rtols = jnp.array([1e-8, 1e-4])
    inside = eqx.filter_jit(eqx.filter_vmap(lambda rtol: flow(rtol=rtol)))(rtols)
    assert inside.stats["solver"] == "Filippov"
    weights = np.concatenate(
        [np.asarray(layer.weight[0]).ravel() for layer in inside.model.layers]
    )
    assert relative_error(exact.model, weights) < 1e-12
    # The second is as accurate as it was asked to be, and no more.
    np.testing.assert_allclose(inside.losses[1], flow(rtol=1e-4).losses, rtol=1e-10)
    assert 1e-12 < abs(inside.losses[1, -1] - exact.losses[-1]) < 1e-3


def test_an_absolute_tolerance_is_one_for_the_mean_over_weights(exact):
    size = float(np.linalg.norm(flat(exact.model)))
    mean = size / np.sqrt(flat(exact.model).size)
    relative = flow(rtol=1e-4)
    absolute = flow(rtol=1e-14, atol=1e-4 * mean)
    assert absolute.stats["solver"] == "Filippov"
    errors = [relative_error(f.model, flat(exact.model)) for f in (relative, absolute)]
    assert 0.1 < errors[1] / errors[0] < 10
    named = flow(rtol=1e-14, solver=hf.Filippov(atol=1e-4 * mean))
    np.testing.assert_array_equal(named.losses, absolute.losses)


@pytest.mark.parametrize("atol", [-1.0, jnp.nan, jnp.inf])
def test_an_absolute_tolerance_that_makes_no_sense_is_refused(atol, refused):
    refused(lambda: flow(atol=atol), "`atol` must be positive and finite")


def test_an_estimate_that_auto_is_asked_for_is_made(exact):
    run = flow(rtol=1e-5, solver=hf.Auto(error_estimate=True))
    error = relative_error(run.model, flat(exact.model))
    assert error < run.stats["error_estimate"]


@pytest.mark.filterwarnings("ignore:The relative error of the final weights")
def test_what_cannot_be_followed_to_the_end_is_averaged(monkeypatch):
    monkeypatch.setattr("homoflow._methods._exact.FIRST_ACTIVE", (2, 2))
    monkeypatch.setattr("homoflow._methods._filippov.MAX_ACTIVE", 2)
    monkeypatch.setattr("homoflow._methods._choose.MAX_ACTIVE_BY_DEFAULT", 2)
    averaged = flow(max_steps=4000)
    assert averaged.result == hf.RESULTS.successful
    assert averaged.stats["solver"] == "Heun"
    assert "not the exact flow: at t = " in str(averaged.stats["solver_reason"])
    assert "More pairs of a sample and a unit" in str(averaged.stats["solver_reason"])
    assert averaged.stats["error_estimate"] > 0
    # Asked for by name, it is not replaced by something else.
    with pytest.raises(hf.TrajectoryError, match="More pairs"):
        flow(solver=hf.Filippov())


def test_slots_grow_outside_of_jit(exact, monkeypatch):
    most = int(exact.stats["largest_sliding_set"])
    for name in ("FIRST_ACTIVE", "TRACED_ACTIVE"):
        monkeypatch.setattr(f"homoflow._methods._exact.{name}", (most - 1, 1))
    grown = flow(rtol=1e-8)
    assert grown.result == hf.RESULTS.successful
    assert relative_error(grown.model, flat(exact.model)) < 1e-10
    inside = eqx.filter_jit(lambda: flow(rtol=1e-8, throw=False))()
    assert inside.result == hf.RESULTS.kink_slots_exceeded


def test_error_estimate_of_the_exact_flow_is_honest():
    ratios = []
    for seed in range(4):
        finest = flow(seed, rtol=1e-11)
        loose = flow(seed, rtol=1e-6, estimate_error=True)
        error = relative_error(loose.model, flat(finest.model))
        ratios.append(float(loose.stats["error_estimate"]) / error)
    assert np.all(np.array(ratios) > 1)
    assert np.median(ratios) < 20
