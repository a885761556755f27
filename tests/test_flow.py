"""The flow against closed forms, high precision, reference data and its own claims."""

import pathlib
from collections import Counter

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import mpmath
import numpy as np
import pytest
import scipy.linalg
from oracles import relu_gradient
from problems import (
    SAMPLES,
    flat,
    linear_regression,
    neuron,
    relative_error,
    relu_regression,
    saved,
)

import homoflow as hf

REFERENCE = pathlib.Path(__file__).parent / "data" / "relu_20_30_30_3.npz"


# Deep linear networks: Saxe, McClelland & Ganguli 2014.

STRENGTHS = np.array([3.0, 2.0, 1.0])


def random_orthogonal(seed: int, rows: int, columns: int) -> np.ndarray:
    draw = np.random.default_rng(seed).standard_normal((rows, columns))
    return np.linalg.qr(draw)[0]


def whitened_data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inputs with XᵀX = m·I and linear targets; the teacher's singular vectors."""
    left, right = random_orthogonal(0, 3, 3), random_orthogonal(1, 3, 3)
    x = np.sqrt(SAMPLES) * random_orthogonal(2, SAMPLES, 3)
    return x, x @ (left * STRENGTHS @ right.T).T, left, right


def linear_net(first: np.ndarray, second: np.ndarray) -> hf.MLP:
    net = hf.MLP((3, 4, 3), activation="linear", key=jr.key(0))
    weights = [jnp.asarray(first), jnp.asarray(second)]
    return eqx.tree_at(lambda m: [layer.weight for layer in m.layers], net, weights)


def aligned_net(start: np.ndarray, left: np.ndarray, right: np.ndarray) -> hf.MLP:
    """Balanced, and along the teacher's modes, which have the given strengths."""
    hidden = random_orthogonal(3, 4, 3)
    root = np.sqrt(start)
    return linear_net(hidden * root @ right.T, left * root @ hidden.T)


def saxe_modes(start: np.ndarray, ts: np.ndarray) -> np.ndarray:
    """a(t) = s / (1 + (s/a₀ − 1) e^{−2st}) for each mode: da/dt = 2a(s − a)."""
    decay = np.exp(-2 * STRENGTHS * ts[:, None])
    return STRENGTHS / (1 + (STRENGTHS / start - 1) * decay)


def linear_flow(net: hf.MLP, t1: float, rtol=None, ts=None) -> hf.Trajectory:
    x, y, *_ = whitened_data()
    return hf.flow(net, (x, y), t1, rtol=rtol, ts=ts, project=False, save_models=True)


def products(models: hf.MLP) -> np.ndarray:
    first, second = (np.asarray(layer.weight) for layer in models.layers)
    return second @ first


def law_drift(trajectory: hf.Trajectory) -> float:
    """By how much the laws are off at the end."""
    return max(float(jnp.max(jnp.abs(h[-1] - h[0]))) for h in trajectory.laws.values())


@pytest.mark.parametrize(
    "start", [np.array([0.3, 0.1, 0.2]), np.array([1e-2, 1e-3, 5e-2])]
)
def test_linear_network_follows_saxes_closed_form(start):
    *_, left, right = whitened_data()
    flow = linear_flow(aligned_net(start, left, right), t1=5.0)
    modes = saxe_modes(start, np.asarray(flow.ts))
    expected = left * modes[:, None, :] @ right.T
    np.testing.assert_allclose(products(saved(flow)), expected, rtol=0, atol=1e-8)
    losses = 0.5 * np.sum((STRENGTHS - modes) ** 2, axis=1)
    np.testing.assert_allclose(flow.losses, losses, rtol=0, atol=1e-8)
    np.testing.assert_allclose(
        products(flow.model), products(saved(flow))[-1], rtol=1e-14
    )


def test_default_tolerance_resolves_an_escape_from_tiny_weights():
    # Errors made near the saddle grow with the modes, by twelve orders of magnitude: a
    # fixed atol of 1e-8 would already be 1% of these weights.
    *_, left, right = whitened_data()
    start = np.full(3, 1e-12)
    flow = linear_flow(aligned_net(start, left, right), t1=8.0)
    modes = saxe_modes(start, np.asarray(flow.ts))
    expected = left * modes[:, None, :] @ right.T
    errors = np.linalg.norm(products(saved(flow)) - expected, axis=(1, 2))
    sizes = np.linalg.norm(expected, axis=(1, 2))
    assert np.max(errors / sizes) < 1e-5


def test_solver_drift_of_laws_falls_with_the_tolerance_to_rounding():
    net = hf.MLP((3, 4, 3), activation="linear", key=jr.key(11))
    rtols = 10.0 ** -np.arange(5, 14)
    ends = [0.0, 5.0]
    drifts = np.array([law_drift(linear_flow(net, 5.0, r, ends)) for r in rtols])
    assert np.all(np.diff(drifts) < 0)
    slope = np.polyfit(np.log(rtols), np.log(drifts), 1)[0]
    assert 0.8 < slope < 1.2
    assert drifts[-1] < 1e-13


