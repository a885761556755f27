"""The exact flow through kinks, against a reference and against midpoint in the limit."""

from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array
from oracles import midpoint
from problems import asserted, flat, relative_error, relu_regression

import homoflow as hf
import homoflow._methods._exact

CASE = np.load(Path(__file__).parent.parent / "data" / "relu_20_30_30_3.npz")
EXACT = hf.Filippov(max_active=40)
#: What the case at t = 60 stays below.
BOUNDS = asserted("exact flow")
ERROR, GRADIENTS, DRIFT = (BOUNDS[k] for k in ("error", "gradients", "drift"))


class Scaled(eqx.Module):
    """A user's loss: c·½‖r‖², with c an array so that no value of it recompiles."""

    c: Array

    def __call__(self, prediction, target):
        return 0.5 * self.c * jnp.sum((prediction - target) ** 2)


class Residual(eqx.Module):
    """A user's model: shared weights, a skip connection, relu and |z|."""

    inner: Array
    bias: Array
    out: Array

    def __call__(self, x):
        for _ in range(2):
            x = x + jnp.maximum(self.inner @ x + self.bias, 0.0)
        return self.out @ jnp.abs(x[:3]) + x[3:]


def exactly(model, data, t1, **options):
    loss = Scaled(jnp.asarray(1.0))
    ts = None if isinstance(t1, jax.core.Tracer) else t1 * np.linspace(0, 1, 5)
    options = {"solver": EXACT, "ts": ts, "laws": (), "loss": loss, **options}
    return hf.flow(model, data, t1, **options)


def normal(seed, shape):
    return jr.normal(jr.key(seed), shape)


def with_random_biases(model, seed=0):
    where = lambda m: [layer.bias for layer in m.layers]  # noqa: E731
    drawn = [0.3 * normal(seed + i, b.shape) for i, b in enumerate(where(model))]
    return eqx.tree_at(where, model, drawn)


def reference_model(tag):
    model = hf.MLP((20, 30, 30, 3), key=jr.key(0))
    weights = [jnp.asarray(CASE[f"W{i}_{tag}"]) for i in (1, 2, 3)]
    return eqx.tree_at(lambda m: [a.weight for a in m.layers], model, weights)


@pytest.fixture(scope="module")
def reference():
    data = jnp.asarray(CASE["X"]), jnp.asarray(CASE["Y"])
    ts = [0.0, 6.0, 20.0, 60.0]
    return hf.flow(
        reference_model("0"), data, 60.0, ts=ts, save_models=True,
        solver=hf.Filippov(max_active=96),
    )  # fmt: skip


@pytest.mark.parametrize(("tag", "index"), [("t6", 1), ("t60", 3)])
def test_reference_case(reference, tag, index):
    model = jax.tree.map(lambda a: a[index], eqx.filter(reference.models, eqx.is_array))
    assert relative_error(model, flat(reference_model(tag))) < ERROR


def test_reference_case_is_cheap_and_slides(reference):
    stats = reference.stats
    assert stats["gradient_evaluations"] < GRADIENTS
    assert 80 < stats["largest_sliding_set"] <= 96
    # So many pairs slide at the end: what entered and did not leave.
    assert 0 < stats["entries"] - stats["exits"] <= stats["largest_sliding_set"]
    assert stats["num_nonunique_pairs"] == 0


def test_reference_case_conserves_the_laws(reference):
    assert set(reference.laws) == {"neurons[1]", "neurons[2]", "layers[1]", "layers[2]"}
    for values in reference.laws.values():
        drift = np.abs(np.asarray(values) - np.asarray(values)[:1])
        assert np.max(drift) < DRIFT


def xor():
    x = jnp.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    return hf.MLP((2, 6, 1), key=jr.key(5)), (x, x[:, :1] * x[:, 1:])


def coincident():
    """Repeated inputs with conflicting labels, and antipodal ones."""
    x = normal(1, (5, 3))
    data = jnp.concatenate([x, x, -x]), normal(51, (15, 1))
    return hf.MLP((3, 6, 1), key=jr.key(101)), data


def leaky_with_biases():
    sizes, key = (3, 5, 5, 1), jr.key(1)
    model = hf.MLP(sizes, activation=hf.LeakyReLU(0.2), use_bias=True, key=key)
    return with_random_biases(model), (normal(3, (14, 3)), normal(4, (14, 1)))


def residual():
    model = Residual(0.4 * normal(5, (4, 4)), 0.3 * normal(6, (4,)), normal(7, (1, 3)))
    return model, (normal(8, (12, 4)), normal(9, (12, 1)))


def convolutional():
    model = hf.ConvNet((1, 6), (3,), 1, kernel_size=3, key=jr.key(2))
    return model, (normal(10, (10, 1, 6)), normal(11, (10, 1)))


class Pooled(eqx.Module):
    """Convolution without bias, relu, max-pooling."""

    conv: eqx.nn.Conv1d
    out: Array

    def __call__(self, x):
        h = eqx.nn.MaxPool1d(2, 2)(jax.nn.relu(self.conv(x)))
        return self.out @ h.ravel()


