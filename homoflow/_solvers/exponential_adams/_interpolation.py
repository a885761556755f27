"""Between two steps of an exponential multistep method."""

from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ._phi_functions import phi_functions


class ExponentialInterpolation(dfx.AbstractLocalInterpolation):
    """The solution of w' = J w + N(t) between two steps, for a polynomial N.

    - `slopes`, `last_slope`: f at past steps and at the predicted end of this one. Flat, as
        the basis is: what takes them apart would copy them in each step.
    - `basis`, `vectors`, `rates`: of J.
    - `nonlinear_coordinates`, `slope_coordinates`: N and f at those times, in J's
        directions.
    - `powers`: row i has the coefficients of the polynomial that the i-th value is
        weighted with, in powers of the time in units of the step.
    """

    t0: Any
    t1: Any
    y0: PyTree[Array]
    slopes: Float[Array, "points size"]
    last_slope: Float[Array, " size"]
    basis: Float[Array, "rows size"]
    vectors: Float[Array, "rows rows"]
    rates: Float[Array, " rows"]
    nonlinear_coordinates: Float[Array, "values rows"]
    slope_coordinates: Float[Array, "values rows"]
    powers: Float[Array, "values degrees"]

    def evaluate(self, t0, t1=None, left=True):
        del left
        if t1 is not None:
            return jax.tree.map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        dtype, degrees = self.rates.dtype, self.powers.shape[1]
        length = jnp.asarray(self.t1 - self.t0)
        fraction = ((t0 - self.t0) / jnp.where(length == 0, 1, length)).astype(dtype)
        span = length.astype(dtype) * fraction
        rates = jnp.append(span * self.rates, jnp.zeros(1, dtype))
        powers = jnp.cumprod(jnp.full(degrees, fraction).at[0].set(1))
        weights = span * (self.powers * powers) @ phi_functions(rates, degrees)
        stiff, nonstiff = weights[:, :-1], weights[:, -1]
        along = jnp.sum(stiff * self.nonlinear_coordinates, axis=0)
        along = along - nonstiff @ self.slope_coordinates

        start, unravel = ravel_pytree(self.y0)
        moved = nonstiff[:-1] @ self.slopes + nonstiff[-1] * self.last_slope
        return unravel(start + moved + (self.vectors @ along) @ self.basis)