def test_loss_never_increases_along_the_flow():
    net = hf.MLP((3, 4, 3), activation="linear", key=jr.key(12))
    losses = np.asarray(linear_flow(net, 5.0).losses)
    assert np.all(np.diff(losses) <= 1e-8 * losses[0])
    assert losses[-1] < 0.01 * losses[0]


# Convex quadratics: the matrix exponential.


def quadratic_truth(model, data, ts) -> np.ndarray:
    """W(t) = W* + (W₀ − W*) e^{−Σt}, with Σ = XᵀX/m."""
    x, y = (np.asarray(part) for part in data)
    covariance = x.T @ x / len(x)
    optimum = (np.linalg.pinv(x) @ y).T
    gap = np.asarray(model.layers[0].weight, np.float64) - optimum
    return np.stack([optimum + gap @ scipy.linalg.expm(-covariance * t) for t in ts])


def regression_flow(t1=5.0, dtype=jnp.float64, **options) -> hf.Trajectory:
    model, data = linear_regression()
    model = jax.tree.map(lambda w: w.astype(dtype), model)
    return hf.flow(model, data, t1, save_models=True, **options)


def regression_error(flow: hf.Trajectory, speed: int = 1) -> float:
    model, data = linear_regression()
    truth = quadratic_truth(model, data, speed * np.asarray(flow.ts))
    weights = np.asarray(saved(flow).layers[0].weight)
    return np.abs(weights - truth).max() / np.abs(truth).max()


def test_linear_model_follows_the_matrix_exponential():
    assert regression_error(regression_flow()) < 1e-8


def test_losses_and_gradient_norms_are_those_of_the_weights_at_their_times():
    flow, (model, data) = regression_flow(rtol=1e-10), linear_regression()
    x, y = (np.asarray(part) for part in data)
    truth = quadratic_truth(model, data, np.asarray(flow.ts))
    residuals = x @ truth.swapaxes(1, 2) - y
    losses = 0.5 * np.sum(residuals**2, axis=(1, 2)) / len(x)
    gradients = residuals.swapaxes(1, 2) @ x / len(x)
    np.testing.assert_allclose(flow.losses, losses, rtol=1e-7)
    np.testing.assert_allclose(
        flow.grad_norms, np.linalg.norm(gradients, axis=(1, 2)), rtol=0, atol=1e-7
    )
    np.testing.assert_allclose(
        flow.squared_norms["layers[0].weight"], np.sum(truth**2, axis=(1, 2)), rtol=1e-7
    )


def test_a_loss_times_c_is_time_over_c():
    # The sum over samples is m times the mean.
    total = hf.SquaredLoss(reduction="sum")
    summed = regression_flow(5.0 / SAMPLES, loss=total, rtol=1e-10)
    assert regression_error(summed, speed=SAMPLES) < 1e-8
    mean = regression_flow(rtol=1e-10)
    np.testing.assert_allclose(summed.losses, SAMPLES * mean.losses, rtol=1e-7)


def test_float32_is_as_accurate_as_its_tolerance():
    flow = regression_flow(dtype=jnp.float32)
    assert flat(flow.model).dtype == flow.losses.dtype == flow.ts.dtype == jnp.float32
    assert 1e-9 < regression_error(flow) < 5e-5
    stricter = regression_flow(dtype=jnp.float32, rtol=3e-6)
    assert regression_error(stricter) < regression_error(flow)


# Tolerances.


