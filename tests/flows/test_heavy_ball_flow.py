"""The heavy ball against closed forms, momentum in Optax, and Noether's theorem."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import scipy.integrate
import scipy.linalg
from problems import flat, linear_regression, relu_regression, saved

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")

# A convex quadratic: damped oscillators.


def pushed() -> hf.MLP:
    return hf.MLP((3, 2), key=jr.key(9))


def quadratic() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The Hessian's block, the optimum, and the start."""
    model, (x, y) = linear_regression()
    x, y = np.asarray(x), np.asarray(y)
    return (
        x.T @ x / len(x),
        (np.linalg.pinv(x) @ y).T,
        np.asarray(model.layers[0].weight),
    )


def test_linear_model_is_a_damped_oscillator():
    mass = 0.7
    ball = hf.heavy_ball_flow(
        *linear_regression(), 4.0, mass=mass, velocity=pushed(), save_models=True
    )
    covariance, optimum, start = quadratic()
    moving = np.asarray(pushed().layers[0].weight)
    generator = np.block([[np.zeros((3, 3)), np.eye(3)],
                          [-covariance / mass, -np.eye(3) / mass]])  # fmt: skip
    state = np.concatenate([(start - optimum).T, moving.T])
    truth = [(scipy.linalg.expm(generator * t) @ state)[:3].T for t in ball.ts]
    np.testing.assert_allclose(
        saved(ball).layers[0].weight, optimum + np.stack(truth), rtol=0, atol=1e-8
    )
    assert ball.stats["mass"] == mass
    assert ball.stats["dynamics"] == "heavy-ball flow"


def from_rest(mass: float, t1: float = 4.0) -> np.ndarray:
    ball = hf.heavy_ball_flow(*linear_regression(), t1, mass=mass, save_models=True)
    return flat(ball.model).reshape(2, 3)


def test_without_mass_it_is_the_gradient_flow():
    covariance, optimum, start = quadratic()
    truth = optimum + (start - optimum) @ scipy.linalg.expm(-4 * covariance)
    masses = np.array([0.02, 0.01, 0.005])
    errors = [np.linalg.norm(from_rest(m) - truth) for m in masses]
    assert abs(np.polyfit(np.log(masses), np.log(errors), 1)[0] - 1) < 0.1


@pytest.mark.parametrize("fixed", ["momentum", "mass"])
def test_descent_with_momentum_follows_it_to_second_order(fixed):
    errors = []
    for steps in (100, 200):
        h = 4 / steps
        # m = h(1+μ)/(2(1−μ)) = 0.4 in the second case.
        ratio = 0.25 if fixed == "momentum" else h / (2 * 0.4)
        momentum = (1 - ratio) / (1 + ratio)
        rate = h * (1 - momentum)
        gd = hf.descend(
            *linear_regression(), steps, learning_rate=rate, record_every=steps,
            optimizer=functools.partial(optax.sgd, momentum=momentum),
        )  # fmt: skip
        ball = hf.heavy_ball_flow(
            *linear_regression(), 4.0, learning_rate=rate, momentum=momentum,
            save_models=True,
        )  # fmt: skip
        np.testing.assert_allclose(gd.ts[-1], ball.ts[-1])
        np.testing.assert_allclose(ball.stats["mass"], h / (2 * ratio), rtol=1e-12)
        errors.append(hf.compare(ball, gd).weight_distance)
    assert abs(np.log2(errors[0] / errors[1]) - 2) < 0.1


# Noether's theorem: linear units turn, ReLU units do not.

SIZES, MASS, T1 = (3, 4, 4, 2), 0.5, 2.0


def network(activation, seed: int) -> hf.MLP:
    return hf.MLP(SIZES, activation=activation, init=hf.Gaussian(0.5), key=jr.key(seed))


@pytest.fixture(scope="module")
def ball() -> hf.Trajectory:
    """Linear units below, ReLU units above; recorded as if all of them were linear."""
    model, velocity = (network(("linear", "relu"), seed) for seed in (0, 5))
    x = jr.normal(jr.key(1), (12, 3))
    laws = hf.laws(network("linear", 0))
    return hf.heavy_ball_flow(
        model, (x, jnp.tanh(x[:, :2] - x[:, 1:])), T1, mass=MASS, velocity=velocity,
        laws=laws, solver=dfx.Dopri8(), rtol=1e-10, ts=np.linspace(0, T1, 2001),
        save_models=True,
    )  # fmt: skip