def pooled():
    conv = eqx.nn.Conv1d(1, 2, 3, use_bias=False, key=jr.key(3))
    model = Pooled(conv, 0.3 * normal(12, (1, 6)))
    return model, (0.7 * normal(10, (10, 1, 8)), normal(11, (10, 1)))


class Maxout(eqx.Module):
    """The largest of three, above a skip connection and kinks away from 0."""

    inner: Array
    wide: Array
    out: Array

    def __call__(self, x):
        h = x + jnp.clip(self.inner @ x, -0.5, 1.0)
        return self.out @ (self.wide @ h).reshape(2, 3).max(1)


def maxout():
    model = Maxout(normal(5, (4, 4)), 0.4 * normal(6, (6, 4)), normal(7, (1, 2)))
    return model, (normal(8, (12, 4)), normal(9, (12, 1)))


def plain():
    return relu_regression()


PROBLEMS = (plain, xor, coincident, leaky_with_biases, residual, convolutional)
PROBLEMS += (pooled, maxout)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.__name__)
def test_fixed_steps_converge_to_the_exact_flow(problem):
    model, data = problem()
    flow = exactly(model, data, 10.0)
    few, many = (
        relative_error(flow.model, midpoint(model, data, 10.0, jnp.asarray(steps)))
        for steps in (4_000, 32_000)
    )
    # Order 1, with some noise from where steps meet kinks: 8 times the steps.
    assert many < few / 4
    assert many < 3e-5
    assert flow.stats["entries"] > 0


def test_midpoint_tells_a_wrong_slope_apart():
    model, data = leaky_with_biases()
    other = hf.MLP(
        (3, 5, 5, 1), activation=hf.LeakyReLU(0.21), use_bias=True, key=jr.key(1)
    )
    other = eqx.tree_at(lambda m: m.layers, other, model.layers)
    right, wrong = (midpoint(m, data, 10.0, jnp.asarray(4_000)) for m in (model, other))
    assert relative_error(model, right) > 0.1  # The flow goes somewhere.
    assert np.linalg.norm(right - wrong) > 1e-3 * np.linalg.norm(right)


@pytest.fixture(scope="module")
def flow():
    return exactly(*plain(), 10.0)


def test_gradient_descent_converges_to_the_exact_flow_at_order_one(flow):
    model, data = plain()
    rates = 10.0 / np.array([500, 2_000, 8_000])
    errors = [
        relative_error(
            hf.descend(
                model, data, steps=round(10.0 / rate), learning_rate=rate, laws=(),
                record_every=round(10.0 / rate),
            ).model,
            flat(flow.model),
        )
        for rate in rates
    ]  # fmt: skip
    order = np.polyfit(np.log(rates), np.log(errors), 1)[0]
    assert 0.8 < order < 1.2


def test_order_of_the_samples_does_not_matter(flow):
    model, (x, y) = plain()
    order = np.random.default_rng(0).permutation(len(x))
    permuted = exactly(model, (x[order], y[order]), 10.0)
    assert relative_error(permuted.model, flat(flow.model)) < 1e-12


def test_order_of_the_neurons_does_not_matter(flow):
    model, data = plain()
    order = np.random.default_rng(0).permutation(8)

    def permuted(model):
        where = lambda m: [layer.weight for layer in m.layers]  # noqa: E731
        first, second = where(model)
        return eqx.tree_at(where, model, [first[order], second[:, order]])

    result = exactly(permuted(model), data, 10.0)
    assert relative_error(result.model, flat(permuted(flow.model))) < 1e-12


def test_a_loss_times_c_is_time_over_c(flow):
    model, data = plain()
    fast = exactly(model, data, 10.0 / 3, loss=Scaled(jnp.asarray(3.0)))
    assert relative_error(fast.model, flat(flow.model)) < 1e-7
    assert fast.losses[-1] == pytest.approx(3 * float(flow.losses[-1]), rel=1e-7)


def test_larger_weights_and_targets_are_an_earlier_time(flow):
    """w → λw, y → λ²y is time × λ⁻² for two layers."""
    model, (x, y) = plain()
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    larger = eqx.combine(jax.tree.map(lambda a: 1.3 * a, arrays), rest)
    result = exactly(larger, (x, 1.3**2 * y), 10.0 / 1.3**2)
    assert relative_error(result.model, 1.3 * flat(flow.model)) < 1e-7


def test_new_values_do_not_compile_anew(flow):
    model, (x, y) = plain()
    before = solves()
    exactly(model, (x + 0.1, y), 4.0, rtol=1e-6)
    assert solves() == before


def solves() -> int:
    """How many forms of the solve JAX has compiled."""
    solve = homoflow._methods._exact._solve
    return sum(f._cached._cache_size() for f in (solve.default, solve.fast_compile))


def test_loss_falls_at_the_rate_of_the_squared_speed():
    """dL/dt = −‖ẇ‖² along the flow, while pairs slide."""
    ts = 9.9 + 1e-3 * np.arange(5)
    flow = exactly(*plain(), float(ts[-1]), ts=ts, rtol=1e-10)
    assert flow.stats["entries"] > flow.stats["exits"]
    losses = np.asarray(flow.losses)
    rate = (losses[0] - 8 * losses[1] + 8 * losses[3] - losses[4]) / 12e-3
    assert rate == pytest.approx(-(float(flow.grad_norms[2]) ** 2), rel=1e-6)


