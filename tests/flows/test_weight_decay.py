"""The flow with weight decay: how laws decay, and what it is the limit of."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from problems import flat, relu_regression, saved

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")
DECAY, T1, LOSS = 0.3, 2.0, hf.SoftmaxCrossEntropy()


def classifier():
    x = jr.normal(jr.key(1), (12, 3))
    model = hf.MLP((3, 4, 3), activation="linear", init=hf.Gaussian(0.5), key=jr.key(0))
    return model, (x, jnp.argmax(x, axis=1))


@pytest.fixture(scope="module")
def flow() -> hf.Trajectory:
    return hf.flow(*classifier(), T1, loss=LOSS, weight_decay=DECAY)


def test_quadratic_laws_decay_at_twice_the_rate_of_linear_ones(flow):
    ts = np.asarray(flow.ts)
    for name, rate in [("matrix[1]", 2), ("neurons[1]", 2), ("layers[1]", 2),
                       ("output_sums[2]", 1)]:  # fmt: skip
        start, law = np.asarray(flow.laws[name][0]), np.asarray(flow.laws[name])
        expected = np.multiply.outer(np.exp(-rate * DECAY * ts), start)
        assert np.abs(start).max() > 0.1
        np.testing.assert_allclose(law, expected, rtol=0, atol=1e-8)
    assert set(flow.laws) == {"matrix[1]", "neurons[1]", "layers[1]", "output_sums[2]"}
    assert flow.stats["law_violation"] < 1e-13
    assert flow.stats["dynamics"] == "gradient flow with weight decay"


MOMENTUM = 0.8


def coupled(rate):
    """Decay is added to the gradient, and goes through the momentum."""
    return optax.chain(
        optax.add_decayed_weights(DECAY), optax.sgd(rate, momentum=MOMENTUM)
    )


def decoupled(rate):
    """Decay is added to the velocity: a step of time h = η/(1−μ) takes off ηλ."""
    return optax.chain(
        optax.trace(MOMENTUM),
        optax.add_decayed_weights(DECAY / (1 - MOMENTUM)),
        optax.scale(-rate),
    )


@pytest.mark.parametrize("optimizer", [coupled, decoupled])
def test_it_is_the_limit_of_descent_with_coupled_and_decoupled_decay(flow, optimizer):
    errors = []
    for index, steps in ((1, 400), (2, 800)):
        gd = hf.descend(
            *classifier(), 800, learning_rate=T1 / steps * (1 - MOMENTUM), loss=LOSS,
            optimizer=optimizer, record_every=400, save_models=True,
        )  # fmt: skip
        np.testing.assert_allclose(gd.ts[index], T1)
        ends = [layer.weight[index].ravel() for layer in saved(gd).layers]
        errors.append(np.linalg.norm(np.concatenate(ends) - flat(flow.model)))
    assert errors[0] < 0.01
    assert abs(np.log2(errors[0] / errors[1]) - 1) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": -0.1}, "`weight_decay` must be finite and not negative"),
        ({"weight_decay": float("nan")}, "`weight_decay` must be finite"),
        ({"weight_decay": 0.1, "solver": hf.Filippov()}, "`weight_decay` is for Diff"),
    ],
)
def test_bad_weight_decay_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hf.flow(*relu_regression(), 1.0, **options)


@pytest.mark.filterwarnings("ignore:The relative error of the final weights")
def test_with_kinks_it_is_averaged_and_says_so():
    model, data = relu_regression()
    flow = hf.flow(model, data, 1.0, weight_decay=DECAY, rtol=1e-6, ts=[0.0, 1.0])
    assert flow.stats["solver"] == "Heun"
    assert "not the exact flow: `weight_decay`" in str(flow.stats["solver_reason"])
    start, end = flow.laws["neurons[1]"]
    # Between the averaged flow's own accuracy and none.
    np.testing.assert_allclose(end, np.exp(-2 * DECAY) * start, rtol=0, atol=1e-4)