@pytest.mark.parametrize(
    ("solve", "rtol"),
    [
        pytest.param(regression_flow, 1e-10, id="smooth float64"),
        pytest.param(
            lambda **options: regression_flow(dtype=jnp.float32, **options),
            1e-5,
            id="smooth float32",
        ),
        pytest.param(
            lambda **options: hf.flow(*relu_regression(), 10.0, **options),
            1e-8,
            id="kinks",
        ),
        pytest.param(
            lambda **options: hf.flow(
                *relu_regression(), 10.0, solver=hf.Averaged(), **options
            ),
            1e-4,
            id="averaged",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The relative error of the final weights")
def test_default_tolerances_are_the_documented_ones(solve, rtol):
    def end(**options):
        return flat(solve(ts=[1.0], **options).model)

    np.testing.assert_array_equal(end(), end(rtol=rtol))
    assert np.any(end() != end(rtol=2 * rtol))


def test_default_atol_is_rtol_times_the_weights_root_mean_square():
    model, _ = linear_regression()
    atol = 1e-10 * float(np.sqrt(np.mean(flat(model) ** 2)))
    explicit = regression_flow(atol=atol)
    np.testing.assert_allclose(
        flat(explicit.model), flat(regression_flow().model), rtol=1e-13
    )
    assert explicit.stats["steps"] == regression_flow().stats["steps"]


@pytest.mark.parametrize(
    ("dtype", "rtol", "hint"),
    [(jnp.float32, 1e-7, "jax_enable_x64"), (jnp.float64, 1e-16, "float64 can reach")],
)
def test_unreachable_tolerance_is_refused_with_a_way_out(dtype, rtol, hint):
    with pytest.raises(ValueError, match=hint):
        regression_flow(dtype=dtype, rtol=rtol)


# Matrix factorization, with solvers and steps of the user's choice.

TARGET = [[1, 0.5], [0.25, -0.75]]
START = [0.5, -0.25, 0.75, 0.125]


def factors(values) -> hf.MatrixFactorization:
    model = hf.MatrixFactorization(2, 2, 1, key=jr.key(0))
    u, v = jnp.asarray(values).reshape(2, 2, 1)
    return eqx.tree_at(lambda m: (m.U, m.V), model, (u, v))


@pytest.fixture(scope="module")
def factors_at_one() -> np.ndarray:
    """The factors at t = 1, integrated by Taylor series in 50-digit arithmetic."""

    def field(_, y):
        u, v = y[:2], y[2:]
        r = [[u[i] * v[j] - TARGET[i][j] for j in range(2)] for i in range(2)]
        du = [-sum(r[i][j] * v[j] for j in range(2)) for i in range(2)]
        dv = [-sum(r[i][j] * u[i] for i in range(2)) for j in range(2)]
        return du + dv

    with mpmath.workdps(50):
        start = [mpmath.mpf(value) for value in START]
        solution = mpmath.odefun(field, 0, start, tol=mpmath.mpf("1e-20"))
        return np.array([float(value) for value in solution(1)])


def factorization_flow(**options) -> hf.Trajectory:
    return hf.flow(
        factors(START),
        np.array(TARGET),
        1.0,
        objective=hf.factorization_objective,
        **options,
    )


def test_factorization_agrees_with_a_50_digit_integration(factors_at_one):
    flow = factorization_flow(rtol=1e-10)
    np.testing.assert_allclose(flat(flow.model), factors_at_one, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("solver", "order", "steps"),
    [
        (dfx.Heun(), 2, [64, 128, 256]),
        (dfx.Tsit5(), 5, [12, 16, 24, 32, 48, 64]),
        (dfx.Dopri8(), 8, [8, 9, 10, 11, 12]),
    ],
    ids=["Heun", "Tsit5", "Dopri8"],
)
def test_error_falls_at_the_solvers_order(solver, order, steps, factors_at_one):
    errors = []
    for n in steps:
        flow = factorization_flow(
            solver=solver,
            stepsize_controller=dfx.ConstantStepSize(),
            dt0=1 / n,
            ts=[1.0],
            laws=(),
        )
        errors.append(np.linalg.norm(flat(flow.model) - factors_at_one))
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope + order) < 0.2


def test_given_solver_and_controller_run_unaltered():
    model, (x, y) = neuron()
    controller = dfx.PIDController(rtol=1e-5, atol=1e-7, pcoeff=0.3, icoeff=0.4)
    ts = jnp.linspace(0.5, 4.0, 8)

    def field(t, w, args):
        return -jax.grad(lambda w: jnp.mean(0.5 * (jnp.tanh(x @ w) - y) ** 2))(w)

    expected = dfx.diffeqsolve(
        dfx.ODETerm(field), dfx.Bosh3(), 0.0, 4.0, 0.01, model.w,
        saveat=dfx.SaveAt(ts=ts), stepsize_controller=controller,
    )  # fmt: skip
    flow = hf.flow(
        model, (x, y), 4.0, ts=ts, solver=dfx.Bosh3(), dt0=0.01,
        stepsize_controller=controller, save_models=True,
    )  # fmt: skip
    np.testing.assert_allclose(saved(flow).w, np.asarray(expected.ys), rtol=1e-13)
    assert flow.stats["steps"] == expected.stats["num_accepted_steps"]
    assert flow.stats["rejected_steps"] == expected.stats["num_rejected_steps"]


ADAPTIVE = dfx.PIDController(rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        (dfx.Euler(), {"dt0": 0.01}),
        (dfx.Heun(), {"rtol": 1e-4}),
        (dfx.Bosh3(), {"stepsize_controller": ADAPTIVE, "dt0": 1e-3}),
        (dfx.Tsit5(), {"stepsize_controller": ADAPTIVE, "dt0": 1e-3}),
        (dfx.Dopri8(), {"rtol": 1e-4}),
    ],
    ids=["Euler", "Heun", "Bosh3", "Tsit5", "Dopri8"],
)
def test_reported_gradient_evaluations_are_the_true_number(solver, options):
    calls = Counter()

    def objective(w, data):
        jax.debug.callback(lambda: calls.update(evaluations=1))
        return jnp.sum((w**2 - data) ** 2)

    flow = hf.flow(
        jnp.array([3.0, 0.1]), jnp.array([1.0, 2.0]), 2.0,
        objective=objective, solver=solver, ts=[0.0, 0.55, 1.1], laws=(), **options,
    )  # fmt: skip
    jax.effects_barrier()
    assert isinstance(solver, dfx.Euler) or flow.stats["rejected_steps"] > 0
    assert flow.stats["gradient_evaluations"] == calls["evaluations"]


# Kinks: the default method is approximate, and says by how much.


@pytest.fixture(scope="module")
def reference():
    return np.load(REFERENCE)


def reference_flow(reference, **options) -> hf.Trajectory:
    net = hf.MLP((20, 30, 30, 3), key=jr.key(0))
    weights = [jnp.asarray(reference[f"W{h}_0"]) for h in (1, 2, 3)]
    net = eqx.tree_at(lambda m: [layer.weight for layer in m.layers], net, weights)
    return hf.flow(net, (reference["X"], reference["Y"]), 60.0, **options)


def reference_error(flow: hf.Trajectory, reference) -> float:
    truth = np.concatenate([reference[f"W{h}_t60"].ravel() for h in (1, 2, 3)])
    return relative_error(flow.model, truth)


def test_averaged_relu_flow_meets_the_event_driven_reference(reference):
    flow = reference_flow(reference, solver=hf.Averaged())
    error = reference_error(flow, reference)
    assert error < 2e-3
    assert error < flow.stats["error_estimate"] < 20 * error


@pytest.mark.filterwarnings("ignore:The relative error of the final weights")
def test_relu_flow_tends_to_the_reference_with_the_tolerance(reference):
    rtols = (1e-3, 1e-4, 1e-5)
    flows = [
        reference_flow(reference, rtol=rtol, solver=hf.Averaged()) for rtol in rtols
    ]
    errors = np.array([reference_error(flow, reference) for flow in flows])
    assert np.all(errors[1:] < errors[:-1] / 3)
    assert np.all(errors < [flow.stats["error_estimate"] for flow in flows])


def midpoint_flows(seeds: range, t1: float, steps: int) -> list[np.ndarray]:
    """Explicit midpoint for all seeds at once: its steps average over kinks."""
    x, y = (np.asarray(part) for part in relu_regression()[1])
    models = [relu_regression(seed)[0] for seed in seeds]
    weights = [
        np.stack([np.asarray(model.layers[h].weight) for model in models])
        for h in range(2)
    ]
    dt = t1 / steps
    for _ in range(steps):
        slopes = relu_gradient(weights, x, y)
        middle = [w - dt / 2 * g for w, g in zip(weights, slopes, strict=True)]
        slopes = relu_gradient(middle, x, y)
        weights = [w - dt * g for w, g in zip(weights, slopes, strict=True)]
    return [np.concatenate([w[i].ravel() for w in weights]) for i in range(len(models))]


def test_error_estimate_is_not_below_the_true_error():
    seeds, t1 = range(16), 10.0
    truths = midpoint_flows(seeds, t1, steps=20_000)
    averaged = hf.Averaged()
    flows = [hf.flow(*relu_regression(seed), t1, solver=averaged) for seed in seeds]
    errors = np.array(
        [relative_error(f.model, w) for f, w in zip(flows, truths, strict=True)]
    )
    estimates = np.array([flow.stats["error_estimate"] for flow in flows])
    assert np.all(errors < estimates)
    assert np.median(estimates / errors) < 10


def test_error_estimate_of_a_constant_step_is_honest():
    # Twice the difference to double the step: of Euler's first-order error, about 2×.
    flow = regression_flow(solver=dfx.Euler(), dt0=1e-3, estimate_error=True)
    model, data = linear_regression()
    truth = quadratic_truth(model, data, [5.0])[0]
    error = np.linalg.norm(flow.model.layers[0].weight - truth) / np.linalg.norm(truth)
    assert 1.5 < float(flow.stats["error_estimate"]) / error < 2.5


def test_a_users_own_controller_leaves_no_tolerance_to_compare():
    controller = dfx.PIDController(rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="run the flow twice"):
        regression_flow(stepsize_controller=controller, estimate_error=True)


def test_a_tolerance_for_constant_steps_is_refused():
    with pytest.raises(ValueError, match="no meaning"):
        regression_flow(solver=dfx.Euler(), dt0=0.1, rtol=1e-3)
