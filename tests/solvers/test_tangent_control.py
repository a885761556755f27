"""Derivatives through stiff flows, beside the equation of the tangent by SciPy."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.integrate import solve_ivp

import homoflow as hf

MODEL = hf.MLP((2, 3, 1), activation=jax.nn.silu, key=jax.random.key(0))
ARRAYS, FROZEN = eqx.partition(MODEL, eqx.is_inexact_array)
START, UNRAVEL = ravel_pytree(ARRAYS)
#: So large that stability bounds the steps of an explicit method.
SCALE = 20.0
UNCONTROLLED = diffrax.PIDController(rtol=1e-6, atol=1e-6)


def problem(seed: int):
    keys = jax.random.split(jax.random.key(seed), 3)
    start = 0.7 * jax.random.normal(keys[0], START.shape)
    x = jax.random.normal(keys[1], (6, 2))
    return start, x, jax.random.normal(keys[2], (6, 1))


def end(scale, start, x, y, **options):
    model = eqx.combine(UNRAVEL(start), FROZEN)
    run = hf.flow(model, (scale * x, y), 1.0, solver=diffrax.Tsit5(), **options)
    return ravel_pytree(eqx.filter(run.model, eqx.is_inexact_array))[0]


def true_slope(start, x, y):
    """∂w(1)/∂scale by the equations of w and of the tangent together."""

    def loss(w, scale):
        predicted = jax.vmap(eqx.combine(UNRAVEL(w), FROZEN))(scale * x)
        return jnp.mean((predicted - y) ** 2) / 2

    @jax.jit
    def velocity(state):
        w, tangent = jnp.split(state, 2)
        both = jax.jvp(jax.grad(loss), (w, SCALE), (tangent, 1.0))
        return -jnp.concatenate(both)

    state = np.concatenate([start, np.zeros(start.size)])
    solution = solve_ivp(
        lambda _, state: np.asarray(velocity(state)), (0, 1), state, method="LSODA",
        rtol=1e-11, atol=1e-13,
    )  # fmt: skip
    return np.split(solution.y[:, -1], 2)[1]


@pytest.mark.parametrize("seed", [0, 2, 4])
def test_forward_derivatives_of_a_stiff_flow(seed):
    """The negative control: the same steps, controlled by the weights alone."""
    given = problem(seed)

    def slope(**options):
        forward = diffrax.ForwardMode()
        along = jax.jit(lambda s: end(s, *given, adjoint=forward, **options))
        return jax.jvp(along, (SCALE,), (1.0,))[1]

    wanted = true_slope(*given)
    size = np.linalg.norm(wanted)
    assert np.linalg.norm(slope(rtol=1e-6) - wanted) < 2e-4 * size
    off = np.linalg.norm(slope(stepsize_controller=UNCONTROLLED) - wanted)
    assert off > 4e-3 * size


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_reverse_derivatives_of_a_stiff_flow(transform):
    given = problem(2)
    direction = jax.random.normal(jax.random.key(9), START.shape)
    objective = transform(lambda s: direction @ end(s, *given, rtol=1e-6))
    wanted = true_slope(*given)
    error = abs(jax.grad(objective)(SCALE) - direction @ wanted)
    assert error < 2e-4 * np.linalg.norm(wanted) * np.linalg.norm(direction)


def test_the_value_beside_a_derivative_is_the_flow():
    """Steps differ, by no more than the tolerance."""
    given = problem(0)
    value, _ = jax.value_and_grad(lambda s: jnp.sum(end(s, *given, rtol=1e-6)))(SCALE)
    np.testing.assert_allclose(
        value, jnp.sum(end(SCALE, *given, rtol=1e-10)), rtol=1e-4
    )


def test_steps_that_overflow_and_are_rejected_leave_derivatives_finite():
    """The first step that Diffrax tries is far too long for five layers."""
    model = hf.MLP((3, 4, 4, 4, 4, 1), activation="linear", key=jax.random.key(0))
    x = 30 * jax.random.normal(jax.random.key(1), (8, 3))
    y = x[:, :1]

    def last_loss(t1):
        return hf.flow(model, (x, y), t1, solver=diffrax.Tsit5()).losses[-1]

    run = hf.flow(model, (x, y), 1e-4, solver=diffrax.Tsit5(), rtol=1e-10)
    wanted = -(run.grad_norms[-1] ** 2)
    np.testing.assert_allclose(jax.grad(last_loss)(1e-4), wanted, rtol=1e-5)


@pytest.mark.parametrize("by", ["forward", "reverse", "jit"])
def test_derivatives_by_what_a_loss_closes_over(by):
    x = jax.random.normal(jax.random.key(1), (8, 2))
    adjoint = diffrax.ForwardMode() if by == "forward" else None

    def last_loss(factor):
        run = hf.flow(
            MODEL, (x, x[:, :1]), 1.0, adjoint=adjoint,
            loss=lambda output, target: factor * jnp.mean((output - target) ** 2),
        )  # fmt: skip
        return run.losses[-1]

    ahead, behind = last_loss(2.001), last_loss(1.999)
    differentiate = jax.jacfwd if by == "forward" else jax.grad
    found = differentiate(jax.jit(last_loss) if by == "jit" else last_loss)(2.0)
    np.testing.assert_allclose(found, (ahead - behind) / 0.002, rtol=1e-5)
