"""A step of the second-order Runge–Kutta–Chebyshev method."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

#: The damping, and how much of s² a step may be in units of 1/ρ.
_DAMPING = 2 / 13
_REACH = 1 / 1.54


#: How much a step's length may change, and the safety factor.
_SHRINK, _GROW, _SAFETY = 0.1, 5.0, 0.8

Velocity = Callable[[Array, Any], tuple[Array, Any]]


def num_stages(
    length: Float[Array, ""], radius: Float[Array, ""], most: int
) -> Int[Array, ""]:
    """How many stages keep a step stable, if the Jacobian's spectrum is in [−radius, 0]."""
    needed = 1 + jnp.sqrt(1 + length * radius / _REACH)
    return jnp.clip(jnp.floor(needed).astype(int), 2, most)


def longest_step(radius: Float[Array, ""], most: int) -> Float[Array, ""]:
    """The step that `most` stages keep stable."""
    return (float(most - 1) ** 2 - 1) * _REACH / radius


def chebyshev_step(
    velocity: Velocity,
    start: Float[Array, " size"],
    first: Float[Array, " size"],
    length: Float[Array, ""],
    stages: Int[Array, ""],
    carry: Any,
) -> tuple[Float[Array, " size"], Any]:
    """One step of dw/dτ = F(w) [Sommeijer, Shampine & Verwer 1998].

    Its stages are Chebyshev polynomials of the step, stable along the negative real axis
    up to about 0.65·stages²: a step of many 1/ρ costs the square root of what Euler's
    method needs. `velocity(w, carry)` returns F and the next carry; `first` is F(start).

    **Returns:** the end of the step, and the last carry.
    """
    dtype = start.dtype
    s = stages.astype(dtype)
    w0 = 1 + _DAMPING / s**2
    root = jnp.sqrt(w0**2 - 1)
    angle = s * jnp.log(w0 + root)
    sinh, cosh = jnp.sinh(angle), jnp.cosh(angle)
    w1 = sinh * root**2 / (cosh * s * root - w0 * sinh)
    b1 = 1 / (2 * w0) ** 2  # b₀ = b₁ = b₂.

    def stage(_, loop):
        before, last, polynomials, coefficients, carry = loop
        (z2, z1), (d2, d1), (e2, e1) = polynomials
        b2, bl = coefficients
        z = 2 * w0 * z1 - z2
        d = 2 * w0 * d1 - d2 + 2 * z1
        e = 2 * w0 * e1 - e2 + 4 * d1
        b = e / d**2
        mu, nu = 2 * b * w0 / bl, -b / b2
        mu_tilde = 2 * b * w1 / bl
        gamma = -mu_tilde * (1 - bl * z1)
        slope, carry = velocity(last, carry)
        new = (
            (1 - mu - nu) * start
            + mu * last
            + nu * before
            + length * (mu_tilde * slope + gamma * first)
        )
        polynomials = (z1, z), (d1, d), (e1, e)
        return last, new, polynomials, (bl, b), carry

    one, zero = jnp.ones((), dtype), jnp.zeros((), dtype)
    polynomials = (one, w0), (zero, one), (zero, zero)
    second = start + b1 * w1 * length * first
    loop = (start, second, polynomials, (b1, b1), carry)
    _, end, *_, carry = lax.fori_loop(2, stages + 1, stage, loop)
    return end, carry


def estimate_error(
    start: Array, end: Array, first: Array, last: Array, length: Float[Array, ""]
) -> Float[Array, " size"]:
    """The local error of a step, from the velocities at its ends [ibid., eq. 2.11]."""
    return 0.8 * (start - end) + 0.4 * length * (first + last)


def change_of_length(
    error: Float[Array, ""], is_good: Bool[Array, ""]
) -> Float[Array, ""]:
    """By which factor the next step is longer, from this one's error in tolerances.

    At most half as long after one that is not taken, whatever its error.
    """
    change = _SAFETY * jnp.maximum(error, 1e-9) ** (-1 / 3)
    change = jnp.where(jnp.isfinite(error), jnp.clip(change, _SHRINK, _GROW), _SHRINK)
    return jnp.where(is_good, change, jnp.minimum(change, 0.5))
