"""Polynomials through past values, on steps of any length."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class NewtonForm(NamedTuple):
    """Newton's form of the polynomials through values at times s_0 = 0 > s_1 > ….

    In units of the step that is taken now, from s = 0 to 1, with the basis
    p_j(s) = Π_{i<j} (s − s_i)/(1 − s_i), so that p_j(1) = 1.

    - `differences`: of the values; row j makes the coefficient of p_j.
    - `extrapolation`: row j makes the value at s = 1 of the polynomial through the first
        j + 1 values.
    - `powers`: row j has the coefficients of p_j as a polynomial in s. As s_i ≤ 0, none
        is negative: nothing cancels in its integrals.
    """

    differences: Float[Array, "points points"]
    extrapolation: Float[Array, "points points"]
    powers: Float[Array, "points+1 points+1"]


def newton_form(back: Float[Array, " points"]) -> NewtonForm:
    """From the times of past values, from now (0) back (negative)."""
    points = back.size
    ahead = 1 - back
    apart = back[None, :] - back[:, None]
    is_same = jnp.eye(points, dtype=bool)
    factors = jnp.where(is_same, 1, ahead[:, None] / jnp.where(is_same, 1, apart))
    initial = jnp.ones_like(back), jnp.zeros(points + 1, back.dtype).at[0].set(1)

    def next_row(rows, inputs):
        (product, power), (factor, time, length) = rows, inputs
        product = product * factor
        shifted = jnp.concatenate([jnp.zeros_like(power[:1]), power[:-1]])
        return (product, (shifted - time * power) / length), (product, power)

    (_, last), (products, powers) = jax.lax.scan(
        next_row, initial, (factors, back, ahead)
    )
    extrapolation = jnp.tril(products)
    differences = extrapolation * ahead[None, :] / ahead[:, None]
    return NewtonForm(
        differences, extrapolation, jnp.append(powers, last[None], axis=0)
    )
