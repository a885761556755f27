"""Starts that vanish: against the incremental algorithm, and SciPy in dual variables."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize

import homoflow as hf
from homoflow import StationaryKind

pytestmark = pytest.mark.usefixtures("quick_compilation")

X = np.array([[1, 0.5, 0.7, 0], [0.5, 1, 0.1, 0.7]])
Y = np.array([1.0, 0.0])
DATA = (jnp.asarray(X), jnp.asarray(Y))


class DiagonalNet(eqx.Module):
    u: jax.Array
    v: jax.Array

    def __call__(self, x):
        return (self.u**2 - self.v**2) @ x


ONES = DiagonalNet(jnp.ones(4), jnp.ones(4))


def beta(model):
    return np.asarray(model.u**2 - model.v**2)


def incremental_path(x, y):
    """The limit s → 0: saddles and when they are left, in units of log(1/s).

    Of log u = log s − 2∫g and log v = log s + 2∫g, g the gradient by β, the first to come
    to 0 makes a feature active; then β is the least-squares solution with these signs
    [Pesme & Flammarion 2023].
    """
    m, d = x.shape
    grown, point, time, saddles, dates = (
        np.zeros(d),
        np.zeros(d),
        0.0,
        [np.zeros(d)],
        [],
    )
    for _ in range(20):
        rate = -2 * x.T @ (x @ point - y) / m
        if np.max(np.abs(rate)) < 1e-12:
            return saddles, dates
        with np.errstate(divide="ignore", invalid="ignore"):
            left = (np.sign(rate) - grown) / rate
        left = np.where((np.abs(rate) > 1e-12) & (left > 1e-12), left, np.inf)
        step = left.min()
        time, grown = time + step, grown + step * rate
        signs = np.where(np.abs(grown) > 1 - 1e-9, np.sign(grown), 0)
        low = np.where(signs < 0, -np.inf, -1e-13)
        high = np.where(signs > 0, np.inf, 1e-13)
        solved = scipy.optimize.lsq_linear(x, y, (low, high), tol=1e-14)
        point = np.where(signs == 0, 0, solved.x)
        point[np.abs(point) < 1e-9] = 0
        grown = np.where(point != 0, np.sign(point), grown)
        saddles.append(point)
        dates.append(time)
    raise AssertionError("The path has no end.")


def in_dual_variables(log_size, ts):
    """β by SciPy, in m = ∫(minus gradient by β): log u = log s + 2m, log v = log s − 2m."""

    def at(m):
        return np.exp(2 * log_size + 4 * m) - np.exp(2 * log_size - 4 * m)

    def velocity(t, m):
        return -X.T @ (X @ at(m) - Y) / 2

    def jacobian(t, m):
        growth = np.exp(2 * log_size + 4 * m) + np.exp(2 * log_size - 4 * m)
        return -4 * X.T @ X / 2 * growth

    with np.errstate(over="ignore", invalid="ignore"):
        run = scipy.integrate.solve_ivp(
            velocity, (0, ts[-1]), np.zeros(4), "Radau", t_eval=ts, jac=jacobian,
            rtol=1e-11, atol=1e-11,
        )  # fmt: skip
    return at(run.y).T


@pytest.mark.parametrize("digits", [60, 150, 300, 1000])
def test_a_vanishing_start_ends_at_the_sparse_solution(digits):
    log_size = -digits * np.log(10)
    run = hf.early_flow(ONES, DATA, jnp.inf, log_size=log_size)
    assert run.result == hf.RESULTS.successful
    assert run.stats["stationary_kind"] == StationaryKind.minimum
    np.testing.assert_allclose(beta(run.model), [0, 0, 10 / 7, -10 / 49], atol=1e-8)
    assert run.stats["gradient_evaluations"] < 5_000
    ts = -log_size * np.array([0, 1.03, 3, 5.4, 20])
    finite = hf.early_flow(
        ONES, DATA, ts[-1], log_size=log_size, ts=ts, save_models=True
    )
    assert finite.stats["gradient_evaluations"] < 5_000
    if digits <= 150:  # e^(2 log s) is a number.
        exact = in_dual_variables(log_size, ts)
        np.testing.assert_allclose(beta(finite.models), exact, atol=1e-5)
    np.testing.assert_allclose(beta(finite.model), [0, 0, 10 / 7, -10 / 49], atol=1e-8)
    # u·v is conserved, also where neither factor is a number.
    logs = finite.observed["log_weights"]
    np.testing.assert_allclose(logs.u + logs.v, 2 * log_size, rtol=1e-7)


@pytest.mark.parametrize("digits", [60, 300, 1000])
def test_saddles_are_those_of_the_incremental_algorithm(digits):
    saddles, dates = incremental_path(X, Y)
    np.testing.assert_allclose(saddles[-1], [0, 0, 10 / 7, -10 / 49], atol=1e-9)
    log_size = -digits * np.log(10)
    ts = np.linspace(0, -8 * log_size, 1601)
    run = hf.early_flow(ONES, DATA, ts[-1], log_size=log_size, ts=ts, save_models=True)
    found = hf.saddles(run, DATA)
    assert len(found) == len(dates) == 3
    # To O(1/log(1/s)), with these constants whatever s is.
    late = [-0.552, 0.504, -22.968]
    for saddle, point, date, by in zip(found, saddles, dates, late, strict=False):
        np.testing.assert_allclose(beta(saddle.model), point, atol=1e-6)
        assert saddle.kind == StationaryKind.strict_saddle
        assert saddle.smallest_eigenvalue < -0.1
        assert saddle.distance < 1e-3
        assert abs(saddle.departure - (-log_size * date + by)) < saddle.time_error
    # The features in order: 1, then 3 in its place, then 4 with the other sign.
    new = [np.argmax(np.abs(np.stack([s.escape.u, s.escape.v]))) for s in found]
    assert new == [0, 2, 7]
    np.testing.assert_array_equal(found[1].active.u, [True, False, False, False])
    assert found[1].arrival == found[0].departure


def test_the_limit_of_vanishing_starts_is_the_incremental_algorithm():
    saddles, dates = incremental_path(X, Y)
    limit = hf.early_limit(ONES, DATA)
    assert len(limit) == 3
    for found, point, date in zip(limit, saddles, dates, strict=False):
        assert abs(found.date - date) < 1e-5
        assert abs(found.date - date) < found.date_error < 1e-3
        np.testing.assert_allclose(beta(found.saddle.model), point, atol=1e-6)
    # The offsets that departures from 1e-60 to 1e-1000 have in common.
    for found, offset in zip(limit, [-0.552, 0.504, -22.968], strict=True):
        assert abs(found.offset - offset) < 0.01 + 0.1 * found.offset_error
    assert "log(1/s)" in repr(limit[0])


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ((-1.0, -2.0), "three logarithms"),
        ((-2.0, -1.0, -3.0), "each below"),
        ((-1.0, -2.0, -500.0), "do not visit the same"),
    ],
)
def test_starts_that_show_no_limit_are_refused(sizes, match):
    with pytest.raises(ValueError, match=match):
        hf.early_limit(ONES, DATA, log_sizes=sizes)


def test_it_is_the_same_flow_where_both_can_go():
    model = DiagonalNet(jnp.array([1.0, 2.0, 1, 1]), jnp.array([1.0, -1, 0.5, 1]))
    start = jax.tree.map(lambda w: 1e-3 * w, model)
    speed = {"speed": lambda point: point.velocity.u}
    plain = hf.flow(start, DATA, 30.0, rtol=1e-11, observe=speed)
    early = hf.early_flow(
        model, DATA, 30.0, log_size=np.log(1e-3), rtol=1e-10, observe=speed
    )
    np.testing.assert_allclose(
        early.observed["speed"], plain.observed["speed"], atol=1e-8
    )
    np.testing.assert_allclose(early.losses, plain.losses, atol=1e-8)
    np.testing.assert_allclose(early.grad_norms, plain.grad_norms, atol=1e-8)
    np.testing.assert_allclose(early.model.v, plain.model.v, rtol=1e-7, atol=1e-9)
    same = hf.early_flow(start, DATA, 30.0, rtol=1e-10)
    np.testing.assert_allclose(same.losses, early.losses, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            hf.MLP((4, 2, 1), activation="linear", key=jax.random.key(0)),
            {},
            "sign of a",
        ),
        (hf.MLP((4, 2, 1), activation="relu", key=jax.random.key(0)), {}, "jumps at"),
        (DiagonalNet(jnp.zeros(4), jnp.ones(4)), {}, "no logarithm"),
        (DiagonalNet(*[jnp.ones(4, jnp.float32)] * 2), {}, "float64"),
        (ONES, {"log_size": -jnp.inf}, "must be finite"),
        (ONES, {"observe": {"log_weights": lambda p: p.t}}, "another name"),
    ],
)
def test_what_it_is_not_made_for_is_refused(model, options, message):
    y = Y[:, None] if isinstance(model, hf.MLP) else Y
    with pytest.raises(ValueError, match=message):
        hf.early_flow(model, (DATA[0], jnp.asarray(y)), 1.0, **options)


def test_times_that_are_asked_for_end_before_the_flow_does():
    log_size = np.log(1e-60)
    ts = -log_size * np.array([0.0, 1.03, 3.0])
    end = hf.early_flow(ONES, DATA, jnp.inf, log_size=log_size, ts=ts)
    np.testing.assert_allclose(end.ts, ts)
    np.testing.assert_allclose(beta(end.model), [0, 0, 10 / 7, -10 / 49], atol=1e-8)