def member(batch, i):
    return jax.tree.map(lambda a: a[i] if eqx.is_array(a) else a, batch)


def test_vmap_over_seeds_equals_single_runs():
    data = plain()[1]
    models = [relu_regression(seed)[0] for seed in (0, 1, 2)]
    nowhere = jax.tree.map(
        lambda a: jnp.full_like(a, jnp.nan) if eqx.is_array(a) else a, models[0]
    )
    stacked = jax.tree.map(
        lambda *a: jnp.stack(a) if eqx.is_array(a[0]) else a[0], *models, nowhere
    )
    batch = eqx.filter_vmap(lambda m: exactly(m, data, 10.0, throw=False))(stacked)
    for i, model in enumerate(models):
        single, got = exactly(model, data, 10.0), member(batch, i)
        assert got.result == hf.RESULTS.successful
        assert relative_error(got.model, flat(single.model)) < 1e-10
        np.testing.assert_allclose(got.losses, single.losses, rtol=1e-10)
        assert got.stats["crossings"] == single.stats["crossings"]
        assert got.stats["entries"] == single.stats["entries"]
    faulty = member(batch, -1)
    assert faulty.result == hf.RESULTS.bad_weights
    assert np.all(np.isnan(faulty.losses))


def one_neuron(w, v):
    """f = v·relu(wx) with one sample, (1, 1)."""
    start = [jnp.array([[w]]), jnp.array([[v]])]
    model = hf.MLP((1, 1, 1), key=jr.key(0))
    model = eqx.tree_at(lambda m: [a.weight for a in m.layers], model, start)
    return model, (jnp.ones((1, 1)), jnp.ones((1, 1)))


def test_zero_weights_stay_where_they_are():
    flow = exactly(*one_neuron(0.0, 0.0), 1.0)
    assert np.all(flat(flow.model) == 0)
    # |∇L(w)| ≤ C|w| for two layers: staying is the only solution [Gronwall].
    assert flow.stats["num_nonunique_pairs"] == 0


def test_a_start_on_a_concave_kink_is_reported():
    """At w = 0 with v(f − y) < 0 rising is one solution, staying at 0 another."""
    flow = exactly(*one_neuron(0.0, 1.0), 1.0)
    assert flow.stats["num_nonunique_pairs"] == 1
    assert np.all(flat(flow.model) == [0, 1])  # The one that was taken.


def test_a_start_on_a_convex_kink_is_unique():
    """At w = 0 with v(f − y) > 0 the side that moves pushes back: 0 is kept."""
    flow = exactly(*one_neuron(0.0, -1.0), 1.0)
    assert flow.stats["num_nonunique_pairs"] == 0
    assert np.all(flat(flow.model) == [0, -1])


def test_more_active_pairs_than_max_active_are_a_result(flow):
    model, data = plain()
    few = int(flow.stats["largest_sliding_set"]) - 1
    short = exactly(model, data, 10.0, solver=hf.Filippov(max_active=few), throw=False)
    assert short.result == hf.RESULTS.kink_slots_exceeded
    assert 0 < short.stats["time_reached"] < 10
    assert np.isfinite(short.losses[0])
    assert np.isnan(short.losses[-1])
    with pytest.raises(hf.TrajectoryError, match="max_active"):
        exactly(model, data, 10.0, solver=hf.Filippov(max_active=few))


class Applied(eqx.Module):
    weight: Array
    fn: Callable = eqx.field(static=True)

    def __call__(self, x):
        return self.fn(self.weight @ x)


def absolute_error(prediction, target):
    return jnp.sum(jnp.abs(prediction - target))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Applied(jnp.ones((2, 3)), jnp.sort), {}, "sort"),
        (Applied(jnp.ones((2, 3)), jnp.sign), {}, "sign \\(a jump\\)"),
        (hf.MLP((3, 4, 2), activation="linear", key=jr.key(0)), {}, "no kinks"),
        (plain()[0], {"loss": absolute_error}, "abs"),
        (plain()[0], {"objective": lambda m, d: jnp.sum(m(d[0][0]))}, "objective"),
        (plain()[0], {"rtol": 1e-20}, "tightest"),
        (plain()[0], {"dt0": 0.1}, "dt0"),
        (hf.MLP((3, 8, 2), key=jr.key(0), dtype=jnp.float16), {}, "float16"),
    ],
)
def test_what_cannot_be_done_is_refused(model, options, message, monkeypatch):
    def compiled(*args, **keywords):
        pytest.fail("something was compiled")

    monkeypatch.setattr("homoflow._methods._exact._solve", compiled)
    with pytest.raises(ValueError, match=message):
        hf.flow(model, plain()[1], 1.0, solver=EXACT, **options)


@pytest.mark.parametrize("max_active", [0, -3])
def test_max_active_must_be_a_positive_integer(max_active):
    with pytest.raises(ValueError, match="max_active"):
        hf.Filippov(max_active=max_active)