def test_rotations_of_linear_units_lose_to_friction_alone_those_of_relu_more(ball):
    first, second, third = (
        (np.asarray(a.weight), np.asarray(b.weight))
        for a, b in zip(network("linear", 0).layers, network("linear", 5).layers,
                        strict=True)
    )  # fmt: skip

    def charge(below, above):
        """W₁Ẇ₁ᵀ + W₂ᵀẆ₂, less its transpose."""
        product = below[0] @ below[1].T + above[0].T @ above[1]
        return product - product.T

    decay = np.exp(-np.asarray(ball.ts) / MASS)[:, None, None]
    starts = {
        "rotations[1]": charge(first, second),
        "rotations[2]": charge(second, third),
    }
    errors = {}
    for name, start in starts.items():
        np.testing.assert_allclose(ball.laws[name][0], start, rtol=1e-13, atol=1e-15)
        assert np.abs(start).max() > 0.5
        errors[name] = np.abs(np.asarray(ball.laws[name]) - decay * start).max()
    assert errors["rotations[1]"] < 1e-7
    assert errors["rotations[2]"] > 0.01
    # And the certificate knows that some of these are none.
    assert ball.stats["law_violation"] > 0.01


def test_balance_laws_obey_their_relation_of_second_order(ball):
    ts = np.asarray(ball.ts)
    layers = [np.asarray(layer.weight) for layer in saved(ball).layers]
    moving = [np.gradient(w, ts, axis=0, edge_order=2) for w in layers[:2]]
    squares = (
        moving[0] @ moving[0].swapaxes(1, 2) - moving[1].swapaxes(1, 2) @ moving[1]
    )
    law = np.asarray(ball.laws["matrix[1]"])
    rate = np.gradient(law, ts, axis=0, edge_order=2)
    added = scipy.integrate.cumulative_trapezoid(squares, ts, axis=0, initial=0)
    # m D̈ + Ḋ = 2m q(ẇ), integrated.
    kept = law + MASS * rate - 2 * MASS * added
    assert np.ptp(law, axis=0).max() > 0.1
    assert np.ptp(kept, axis=0).max() < 1e-4


def test_from_rest_there_is_no_charge_and_bad_momenta_of_a_batch_are_result_codes():
    model = network("linear", 0)
    x = jr.normal(jr.key(1), (12, 3))

    @eqx.filter_jit
    @eqx.filter_vmap
    def sweep(momentum):
        return hf.heavy_ball_flow(
            model, (x, x[:, :2]), 0.5, learning_rate=0.1, momentum=momentum, throw=False
        )

    balls = sweep(jnp.array([0.5, 1.5]))
    for name in ("rotations[1]", "rotations[2]"):
        assert np.abs(balls.laws[name][0]).max() < 1e-8
        assert np.all(np.isnan(balls.laws[name][1]))
    # Of a true symmetry.
    assert balls.stats["law_violation"][0] < 1e-13
    result = jax.tree.map(lambda r: r[1], balls.result)
    assert result == hf.RESULTS.bad_coefficient
    assert np.all(np.isnan(balls.losses[1]))


# At the door.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give either `mass`, or both"),
        ({"mass": 1.0, "momentum": 0.5}, "Give either `mass`, or both"),
        ({"learning_rate": 0.1}, "Give either `mass`, or both"),
        ({"mass": 0.0}, "`mass` must be positive"),
        ({"learning_rate": 0.1, "momentum": 1.0}, "`momentum` must lie in"),
        ({"mass": 1.0, "velocity": jnp.ones(3)}, "must be a pytree like `model`"),
        (
            {"mass": 1.0, "velocity": hf.MLP((3, 7, 2), key=jr.key(0))},
            "must be a pytree like `model`",
        ),
        (
            {"learning_rate": 0.1, "momentum": 0.5, "velocity": pushed()},
            "`velocity` goes with `mass`",
        ),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hf.heavy_ball_flow(*relu_regression(), 1.0, **options)
