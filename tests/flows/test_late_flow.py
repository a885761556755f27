"""Late gradient flow: against closed forms, SciPy in log time, and support vectors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
from oracles import largest_margin
from problems import separable

import homoflow as hf
from homoflow._problem._log_risk import _log_softplus, log_risk

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Scalar(eqx.Module):
    w: jax.Array

    def __call__(self, x):
        return self.w @ x


def product(model):
    w = np.eye(model.layers[0].weight.shape[1])
    for layer in model.layers:
        w = np.asarray(layer.weight) @ w
    return w.ravel() / np.linalg.norm(w)


def test_log_softplus_at_both_ends():
    z = [-1e6, -800.0, -40.0, -9.3, -9.2, -1.0, -1e-9, 0.0, 0.5, 30.0, 1e3]
    with mpmath.workdps(60):
        exact = [mpmath.log(mpmath.log1p(mpmath.exp(mpmath.mpf(v)))) for v in z[1:]]
    exact = np.array([-1e6, *map(float, exact)])
    np.testing.assert_allclose(
        _log_softplus(jnp.array(z)), exact, rtol=4e-16, atol=1e-15
    )


@pytest.mark.parametrize("log_t1", [-3.0, 5.0, 69.0, 1e4, 1e8])
def test_one_sample_in_closed_form(log_t1):
    # dm/dt = |x|²/(1 + eᵐ): m + eᵐ grows by |x|²·t.
    x = jnp.array([[0.6, -1.1]])
    model = Scalar(jnp.array([0.2, 0.1]))
    run = hf.late_flow(model, (x, jnp.ones(1)), log_t1, log_ts=[log_t1])
    start, size = float(model.w @ x[0]), float(x[0] @ x[0])
    with mpmath.workdps(40):
        grown = start + mpmath.exp(start) + size * mpmath.exp(mpmath.mpf(log_t1))
        margin = mpmath.findroot(
            lambda m: m + mpmath.log1p(m * mpmath.exp(-m)) - mpmath.log(grown),
            mpmath.log(grown),
        )
        exact = float(mpmath.log(mpmath.log1p(mpmath.exp(-margin))))
    moved = (float(margin) - start) / size
    np.testing.assert_allclose(run.model.w, model.w + moved * x[0], rtol=1e-7)
    np.testing.assert_allclose(run.observed["log_losses"], exact, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(run.observed["log_ts"], log_t1, rtol=1e-13)


def test_it_is_the_same_flow_on_the_same_clock():
    x, y = separable()
    model = hf.MLP((3, 4, 1), activation=hf.Power(2), key=jax.random.key(0))
    data, ts = (x, y[:, None]), jnp.array([0.0, 1e-3, 0.5, 20.0])
    observe = {"t": lambda p: p.t, "velocity": lambda p: p.velocity.layers[0].weight}
    options = {"loss": hf.LogisticLoss(), "save_models": True, "observe": observe}
    plain = hf.flow(model, data, 20.0, ts=ts, rtol=1e-11, **options)
    late = hf.late_flow(
        model, data, jnp.log(20.0), log_ts=jnp.log(ts), rtol=1e-10, **options
    )
    np.testing.assert_allclose(late.ts, ts, rtol=1e-12)
    np.testing.assert_allclose(late.observed["t"], ts, rtol=1e-12)
    for name in ("losses", "grad_norms"):
        np.testing.assert_allclose(getattr(late, name), getattr(plain, name), rtol=1e-7)
    np.testing.assert_allclose(
        late.observed["velocity"], plain.observed["velocity"], atol=1e-8
    )
    np.testing.assert_allclose(
        late.models.layers[0].weight, plain.models.layers[0].weight, atol=1e-8
    )
    np.testing.assert_allclose(
        jnp.exp(late.observed["log_losses"]), plain.losses, rtol=1e-7
    )


def test_scipy_in_log_time_agrees_at_a_late_time():
    x, y = separable()
    rows, start = np.asarray(y[:, None] * x), np.full(3, 0.1)

    def field(s, w):
        margins = rows @ w
        log_slopes = -margins - np.log1p(np.exp(-margins))
        return rows.T @ np.exp(s + log_slopes) / len(rows)

    s1 = float(np.logaddexp(0, np.log(1e30)))
    exact = scipy.integrate.solve_ivp(
        field, (0, s1), start, method="Radau", rtol=1e-10, atol=1e-10
    ).y[:, -1]
    run = hf.late_flow(Scalar(jnp.asarray(start)), (x, y), np.log(1e30))
    np.testing.assert_allclose(run.model.w, exact, rtol=1e-6)
    assert run.ts[-1] == pytest.approx(1e30, rel=1e-12)


@pytest.mark.parametrize(
    ("depth", "log_t1", "bound"), [(1, 1e8, 1e-6), (2, 1e11, 2e-6)]
)
def test_the_direction_is_that_of_the_largest_margin(depth, log_t1, bound):
    x, y = separable()
    direction, margin = largest_margin(x, y)
    sizes = (3, *[3] * (depth - 1), 1)
    model = hf.MLP(sizes, activation="linear", key=jax.random.key(1))
    data = (x, y[:, None])
    run = hf.late_flow(model, data, log_t1)
    assert np.linalg.norm(product(run.model) - direction) < bound
    assert run.stats["gradient_evaluations"] < 4_000
    certificate = hf.certify_margin(run.model, data)
    assert certificate.is_kkt(1e-4)
    assert certificate.degree == pytest.approx(depth, rel=1e-9)
    # Of all weights with ‖w‖ = 1 balanced ones have the largest margin, γ·depth^(−depth/2).
    largest = margin * depth ** (-depth / 2)
    assert certificate.margin == pytest.approx(largest, rel=1e-5)
    assert certificate.margin < largest * (1 + 1e-9)
    # Early, the same direction is no such point.
    early = hf.late_flow(model, data, 5.0)
    assert not hf.certify_margin(early.model, data).is_kkt(1e-2)


def test_classes_have_margins_to_every_other_class():
    x = jax.random.normal(jax.random.key(9), (15, 3))
    normals = jax.random.normal(jax.random.key(5), (3, 3))
    y = jnp.argmax(x @ normals.T, axis=1)
    x = x + 0.5 * normals[y]
    model = hf.MLP((3, 3), activation="linear", key=jax.random.key(1))
    loss = hf.SoftmaxCrossEntropy()
    run = hf.late_flow(model, (x, y), 1e8, loss=loss)
    found = hf.certify_margin(run.model, (x, y), loss=loss)
    assert found.margins.shape == (15, 2)
    assert found.is_kkt(1e-6)
    assert found.curvature == pytest.approx(1, abs=1e-6)
    rows = np.array(
        [
            np.kron(np.eye(3)[int(c)] - np.eye(3)[k], xi)
            for xi, c in zip(np.asarray(x), y, strict=True)
            for k in range(3)
            if k != int(c)
        ]
    )
    _, margin = largest_margin(rows, np.ones(len(rows)))
    assert found.margin == pytest.approx(margin, rel=1e-6)


def test_laws_hold_to_the_end():
    x, y = separable()
    model = hf.MLP((3, 3, 1), activation="linear", key=jax.random.key(1))
    run = hf.late_flow(model, (x, y[:, None]), 1e6)
    size = sum(norms[-1] for norms in run.squared_norms.values())
    drift = jnp.abs(run.laws["matrix[1]"] - run.laws["matrix[1]"][0]).max()
    assert drift < 1e-13 * size


def test_seeds_under_vmap_and_jit():
    x, y = separable()

    @eqx.filter_jit
    @eqx.filter_vmap
    def ends(key):
        model = hf.MLP((3, 2, 1), activation="linear", key=key)
        return hf.late_flow(model, (x, y[:, None]), 50.0, laws=(), throw=False)

    keys = jax.random.split(jax.random.key(0), 2)
    together = ends(keys)
    for i, key in enumerate(keys):
        model = hf.MLP((3, 2, 1), activation="linear", key=key)
        alone = hf.late_flow(model, (x, y[:, None]), 50.0, laws=())
        np.testing.assert_allclose(
            together.observed["log_losses"][i], alone.observed["log_losses"], atol=1e-7
        )


def test_log_risk_of_a_sum_has_no_mean():
    x, y = separable()
    model = Scalar(jnp.array([0.3, -0.2, 0.1]))
    for reduction in ("mean", "sum"):
        for loss in (hf.LogisticLoss, hf.ExponentialLoss):
            problem = hf.make_problem(model, (x, y), loss=loss(reduction=reduction))
            value = jnp.exp(log_risk(problem, problem.weights))
            np.testing.assert_allclose(value, problem.loss(problem.weights), rtol=1e-14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": hf.SquaredLoss()}, "exponential type"),
        ({"log_t1": jnp.inf}, "`log_t1` must be finite"),
        ({"log_ts": [1.0, 0.5]}, "must increase"),
        ({"log_ts": [1.0, 6.0]}, "must increase and end at `log_t1`"),
        ({"time_unit": 0.0}, "`time_unit` must be positive"),
        ({"observe": {"log_ts": lambda p: p.t}}, "choose another name"),
        ({"model": "float32"}, "float64"),
    ],
)
def test_what_it_is_not_made_for_is_refused(change, message):
    x, y = separable()
    options = {"log_t1": 5.0, "loss": hf.LogisticLoss(), **change}
    kind = options.pop("model", "linear")
    model = hf.MLP(
        (3, 2, 1),
        activation="linear",
        dtype=jnp.float32 if kind == "float32" else None,
        key=jax.random.key(0),
    )
    with pytest.raises(ValueError, match=message):
        hf.late_flow(model, (x, y[:, None]), **options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (hf.MLP((3, 2, 1), activation=jnp.tanh, key=jax.random.key(0)), "homogeneous"),
        (Scalar(jnp.array([0.1, -1.0, 0.3])), "does not separate"),
    ],
)
def test_no_certificate_where_the_theory_says_nothing(model, message):
    x, y = separable()
    is_scalar = isinstance(model, Scalar)
    labels = y if is_scalar else jnp.sign(jax.vmap(model)(x))
    with pytest.raises(ValueError, match=message):
        hf.certify_margin(model, (x, labels))


def test_another_direction_that_separates_is_no_candidate():
    x, y = separable()
    found = hf.certify_margin(Scalar(jnp.ones(3)), (x, y))
    direction, margin = largest_margin(x, y)
    assert found.margin < margin * (1 - 1e-3)
    assert not found.is_kkt(1e-2)
    best = hf.certify_margin(Scalar(jnp.asarray(direction)), (x, y))
    assert best.is_kkt(1e-6)
    assert best.margin == pytest.approx(margin, rel=1e-8)
