"""What is recorded between the ends is as accurate as the end."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")
SLOPE, START = 4.0, 1e-3
TIMES = np.linspace(0, 4, 81)


def product_error(**options) -> np.ndarray:
    """Relative errors of uv of a linear network from the logistic curve, at `TIMES`.

    d(uv)/dt = 2uv(σ − uv) for u = v, so that uv = σ/(1 + (σ/s₀ − 1)e^{−2σt}).
    """
    model = hf.MLP((1, 1, 1), activation="linear", key=jax.random.key(0))
    start = jnp.full((1, 1), np.sqrt(START))
    model = eqx.tree_at(lambda m: [n.weight for n in m.layers], model, [start, start])
    x = jnp.ones((1, 1))
    run = hf.flow(model, (x, SLOPE * x), 4.0, ts=TIMES, save_models=True, **options)
    u, v = (np.ravel(layer.weight) for layer in run.models.layers)
    truth = SLOPE / (1 + (SLOPE / START - 1) * np.exp(-2 * SLOPE * TIMES))
    return np.abs(u * v / truth - 1)


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({}, 1e-10),
        ({"rtol": 1e-12}, 1e-12),
        ({"solver": diffrax.Kvaerno5(), "rtol": 1e-7}, 3e-6),
        ({"solver": hf.ExponentialAdams(), "rtol": 1e-10}, 3e-9),
    ],
)
def test_times_between_the_ends_keep_the_tolerance(options, bound):
    assert np.max(product_error(**options)) < bound


def test_a_user_controller_is_left_alone():
    """Then Dopri8 interpolates, and is seen to lose accuracy."""
    controller = diffrax.PIDController(rtol=1e-10, atol=1e-12)
    errors = product_error(solver=diffrax.Dopri8(), stepsize_controller=controller)
    assert np.max(errors) > 1e-9
