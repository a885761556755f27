"""Flows without end on separable data: against support vectors and linear programs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.optimize
from oracles import largest_margin
from problems import separable

import homoflow as hf
from homoflow import StationaryKind

pytestmark = pytest.mark.usefixtures("quick_compilation")

LOGISTIC = {"loss": hf.LogisticLoss()}


class DiagonalNet(eqx.Module):
    u: jax.Array
    v: jax.Array
    power: int = eqx.field(static=True, default=2)

    def __call__(self, x):
        return (self.u**self.power - self.v**self.power) @ x


def linear_net(depth, seed=1):
    sizes = (3, *[3] * (depth - 1), 1)
    return hf.MLP(sizes, activation="linear", key=jax.random.key(seed))


def product(model):
    w = np.eye(model.layers[0].weight.shape[1])
    for layer in model.layers:
        w = np.asarray(layer.weight) @ w
    return w.ravel() / np.linalg.norm(w)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_direction_tends_to_that_of_the_support_vectors(depth):
    x, y = separable()
    direction, margin = largest_margin(x, y)
    data = (x, y[:, None])
    run = hf.flow(linear_net(depth), data, jnp.inf, save_models=True, **LOGISTIC)
    stats, limit = run.stats, run.limit
    assert run.result == hf.RESULTS.successful
    assert stats["stationary_kind"] == StationaryKind.diverges_in_direction
    np.testing.assert_allclose(product(run.model), direction, atol=1e-9)
    assert stats["gradient_evaluations"] < 4_000
    assert stats["kkt_residual"] < 1e-12
    # Of all weights with ‖w‖ = 1 balanced ones have the largest margin, γ·depth^(−depth/2).
    largest = margin * depth ** (-depth / 2)
    np.testing.assert_allclose(stats["normalized_margin"], largest, rtol=1e-9)
    size = np.sqrt(sum(np.sum(np.asarray(a) ** 2) for a in jax.tree.leaves(run.model)))
    np.testing.assert_allclose(size, 1, rtol=1e-12)
    # The flow itself has come as close as it says, and closer than before.
    flat = [np.ravel(a).reshape(len(run.ts), -1) for a in jax.tree.leaves(run.models)]
    units = np.concatenate(flat, axis=1)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    at = np.concatenate([np.ravel(a) for a in jax.tree.leaves(run.model)])
    distances = np.linalg.norm(units - at, axis=1)
    np.testing.assert_allclose(distances[-1], stats["direction_distance"], rtol=1e-6)
    assert distances[-1] < distances[-13] < distances[0]
    # The multipliers hold the weights, by samples whose margin is the smallest.
    rows = np.asarray(y[:, None] * x)
    assert np.all((rows @ direction)[~np.asarray(limit.support).ravel()] > margin)
    np.testing.assert_allclose(np.asarray(limit.margins)[limit.support], 1, rtol=1e-9)


def test_times_and_losses_of_a_flow_without_end_have_logarithms():
    x, y = separable()
    data = (x, y[:, None])
    run = hf.flow(linear_net(1), data, jnp.inf, **LOGISTIC)
    logs = np.asarray(run.observed["log_ts"])
    assert np.all(np.diff(logs) > 0)
    assert logs[-1] == run.stats["log_time_reached"] > 999
    assert run.ts[-1] == run.stats["time_reached"] == jnp.inf
    known = np.isfinite(run.ts) & (run.ts > 0)
    np.testing.assert_allclose(np.log(run.ts[known]), logs[known], rtol=1e-12)
    log_losses = np.asarray(run.observed["log_losses"])
    shown = np.asarray(run.losses) > 1e-300
    np.testing.assert_allclose(
        np.log(run.losses[shown]), log_losses[shown], atol=1e-12 * 700
    )
    # The same flow in logarithmic time from the start.
    late = hf.late_flow(linear_net(1), data, logs[-1], log_ts=logs[60::9])
    np.testing.assert_allclose(
        late.observed["log_losses"], log_losses[60::9], rtol=1e-6, atol=1e-6
    )
    assert len(run.losses) == len(logs) == len(log_losses)
    asked = hf.flow(linear_net(1), data, jnp.inf, ts=[0.5, 3.0], **LOGISTIC)
    np.testing.assert_array_equal(asked.ts, [0.5, 3.0])
    np.testing.assert_allclose(product(asked.model), product(run.model), atol=1e-9)


def test_a_diagonal_net_tends_to_the_largest_margin_in_the_first_norm():
    x, y = separable()
    model = DiagonalNet(jnp.full(3, 0.3), jnp.array([0.3, 0.2, 0.4]))
    run = hf.flow(model, (x, y), jnp.inf, **LOGISTIC)
    rows = np.asarray(y[:, None] * x)
    program = scipy.optimize.linprog(
        np.ones(6),
        A_ub=-np.hstack([rows, -rows]),
        b_ub=-np.ones(len(rows)),
        method="highs-ds",
    )
    assert run.limit is not None
    found = np.asarray(run.limit.model.u**2 - run.limit.model.v**2)
    np.testing.assert_allclose(found, program.x[:3] - program.x[3:], atol=1e-9)
    assert run.limit.curvature > 0
    assert run.limit.is_kkt(1e-12)


def test_a_deep_diagonal_net_puts_all_on_the_largest_feature():
    # Of β·x ≥ 1 the least ‖β‖_{2/3} is 1/x on one feature, from an equal start the largest.
    x = jnp.array([[0.7, 1.0, 0.4]])
    model = DiagonalNet(jnp.full(3, 0.5), jnp.full(3, 0.5), power=3)
    run = hf.flow(model, (x, jnp.ones(1)), jnp.inf, **LOGISTIC)
    assert run.limit is not None
    assert run.limit.degree == pytest.approx(3)
    found = run.limit.model.u**3 - run.limit.model.v**3
    np.testing.assert_allclose(found, [0, 1, 0], atol=1e-9)
    np.testing.assert_allclose(run.limit.margin, 1, rtol=1e-9)


def test_a_weight_that_stays_at_zero_keeps_the_direction_at_a_saddle_of_the_margin():
    x = jnp.array([[1.0, 3.0], [1.2, 2.5], [-1.0, -3.5]])
    y = jnp.array([1.0, 1.0, -1.0])
    stuck = DiagonalNet(jnp.array([0.3, 0.0]), jnp.array([0.3, 0.0]))
    run = hf.flow(stuck, (x, y), jnp.inf, **LOGISTIC)
    assert run.limit is not None
    assert run.limit.curvature < -1
    free = DiagonalNet(jnp.array([0.3, 0.3]), jnp.array([0.3, 0.3]))
    best = hf.flow(free, (x, y), jnp.inf, **LOGISTIC)
    assert best.limit is not None
    assert best.limit.curvature > 0
    assert best.limit.margin > 2 * run.limit.margin


@pytest.mark.parametrize(
    ("labels", "loss"),
    [("mixed", hf.LogisticLoss()), ("separable", hf.SquaredLoss())],
)
def test_no_such_verdict_where_the_flow_has_an_end(labels, loss):
    x, y = separable()
    y = (
        y
        if labels == "separable"
        else jnp.sign(jax.random.normal(jax.random.key(2), 12))
    )
    run = hf.flow(linear_net(2), (x, y[:, None]), jnp.inf, loss=loss)
    assert run.stats["stationary_kind"] == StationaryKind.minimum
    assert run.limit is None
    assert np.isnan(run.stats["normalized_margin"])


def test_polish_moves_to_the_point_next_to_it_and_not_far():
    x, y = separable()
    direction, margin = largest_margin(x, y)

    class Linear(eqx.Module):
        w: jax.Array

        def __call__(self, x):
            return self.w @ x

    aside = np.cross(direction, np.ones(3))
    aside /= np.linalg.norm(aside)
    near = hf.certify_margin(Linear(direction + 0.02 * aside), (x, y), polish=True)
    assert near.is_kkt(1e-12)
    np.testing.assert_allclose(near.margin, margin, rtol=1e-9)
    np.testing.assert_allclose(near.moved, 2 * np.sin(np.arctan(0.02) / 2), rtol=1e-6)
    far = Linear(direction + 0.2 * aside)
    kept = hf.certify_margin(far, (x, y), polish=True)
    assert kept.moved == 0
    assert kept.residual == hf.certify_margin(far, (x, y)).residual > 1e-3


def test_a_finite_time_beyond_the_clock_of_steps_is_reached():
    # dm/dt = |x|²/(1 + eᵐ): m + eᵐ grows by |x|²·t.
    x = jnp.array([[0.6, -1.1]])
    model = hf.MLP((2, 1), activation="linear", key=jax.random.key(0))
    ts = [0.0, 1.0, 1e12, 1e30]
    run = hf.flow(model, (x, jnp.ones((1, 1))), 1e30, ts=ts, **LOGISTIC)
    np.testing.assert_array_equal(run.ts, ts)
    start, size = float(model(x[0])[0]), float(x[0] @ x[0])
    for t, loss in zip(ts, run.losses, strict=True):
        with mpmath.workdps(40):
            grown = start + mpmath.exp(start) + size * mpmath.mpf(t)
            margin = mpmath.findroot(
                lambda m, grown=grown: mpmath.log(grown - m) - m, mpmath.log(grown)
            )
            exact = float(mpmath.log1p(mpmath.exp(-margin)))
        np.testing.assert_allclose(loss, exact, rtol=1e-6)
    assert "logarithmic time" in run.stats["dynamics"]
    assert run.stats["gradient_evaluations"] < 2_000
    # One that an ordinary integration reaches is not solved so.
    soon = hf.flow(model, (x, jnp.ones((1, 1))), 10.0, **LOGISTIC)
    assert soon.stats["dynamics"] == "gradient flow"


def test_a_limit_is_saved_without_its_model(tmp_path):
    x, y = separable()
    run = hf.flow(linear_net(1), (x, y[:, None]), jnp.inf, **LOGISTIC)
    hf.save(tmp_path / "run.npz", run)
    loaded = hf.load(tmp_path / "run.npz", like=linear_net(1))
    assert loaded.limit is not None
    assert loaded.limit.model is None
    np.testing.assert_array_equal(loaded.limit.multipliers, run.limit.multipliers)
    np.testing.assert_array_equal(product(loaded.model), product(run.model))


def test_an_interruption_keeps_what_there_is(monkeypatch):
    from homoflow._methods.margin import _limit_direction

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_limit_direction, "polish", interrupt)
    x, y = separable()
    with pytest.raises(hf.TrajectoryInterrupt) as caught:
        hf.flow(linear_net(1), (x, y[:, None]), jnp.inf, **LOGISTIC)
    kept = caught.value.trajectory
    assert kept.result == hf.RESULTS.interrupted
    assert kept.losses[-1] < np.log(2) / 12


def test_too_few_steps_leave_no_limit():
    x, y = separable()
    data = (x, y[:, None])
    full = hf.flow(linear_net(1), data, jnp.inf, **LOGISTIC)
    few = int(full.stats["steps"]) // 2
    short = hf.flow(
        linear_net(1), data, jnp.inf, max_steps=few, throw=False, **LOGISTIC
    )
    assert short.result == hf.RESULTS.no_stationary_point
    assert short.limit is None


def test_names_of_what_is_recorded_in_any_case_are_refused():
    x, y = separable()
    with pytest.raises(ValueError, match="choose another name"):
        hf.flow(
            linear_net(1),
            (x, y[:, None]),
            jnp.inf,
            observe={"log_ts": lambda p: p.t},
            **LOGISTIC,
        )
