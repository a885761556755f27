"""The modified flow against closed forms, gradient descent, and its own identities."""

import functools
import operator

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import optax
import pytest
import scipy.linalg
from problems import flat, linear_regression, neuron, relu_regression, saved

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")

# A convex quadratic: the matrix exponential.


@pytest.mark.parametrize(("rate", "momentum"), [(0.1, 0.0), (0.3, 0.0), (0.02, 0.4)])
def test_linear_model_follows_the_matrix_exponential(rate, momentum):
    model, data = linear_regression()
    x, y = (np.asarray(part) for part in data)
    flow = hf.modified_flow(
        model, data, 3.0, learning_rate=rate, momentum=momentum, save_models=True
    )
    covariance = x.T @ x / len(x)
    optimum = (np.linalg.pinv(x) @ y).T
    step = rate / (1 - momentum)
    coefficient = step * (1 + momentum) / (1 - momentum) / 2
    gap = np.asarray(model.layers[0].weight) - optimum
    gap = gap @ (np.eye(3) + step * momentum / (1 - momentum) * covariance)
    generator = covariance + coefficient * covariance @ covariance
    truth = np.stack(
        [optimum + gap @ scipy.linalg.expm(-generator * t) for t in flow.ts]
    )
    np.testing.assert_allclose(
        np.asarray(saved(flow).layers[0].weight), truth, rtol=0, atol=1e-8
    )
    # The loss and the gradient are L's own, not the modified ones.
    residuals = x @ truth.swapaxes(1, 2) - y
    losses = 0.5 * np.sum(residuals**2, axis=(1, 2)) / len(x)
    gradients = residuals.swapaxes(1, 2) @ x / len(x)
    norms = np.linalg.norm(gradients, axis=(1, 2))
    np.testing.assert_allclose(flow.losses, losses, rtol=1e-7)
    np.testing.assert_allclose(flow.grad_norms, norms, rtol=0, atol=1e-7)
    largest = np.linalg.eigvalsh(covariance).max()
    np.testing.assert_allclose(
        flow.observed["sharpness"].values[:, 0], np.full(101, largest), rtol=1e-3
    )


# Order of the approximation. One model and one set of options, which compile once.


def mixed():
    """Linear, power and tanh units in one network."""
    model = hf.MLP(
        (3, 4, 4, 4, 2),
        activation=("linear", hf.Power(2), jnp.tanh),
        init=hf.Gaussian(0.5),
        key=jr.key(0),
    )
    x = jr.normal(jr.key(1), (12, 3))
    return model, (x, jnp.tanh(2 * x[:, :2] - x[:, 1:]))


#: Gauss–Legendre nodes in [0, 2], to integrate over time with.
NODES, GAUSS = np.polynomial.legendre.leggauss(50)


def mixed_flow(rate: float, momentum: float = 0.0) -> hf.Trajectory:
    return hf.modified_flow(
        *mixed(), 2.0, learning_rate=rate, momentum=momentum, save_models=True,
        ts=np.concatenate([[0], 1 + NODES, [2]]),
    )  # fmt: skip


def at_two(step: float, momentum: float) -> np.ndarray:
    """Heavy ball's weights at t = 2, after steps of that time."""
    sgd = functools.partial(optax.sgd, momentum=momentum)
    gd = hf.descend(
        *mixed(), 800, learning_rate=step * (1 - momentum), optimizer=sgd,
        record_every=100, save_models=True,
    )  # fmt: skip
    (index,) = np.flatnonzero(np.abs(np.asarray(gd.ts) - 2) < 1e-9)
    return flat(jax.tree.map(lambda w: w[index], eqx.filter(saved(gd), eqx.is_array)))


def slope(steps, errors) -> float:
    return float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_modified_flow_meets_descent_to_second_order_the_flow_to_first(momentum):
    steps = np.array([0.01, 0.005, 0.0025])
    # At no learning rate at all it is the gradient flow.
    flow = flat(mixed_flow(1e-12).model)
    truths = [at_two(step, momentum) for step in steps]
    modified = [
        flat(mixed_flow(step * (1 - momentum), momentum).model) for step in steps
    ]
    first = [np.linalg.norm(flow - truth) for truth in truths]
    pairs = zip(modified, truths, strict=True)
    second = [np.linalg.norm(weights - truth) for weights, truth in pairs]
    assert abs(slope(steps, first) - 1) < 0.1
    assert abs(slope(steps, second) - 2) < 0.1


