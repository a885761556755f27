"""What a step of exponential Adams is made of, and its prediction."""

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ._divided_differences import newton_form
from ._history import Attempt, History, StepCoefficients
from ._phi_functions import phi_functions


def step_coefficients(before: History, h: Array) -> StepCoefficients:
    """What a step of length h is made of."""
    points, j = before.slopes.shape[0], before.jacobian
    number = jnp.arange(points - 1)
    steps = jnp.where(number < before.num_known - 1, before.step_sizes / h, 1)
    form = newton_form(jnp.append(jnp.zeros(1, h.dtype), -jnp.cumsum(steps)))
    rates = jnp.append(h * j.rates, jnp.zeros(1, h.dtype))
    is_used = jnp.arange(points)[:, None] < before.order
    linear = j.rates * (before.state_coordinates - before.state_coordinates[0])
    return StepCoefficients(
        h=h,
        form=form,
        phi=form.powers @ phi_functions(rates, points + 1),
        nonlinear_coordinates=before.slope_coordinates - linear,
        differences=jnp.where(is_used, form.differences, 0),
    )


def predict(
    before: History, coefficients: StepCoefficients, w: Array
) -> tuple[Array, Array]:
    """The state at the step's end, and how far it has moved in J's directions."""
    phi = coefficients.phi[:-1]
    weights = coefficients.h * coefficients.differences.T @ phi
    stiff, nonstiff = weights[:, :-1], weights[:, -1]
    moved = jnp.sum(stiff * coefficients.nonlinear_coordinates, axis=0)
    along = moved - nonstiff @ before.slope_coordinates
    combined = before.jacobian.combine(along[None])[0]
    return w + nonstiff @ before.slopes + combined, moved


def dense_info(
    before: History, coefficients: StepCoefficients, attempt: Attempt, unravel
) -> dict[str, PyTree]:
    """What `ExponentialInterpolation` needs of a step."""
    points, order, j = before.slopes.shape[0], before.order, before.jacobian
    form, past = coefficients.form, coefficients.nonlinear_coordinates
    # Weights of past values and of the one at the predicted end, in Newton's basis.
    residual = jnp.append(-form.extrapolation[order - 1], jnp.ones_like(coefficients.h))
    is_last = (jnp.arange(points + 1) == order).astype(residual.dtype)
    weights = jnp.pad(coefficients.differences.T, ((0, 1), (0, 1)))
    weights = weights + residual[:, None] * is_last
    last = attempt.slope_coordinates - j.rates * attempt.prediction_coordinates
    return {
        "y0": unravel(before.states[0]),
        "slopes": before.slopes,
        "last_slope": attempt.slope,
        "basis": j.basis,
        "vectors": j.vectors,
        "rates": j.rates,
        "nonlinear_coordinates": jnp.append(past, last[None], axis=0),
        "slope_coordinates": jnp.append(
            before.slope_coordinates, attempt.slope_coordinates[None], axis=0
        ),
        "powers": weights @ form.powers,
    }
