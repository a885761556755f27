"""Polynomials through past values, on steps of any length."""

from typing import NamedTuple

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
    itself = jnp.eye(points, dtype=bool)
    factors = jnp.where(itself, 1, ahead[:, None] / jnp.where(itself, 1, apart))
    known = jnp.tril(jnp.ones((points, points), bool))
    extrapolation = jnp.where(known, jnp.cumprod(factors, axis=0), 0)
    differences = extrapolation * ahead[None, :] / ahead[:, None]
    row = jnp.zeros(points + 1, back.dtype).at[0].set(1)
    rows = [row]
    for j in range(points):
        shifted = jnp.concatenate([jnp.zeros_like(row[:1]), row[:-1]])
        row = (shifted - back[j] * row) / ahead[j]
        rows.append(row)
    return NewtonForm(differences, extrapolation, jnp.stack(rows))