def test_laws_drift_along_it_as_the_identity_says():
    rate, (_, (x, y)) = 0.02, mixed()
    flow = mixed_flow(rate)
    # Of L itself: ⟨2Aw + b, v⟩ is not zero along the modified velocity.
    assert flow.stats["law_violation"] < 1e-13

    @jax.jit
    @jax.vmap
    @jax.grad
    def gradients(model):
        return jnp.mean(0.5 * jnp.sum((jax.vmap(model)(x) - y) ** 2, axis=1))

    moving = gradients(eqx.filter(saved(flow), eqx.is_inexact_array))
    layers = [np.asarray(layer.weight) for layer in moving.layers]
    # W₁W₁ᵀ − W₂ᵀW₂ at the linear units, ‖W₂[i,:]‖² − 2‖W₃[:,i]‖² at the squares.
    rates = {
        "matrix[1]": layers[0] @ layers[0].swapaxes(1, 2)
        - layers[1].swapaxes(1, 2) @ layers[1],
        "neurons[2]": np.sum(layers[1] ** 2, axis=2) - 2 * np.sum(layers[2] ** 2, 1),
    }
    for name, q in rates.items():
        expected = rate * np.tensordot(GAUSS, q[1:-1], axes=1)
        drift = np.asarray(flow.laws[name][-1] - flow.laws[name][0])
        assert np.abs(drift).max() > 1e-4
        np.testing.assert_allclose(drift, expected, rtol=0, atol=1e-8)


# Where the expansion fails.


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
def test_the_limits_that_warnings_name_are_those_of_the_characteristic_roots(momentum):
    def roots(scaled):
        return np.roots([1, -(1 + momentum - scaled), momentum])

    radius, stable = (1 - np.sqrt(momentum)) ** 2, 2 * (1 + momentum)
    assert np.all(np.isreal(roots(0.999 * radius)))
    assert momentum == 0 or not np.any(np.isreal(roots(1.001 * radius)))
    assert np.max(np.abs(roots(0.999 * stable))) < 1
    assert np.max(np.abs(roots(1.001 * stable))) > 1


@pytest.mark.parametrize("momentum", [0.0, 0.4])
def test_a_warning_says_when_the_learning_rate_is_too_large(momentum):
    model, data = linear_regression()
    x = np.asarray(data[0])
    sharpness = np.linalg.eigvalsh(x.T @ x / len(x)).max()
    radius = (1 - np.sqrt(momentum)) ** 2

    def run(fraction):
        return hf.modified_flow(
            model, data, 3.0, learning_rate=fraction * radius / sharpness,
            momentum=momentum, save_models=True,
        )  # fmt: skip

    run(0.95)  # Warnings are errors: this one must not warn.
    with pytest.warns(UserWarning, match=f"measured sharpness λ_max = {sharpness:.2f}"):
        run(1.05)


# At the door and under transformations.


def test_models_with_kinks_are_refused_unless_a_solver_is_given():
    model, data = relu_regression()
    with pytest.raises(ValueError, match=r"gradient jumps at .*predict_drift"):
        hf.modified_flow(model, data, 1.0, learning_rate=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "`learning_rate` must be positive"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be positive"),
        ({"learning_rate": jnp.ones(2)}, "`learning_rate` must be one number"),
        ({"learning_rate": 0.1, "momentum": 1.0}, r"`momentum` must lie in \[0, 1\)"),
        ({"learning_rate": 0.1, "momentum": -0.1}, r"`momentum` must lie in \[0, 1\)"),
        ({"learning_rate": 0.1, "max_steps": 0}, "`max_steps`"),
    ],
)
def test_bad_coefficients_are_refused(options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        hf.modified_flow(*neuron(), 1.0, **options)


def test_a_batch_of_learning_rates_follows_descent_with_logistic_loss():
    model, (x, y) = neuron(jnp.float32)
    data, loss = (x, jnp.sign(y)), hf.LogisticLoss()
    steps = [0.2, 0.1, 0.05]

    @eqx.filter_jit
    @eqx.filter_vmap
    def sweep(rate):
        return hf.modified_flow(
            model, data, 2.0, learning_rate=rate, loss=loss, throw=False
        )

    runs = sweep(jnp.array([*steps, -1.0], jnp.float32))
    first, last = (jax.tree.map(operator.itemgetter(i), runs.result) for i in (0, -1))
    assert runs.losses.dtype == runs.observed["sharpness"].values.dtype == jnp.float32
    errors = []
    for i, step in enumerate(steps):
        gd = hf.descend(
            model, data, 40, learning_rate=step, loss=loss, record_every=10,
            save_models=True,
        )  # fmt: skip
        (index,) = np.flatnonzero(np.abs(np.asarray(gd.ts) - 2) < 1e-5)
        errors.append(np.linalg.norm(runs.model.w[i] - saved(gd).w[index]))
    assert abs(slope(steps, errors) - 2) < 0.1
    assert first == hf.RESULTS.successful
    assert last == hf.RESULTS.bad_learning_rate
    assert np.all(np.isnan(runs.losses[3]))
    assert np.all(np.isnan(runs.observed["sharpness"].values[3]))
