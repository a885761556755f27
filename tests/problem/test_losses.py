"""Losses against numpy and scipy formulas, and how a risk puts samples together."""

import re

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.special

import homoflow as hf
from homoflow._problem._losses import Risk


def squared(f, y):
    return ((f - y) ** 2).sum() / 2


def logistic(f, y):
    return np.log1p(np.exp(-y * f)).sum()


def exponential(f, y):
    return np.exp(-y * f).sum()


def huber(f, y):
    return scipy.special.huber(0.7, f - y).sum()


def cross_entropy(f, y):
    return -(y * scipy.special.log_softmax(f)).sum()


def squared_slope(f, y):
    return f - y


def logistic_slope(f, y):
    return -y * scipy.special.expit(-y * f)


def exponential_slope(f, y):
    return -y * np.exp(-y * f)


def huber_slope(f, y):
    return np.clip(f - y, -0.7, 0.7)


def cross_entropy_slope(f, y):
    return scipy.special.softmax(f) * y.sum() - y


PREDICTION = np.array([1.3, -0.4, 0.2, -2.1])
REALS = np.array([0.1, -0.9, 1.7, -2.0])
SIGNS = np.array([1.0, 1.0, -1.0, -1.0])
PROBABILITIES = np.array([0.1, 0.2, 0.3, 0.4])

CASES = {
    "squared": (hf.SquaredLoss(), REALS, squared, squared_slope),
    "logistic": (hf.LogisticLoss(), SIGNS, logistic, logistic_slope),
    "exponential": (hf.ExponentialLoss(), SIGNS, exponential, exponential_slope),
    "huber": (hf.HuberLoss(delta=0.7), REALS, huber, huber_slope),
    "cross-entropy": (
        hf.SoftmaxCrossEntropy(),
        PROBABILITIES,
        cross_entropy,
        cross_entropy_slope,
    ),
}
every_loss = pytest.mark.parametrize(
    ("loss", "target", "formula", "slope"), CASES.values(), ids=CASES
)
every_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])


@every_loss
@every_dtype
def test_value_is_the_formula(loss, target, formula, slope, dtype):
    value = loss(jnp.asarray(PREDICTION, dtype), jnp.asarray(target, dtype))
    assert value.shape == ()
    assert value.dtype == dtype
    rounding = 8 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(value, formula(PREDICTION, target), rtol=rounding)


@every_loss
def test_gradient_is_the_closed_form(loss, target, formula, slope):
    gradient = jax.grad(loss)(jnp.asarray(PREDICTION), jnp.asarray(target))
    np.testing.assert_allclose(gradient, slope(PREDICTION, target), rtol=1e-13)


@every_loss
def test_gradient_is_the_slope_of_the_formula(loss, target, formula, slope):
    step = 1e-5
    differences = [
        (formula(PREDICTION + h, target) - formula(PREDICTION - h, target)) / (2 * step)
        for h in step * np.eye(len(PREDICTION))
    ]
    gradient = jax.grad(loss)(jnp.asarray(PREDICTION), jnp.asarray(target))
    np.testing.assert_allclose(gradient, differences, atol=1e-9, rtol=0)


@every_loss
def test_target_is_cast_to_the_predictions_dtype(loss, target, formula, slope):
    value = loss(jnp.asarray(PREDICTION, jnp.float32), jnp.asarray(target))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, formula(PREDICTION, target), rtol=1e-6)


@every_loss
def test_jit_and_vmap_change_nothing(loss, target, formula, slope):
    predictions = np.stack([PREDICTION, PREDICTION[::-1], 3 * PREDICTION])
    values = jax.jit(jax.vmap(loss, (0, None)))(predictions, jnp.asarray(target))
    expected = [formula(f, target) for f in predictions]
    np.testing.assert_allclose(values, expected, rtol=1e-14)


@every_loss
@pytest.mark.parametrize("shape", [(), (3,), (1, 4)])
def test_other_shapes_are_refused_not_broadcast(loss, target, formula, slope, shape):
    message = rf"predicts shape \(4,\).*target has shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        loss(jnp.asarray(PREDICTION), jnp.full(shape, 0.5))


@pytest.mark.parametrize(
    "loss", [hf.SquaredLoss(), hf.LogisticLoss(), hf.ExponentialLoss(), hf.HuberLoss()]
)
def test_scalar_predictions_have_scalar_targets(loss):
    alone = loss(jnp.array(0.3), jnp.array(-1.0))
    in_a_vector = loss(jnp.array([0.3]), jnp.array([-1.0]))
    np.testing.assert_array_equal(alone, in_a_vector)
    with pytest.raises(ValueError, match="predicts shape"):
        loss(jnp.array(0.3), jnp.array([-1.0]))


