"""ReLU networks to the end without end: against SciPy, Ei, and the flow in time itself."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.optimize

import homoflow as hf
from homoflow import StationaryKind

pytestmark = pytest.mark.usefixtures("quick_compilation")

LOGISTIC: dict[str, Any] = {"loss": hf.LogisticLoss()}
CORNERS = jnp.array([[1.1, 0.9], [-1.0, -1.2], [0.9, -1.0], [-1.0, 1.1]])
XOR = CORNERS, jnp.array([[1.0], [1.0], [-1.0], [-1.0]])


def relu_net(seed, sizes=(2, 8, 1)):
    return hf.MLP(sizes, key=jax.random.key(seed))


def least_weights_on_piece(model, x, margins_of):
    """Where SLSQP goes from a limit: least ½‖w‖² on its piece, margins ≥ 1, z = 0 held."""
    w, a = (np.asarray(layer.weight) for layer in model.layers)
    x = np.asarray(x)
    z = x @ w.T
    held = np.abs(z) < 1e-9
    on = (z > 0) & ~held

    def outputs(flat):
        first, last = flat[: w.size].reshape(w.shape), flat[w.size :].reshape(a.shape)
        return (on * (x @ first.T)) @ last.T

    def held_z(flat):
        return (x @ flat[: w.size].reshape(w.shape).T)[held]

    start = np.concatenate([w.ravel(), a.ravel()])
    found = scipy.optimize.minimize(
        lambda v: 0.5 * v @ v,
        start,
        jac=lambda v: v,
        constraints=[
            {"type": "ineq", "fun": lambda v: margins_of(outputs(v)) - 1},
            {"type": "eq", "fun": held_z},
        ],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 300},
    )
    return start, found.x


@pytest.mark.parametrize("seed", [1, 4])
def test_a_relu_network_comes_to_a_point_of_maximal_margin(seed):
    x, y = XOR
    run = hf.flow(relu_net(seed), XOR, jnp.inf, **LOGISTIC)
    limit = run.limit
    assert run.stats["stationary_kind"] == StationaryKind.diverges_in_direction
    assert limit is not None
    assert limit.is_kkt(1e-10)
    assert limit.on_kinks is not None
    assert int(limit.on_kinks.sum()) > 0
    assert run.stats["solver"] == "Filippov"
    logs = np.asarray(run.observed["log_ts"])
    assert logs[0] == -np.inf
    assert np.all(np.diff(logs) > 0)
    # On its piece nothing is smaller.
    start, least = least_weights_on_piece(
        limit.model, x, lambda f: (np.asarray(y) * f).ravel()
    )
    np.testing.assert_allclose(np.linalg.norm(least), np.linalg.norm(start), rtol=1e-6)
    np.testing.assert_allclose(limit.margin, np.linalg.norm(start) ** -2, rtol=1e-9)
    # Weights aside of the limit are no such point.
    aside = jax.tree.map(
        lambda w: w * (1 + 1e-2 * jnp.sin(jnp.arange(w.size).reshape(w.shape))),
        limit.model,
    )
    assert not hf.certify_margin(aside, XOR).is_kkt(1e-4)


def test_a_limit_that_the_flow_was_far_from_is_said_to_be_extrapolated():
    """Twelve points that a network of four units tells apart, and not by little."""
    key, of_data = jax.random.split(jax.random.key(8))
    of_teacher, of_points = jax.random.split(of_data)
    teacher = hf.MLP((4, 4, 1), key=of_teacher)
    points = jax.random.normal(of_points, (400, 4))
    outputs = jax.vmap(teacher)(points)[:, 0]
    clear = np.flatnonzero(np.abs(outputs) > np.median(np.abs(outputs)))[:12]
    data = points[clear], jnp.sign(outputs[clear])[:, None]
    with pytest.warns(UserWarning, match="that the flow goes to it is not"):
        run = hf.flow(hf.MLP((4, 8, 1), key=key), data, jnp.inf, **LOGISTIC)
    assert run.limit is not None
    assert run.limit.is_kkt(1e-10)
    assert run.stats["direction_distance"] > 0.05


def test_classes_have_limits_too():
    x = jax.random.normal(jax.random.key(5), (9, 2))
    y = jnp.arange(9) % 3
    x = x * 0.2 + jnp.array([[1.0, 0.0], [-0.6, 0.9], [-0.5, -1.0]])[y]
    loss = hf.SoftmaxCrossEntropy()
    run = hf.flow(relu_net(2, (2, 8, 3)), (x, y), jnp.inf, loss=loss)
    assert run.limit is not None
    assert run.limit.is_kkt(1e-10)
    others = np.array([[c for c in range(3) if c != k] for k in np.asarray(y)])

    def margins_of(f):
        rows = np.arange(9)
        return (f[rows, np.asarray(y)][:, None] - f[rows[:, None], others]).ravel()

    start, least = least_weights_on_piece(run.limit.model, x, margins_of)
    np.testing.assert_allclose(np.linalg.norm(least), np.linalg.norm(start), rtol=1e-6)


def test_logarithmic_time_is_the_same_flow():
    model = relu_net(1)
    logs = np.log(np.linspace(0.5, 50, 12))
    late = hf.late_flow(model, XOR, logs[-1], log_ts=logs, rtol=1e-10)
    plain = hf.flow(
        model, XOR, 50.0, ts=np.exp(logs) * (1 - 1e-15), rtol=1e-10, **LOGISTIC
    )
    assert late.stats["solver"] == plain.stats["solver"] == "Filippov"
    assert late.stats["largest_sliding_set"] > 0
    np.testing.assert_allclose(late.ts, np.exp(logs), rtol=1e-12)
    np.testing.assert_allclose(late.losses, plain.losses, rtol=1e-9)
    np.testing.assert_allclose(late.grad_norms, plain.grad_norms, rtol=1e-8)
    np.testing.assert_allclose(late.observed["log_losses"], np.log(late.losses))
    for one, other in zip(
        jax.tree.leaves(late.laws), jax.tree.leaves(plain.laws), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-9)


def test_one_unit_at_late_times_has_a_closed_form():
    # Balanced, along x: dm/dt = 2|x|m/(1 + eᵐ), so that log m + Ei(m) grows by 2|x|t.
    x = jnp.array([[0.6, 0.8]])
    model = relu_net(0, (2, 1, 1))
    weights = (1.2 * x, jnp.array([[1.2]]))
    model = eqx.tree_at(lambda m: [layer.weight for layer in m.layers], model, weights)
    ts = [1.0, 1e12, 1e30]
    run = hf.flow(model, (x, jnp.ones((1, 1))), 1e30, ts=ts, **LOGISTIC)
    np.testing.assert_array_equal(run.ts, ts)
    assert "logarithmic time" in run.stats["dynamics"]
    assert run.stats["solver"] == "Filippov"
    for t, loss in zip(ts, run.losses, strict=True):
        with mpmath.workdps(40):
            start = mpmath.mpf("1.44")
            grown = mpmath.log(start) + mpmath.ei(start) + 2 * mpmath.mpf(t)
            guess = mpmath.log(grown) + mpmath.log(mpmath.log(grown) + 1)
            margin = mpmath.findroot(
                lambda m, grown=grown: mpmath.log(
                    (grown - mpmath.log(m)) / mpmath.ei(m)
                ),
                guess,
            )
            exact = float(mpmath.log1p(mpmath.exp(-margin)))
        np.testing.assert_allclose(loss, exact, rtol=1e-6)


def test_a_network_that_does_not_separate_has_no_limit():
    # One unit cannot tell opposite corners from the others.
    run = hf.flow(relu_net(0, (2, 1, 1)), XOR, jnp.inf, throw=False, **LOGISTIC)
    assert run.limit is None
    assert run.result == hf.RESULTS.end_not_reached
    assert np.isnan(run.stats["normalized_margin"])


@pytest.mark.parametrize(
    ("model", "options", "match"),
    [
        (relu_net(0), {"loss": hf.SquaredLoss()}, "exponential type"),
        *(
            (
                jax.tree.map(
                    lambda w, shift=shift: w + shift,
                    hf.MLP((2, 4, 1), use_bias=True, key=jax.random.key(0)),
                ),
                LOGISTIC,
                "not homogeneous",
            )
            for shift in (0.1, 0.0)  # Biases of 0 are biases.
        ),
        (relu_net(0), {"solver": hf.Filippov(events=5), **LOGISTIC}, "finite `t1`"),
        (relu_net(0), {"solver": hf.Averaged(), **LOGISTIC}, "leave `solver` out"),
        (relu_net(0), {"estimate_error": True, **LOGISTIC}, "finite length"),
    ],
)
def test_what_has_no_limit_with_kinks_is_refused(model, options, match):
    with pytest.raises(ValueError, match=match):
        hf.flow(model, XOR, jnp.inf, **options)


def test_logarithmic_time_has_no_derivative_along_kinks():
    def end(scale):
        data = scale * XOR[0], XOR[1]
        return hf.late_flow(relu_net(1), data, 3.0, log_ts=[3.0]).losses[-1]

    with pytest.raises(NotImplementedError, match="logarithmic time"):
        jax.jvp(end, (jnp.ones(()),), (jnp.ones(()),))


def test_a_failed_late_run_is_on_the_flows_clock():
    with pytest.raises(hf.TrajectoryError) as caught:
        hf.flow(relu_net(1), XOR, 1e30, ts=[1.0, 1e9, 1e30], max_steps=40, **LOGISTIC)
    np.testing.assert_array_equal(caught.value.trajectory.ts, [1.0, 1e9, 1e30])
