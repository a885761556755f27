"""Predicted drift of laws against quadrature, descent, and averages over seeds."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from problems import neuron, relu_regression, saved

import homoflow as hf
from homoflow._flows._drift_prediction import _noise_of_batches

pytestmark = pytest.mark.usefixtures("quick_compilation")
SAMPLES, T1 = 12, 2.0
NODES, GAUSS = np.polynomial.legendre.leggauss(50)


def classifier():
    """Linear and squared units; softmax adds laws that are linear."""
    model = hf.MLP(
        (3, 4, 4, 3), activation=("linear", hf.Power(2)), init=hf.Gaussian(0.6),
        key=jr.key(0),
    )  # fmt: skip
    x = jr.normal(jr.key(1), (SAMPLES, 3))
    return model, (x, jnp.argmax(x + x[:, ::-1] ** 2, axis=1))


def cross_entropy(model, x, y):
    return -jax.nn.log_softmax(model(x))[y]


@pytest.fixture(scope="module")
def prediction() -> hf.DriftPrediction:
    return hf.predict_drift(
        *classifier(), T1, noise=True, loss=hf.SoftmaxCrossEntropy(), save_models=True,
        ts=np.concatenate([[0], 1 + NODES, [T1]]),
    )  # fmt: skip


def law_squares(first, second, third) -> dict[str, np.ndarray]:
    """q of gradients, of the law W₁W₁ᵀ − W₂ᵀW₂ and of ‖W₂[i,:]‖² − 2‖W₃[:,i]‖²."""
    turned = first.swapaxes(-1, -2), second.swapaxes(-1, -2)
    return {
        "matrix[1]": first @ turned[0] - turned[1] @ second,
        "neurons[2]": np.sum(second**2, axis=-1) - 2 * np.sum(third**2, axis=-2),
    }


def test_integrals_are_those_of_the_gradients_along_the_flow(prediction):
    x, y = classifier()[1]

    @jax.jit
    @jax.vmap
    def each(model):
        return jax.vmap(jax.grad(cross_entropy), (None, 0, 0))(model, x, y)

    gradients = each(eqx.filter(saved(prediction.flow), eqx.is_inexact_array))
    each = [np.asarray(layer.weight) for layer in gradients.layers]
    mean = law_squares(*(g.mean(axis=1) for g in each))
    # tr(A S) is the same form of what remains without the mean, averaged.
    rest = law_squares(*(g - g.mean(axis=1, keepdims=True) for g in each))
    for name in mean:
        for integrals, rate in (
            (prediction.integrals, mean[name]),
            (prediction.noise_integrals, rest[name].mean(axis=1)),
        ):
            expected = np.tensordot(GAUSS, rate[1:-1], axes=1)
            assert np.abs(expected).max() > 1e-2
            np.testing.assert_allclose(integrals[name][-1], expected, rtol=0, atol=1e-8)


def test_linear_laws_do_not_drift(prediction):
    drift = prediction.drift(0.01, batch_size=3)["output_sums[3]"]
    np.testing.assert_array_equal(drift, np.zeros((52, 4)))


def observed(run: dict) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(run[name][..., -1, :, :] - run[name][..., 0, :, :])
        if name == "matrix[1]"
        else np.asarray(run[name][..., -1, :] - run[name][..., 0, :])
        for name in ("matrix[1]", "neurons[2]")
    }


def distance(a, b) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_error_of_the_prediction_falls_in_proportion_to_the_learning_rate(
    prediction, momentum
):
    errors = []
    for index, step in ((1, T1 / 400), (2, T1 / 800)):
        rate = step * (1 - momentum)
        gd = hf.descend(
            *classifier(), 800, learning_rate=rate, loss=hf.SoftmaxCrossEntropy(),
            optimizer=functools.partial(optax.sgd, momentum=momentum),
            record_every=400,
        )  # fmt: skip
        np.testing.assert_allclose(gd.ts[index], T1)
        drift = prediction.drift(rate, momentum)
        seen = observed({name: law[: index + 1] for name, law in gd.laws.items()})
        errors.append([distance(d, drift[name][-1]) for name, d in seen.items()])
    errors = np.array(errors)
    assert np.all(errors < 0.05)
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), 1, atol=0.1)


def test_batches_add_their_noise_in_the_mean(prediction):
    steps, size, seeds = 1000, 3, 400
    rate = T1 / steps

    @eqx.filter_jit
    @eqx.filter_vmap
    def runs(key):
        return hf.descend(
            *classifier(), steps, learning_rate=rate, loss=hf.SoftmaxCrossEntropy(),
            batch_size=size, key=key, record_every=steps, throw=False,
        ).laws  # fmt: skip

    seen = observed(runs(jr.split(jr.key(2), seeds)))
    noisy, quiet = (prediction.drift(rate, batch_size=b) for b in (size, SAMPLES))
    for name, drifts in seen.items():
        mean = drifts.mean(axis=0)
        error = np.linalg.norm(drifts.std(axis=0)) / np.linalg.norm(mean) / seeds**0.5
        assert error < 0.02
        assert distance(mean, noisy[name][-1]) < 0.02 + 3 * error
        assert distance(mean, quiet[name][-1]) > 0.5


@pytest.mark.parametrize("size", [1, 2, 3])
def test_noise_of_batches_is_that_of_all_orders_of_the_samples(size):
    """Var(Σ μʲ g_{t−j}) from the moments of every permutation of four numbers."""
    values, mu = np.array([1.0, -2.0, 4.0, 0.5]), 0.7
    values -= values.mean()
    length = len(values) // size
    orders = np.array(list(itertools.permutations(values)))
    batches = orders[:, : length * size].reshape(len(orders), length, size).mean(2)
    within = batches.T @ batches / len(orders)
    total = 0.0
    for place in range(length):
        # The epoch under way, and forty before it.
        ages = np.arange(place + 1 + 40 * length)
        epoch, slot = np.divmod(place - ages, length)
        covariance = np.where(
            epoch[:, None] == epoch, within[slot[:, None], slot[None, :]], 0
        )
        total += mu**ages @ covariance @ mu**ages / length
    expected = (1 - mu**2) * total / values.var()
    found = _noise_of_batches(jnp.asarray(mu), len(values), size)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_full_batches_have_no_noise():
    assert _noise_of_batches(jnp.asarray(0.5), 4, 4) == 0


def test_prediction_for_a_relu_network_is_as_good_as_it_says():
    model, data = relu_regression()
    prediction = hf.predict_drift(model, data, 10.0, ts=[0.0, 10.0])
    steps = 10_000
    gd = hf.descend(
        model, data, steps, learning_rate=10 / steps, record_every=steps
    ).laws["neurons[1]"]
    error = distance(gd[-1] - gd[0], prediction.drift(10 / steps)["neurons[1]"][-1])
    assert error < prediction.flow.stats["drift_error_estimate"] < 0.05


# The warning, and bad input.


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_warning_says_where_the_prediction_fails(prediction, momentum):
    largest = float(prediction.flow.observed["sharpness"].values.max())
    half = (1 + momentum) / largest
    prediction.drift(0.99 * half, momentum)  # A warning would be an error.
    with pytest.warns(UserWarning, match=f"measured sharpness λ_max = {largest:.4g}"):
        prediction.drift(1.01 * half, momentum)


def test_a_sharpness_that_was_not_measured_is_said_to_be_unknown(prediction):
    sharpness = prediction.flow.observed["sharpness"].values.at[3].set(jnp.nan)
    unknown = eqx.tree_at(
        lambda p: p.flow.observed["sharpness"].values, prediction, sharpness
    )
    with pytest.warns(UserWarning, match="could not be measured"):
        unknown.drift(1e-6)


def test_leading_order_is_wrong_by_what_is_said_on_a_quadratic():
    """Σ of squared velocities over all steps, against η → 0, by NumPy."""
    curvature, mu = 2.0, 0.6
    for fraction in (0.1, 0.5, 0.9):
        eta = fraction * 2 * (1 + mu) / curvature
        w, v, total = 1.0, 0.0, 0.0
        for _ in range(2000):
            v = mu * v + curvature * w
            w -= eta * v
            total += v**2
        leading = curvature / (2 * eta * (1 - mu))
        np.testing.assert_allclose(total / leading, 1 / (1 - fraction), rtol=1e-9)


def test_a_drift_does_not_underflow_with_the_squares_of_gradients():
    """Of weights s times as large, with targets of 0, it is s⁴ times as large.

    The gradient is s³ times as large here, and time 1/s² times as long.
    """
    net = hf.MLP((3, 4, 2), activation="linear", key=jr.key(0))
    x = jr.normal(jr.key(1), (6, 3))
    drifts = []
    for size in (1.0, 1e-60):
        scaled = jax.tree.map(lambda w, s=size: s * w if eqx.is_array(w) else w, net)
        data, t1 = (x, jnp.zeros((6, 2))), 1 / size**2
        run = hf.predict_drift(scaled, data, t1, rtol=1e-6, noise=True)
        mean, noise = run.flow.observed["drift"]
        drifts.append([d["matrix[1]"][-1] / size**4 for d in (mean, noise)])
    usual = np.abs(drifts[0]).max()
    assert usual > 1e-3
    np.testing.assert_allclose(drifts[1], drifts[0], atol=1e-4 * usual)


def test_what_makes_no_sense_is_refused(prediction):
    with pytest.raises(ValueError, match="`batch_size` must be an integer from 1 to"):
        prediction.drift(0.1, batch_size=SAMPLES + 1)
    with pytest.raises(ValueError, match="`momentum` must lie"):
        prediction.drift(0.1, 1.0)
    with pytest.raises(ValueError, match="`learning_rate` must be positive"):
        prediction.drift(-0.1)
    quiet = eqx.tree_at(
        lambda p: p.noise_integrals, prediction, None, is_leaf=lambda x: x is None
    )
    with pytest.raises(ValueError, match="pass `noise=True`"):
        quiet.drift(0.1, batch_size=3)
    model, data = neuron()
    with pytest.raises(ValueError, match="cannot be had with `objective`"):
        hf.predict_drift(
            model, data, 1.0, noise=True, objective=lambda m, d: jnp.sum(m.w**2)
        )