@pytest.mark.parametrize("index_dtype", [jnp.int32, jnp.uint8])
@every_dtype
def test_class_index_is_a_one_hot_target(index_dtype, dtype):
    loss, prediction = hf.SoftmaxCrossEntropy(), jnp.asarray(PREDICTION, dtype)
    rounding = 8 * float(jnp.finfo(dtype).eps)
    for label in range(4):
        value = loss(prediction, jnp.asarray(label, index_dtype))
        assert value.dtype == dtype
        expected = -scipy.special.log_softmax(PREDICTION)[label]
        np.testing.assert_allclose(value, expected, rtol=rounding)
        one_hot = jnp.zeros(4, dtype).at[label].set(1)
        np.testing.assert_allclose(value, loss(prediction, one_hot), rtol=rounding)


def test_integer_one_hot_targets_and_signs_are_numbers():
    one_hot = jnp.array([0, 0, 1, 0])
    expected = -scipy.special.log_softmax(PREDICTION)[2]
    value = hf.SoftmaxCrossEntropy()(jnp.asarray(PREDICTION), one_hot)
    np.testing.assert_allclose(value, expected, rtol=1e-15)
    signs = jnp.asarray(SIGNS, jnp.int32)
    value = hf.LogisticLoss()(jnp.asarray(PREDICTION), signs)
    np.testing.assert_allclose(value, logistic(PREDICTION, SIGNS), rtol=1e-15)


@pytest.mark.parametrize("margin", [1e3, -1e3])
def test_large_margins_do_not_overflow(margin):
    """log(1 + e^{−z}) → 0 or −z; the cross-entropy of two classes is the same."""
    expected = max(-margin, 0.0)
    logistic_value = hf.LogisticLoss()(jnp.array([margin]), jnp.array([1.0]))
    softmax_value = hf.SoftmaxCrossEntropy()(jnp.array([margin, 0.0]), jnp.array(0))
    assert float(logistic_value) == expected
    assert float(softmax_value) == expected


def test_huber_loss_joins_at_delta_with_its_slope():
    loss = hf.HuberLoss(delta=2.0)
    at = [jax.value_and_grad(loss)(jnp.array(r), jnp.array(0.0)) for r in (2.0, 3.0)]
    np.testing.assert_array_equal(at, [(2.0, 2.0), (4.0, 2.0)])


class TestRisk:
    model = staticmethod(lambda x: jnp.array([x[0] * x[1], x[0] - x[1]]))
    x = jr.normal(jr.key(0), (5, 2))
    y = jr.normal(jr.key(1), (5, 2))

    def sum_of_squares(self):
        x, y = np.asarray(self.x), np.asarray(self.y)
        f = np.stack([x[:, 0] * x[:, 1], x[:, 0] - x[:, 1]], axis=1)
        return ((f - y) ** 2).sum() / 2

    @pytest.mark.parametrize(
        ("loss", "samples"),
        [
            (hf.SquaredLoss(), 5),
            (hf.SquaredLoss(reduction="sum"), 1),
            (lambda f, y: jnp.sum((f - y) ** 2) / 2, 5),
        ],
        ids=["mean", "sum", "plain function"],
    )
    def test_risk_is_a_mean_unless_a_sum_is_asked_for(self, loss, samples):
        value = Risk(loss)(self.model, (self.x, self.y))
        np.testing.assert_allclose(value, self.sum_of_squares() / samples, rtol=1e-14)

    @pytest.mark.parametrize(
        "make",
        [
            hf.SquaredLoss,
            hf.LogisticLoss,
            hf.ExponentialLoss,
            hf.HuberLoss,
            hf.SoftmaxCrossEntropy,
        ],
    )
    def test_every_loss_can_be_summed(self, make):
        data = (self.x, jnp.abs(self.y))
        mean = Risk(make())(self.model, data)
        total = Risk(make(reduction="sum"))(self.model, data)
        np.testing.assert_allclose(total, 5 * mean, rtol=1e-15)

    def test_other_reductions_are_refused(self):
        with pytest.raises((ValueError, TypeError), match="max"):
            hf.SquaredLoss(reduction="max")  # pyright: ignore[reportArgumentType]

    def test_targets_of_another_shape_are_refused(self):
        with pytest.raises(ValueError, match=r"predicts shape \(2,\)"):
            Risk(hf.SquaredLoss())(self.model, (self.x, self.y[:, 0]))


@pytest.mark.parametrize("loss", [hf.LogisticLoss(), hf.ExponentialLoss()])
def test_margin_losses_refuse_labels_zero_and_one(loss):
    loss.check_targets(jnp.array([-1.0, 1.0]), 1)
    with pytest.raises(ValueError, match="2·y − 1"):
        loss.check_targets(jnp.array([0, 1]), 1)


@pytest.mark.parametrize("labels", [[0, 3], [-1, 2]])
def test_cross_entropy_refuses_classes_that_do_not_exist(labels):
    loss = hf.SoftmaxCrossEntropy()
    loss.check_targets(jnp.array([0, 2]), 3)
    with pytest.raises(ValueError, match=r"0…2 for 3 outputs"):
        loss.check_targets(jnp.array(labels), 3)


def test_huber_loss_refuses_a_negative_delta():
    with pytest.raises(ValueError, match="`delta` must be positive"):
        hf.HuberLoss(delta=-1.0)
