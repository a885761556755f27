"""Between two steps of an exponential multistep method."""

from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ._moments import moments


class ExponentialInterpolation(dfx.AbstractLocalInterpolation):
    """The solution of w' = J w + N(t) between two steps, for a polynomial N.

    - `slopes`: f at past steps and at the predicted end of this one.
    - `directions`, `rates`: of J.
    - `inner`, `plain`: N and f at those times, in J's directions.
    - `powers`: row i has the coefficients of the polynomial that the i-th value is
        weighted with, in powers of the time in units of the step.
    """

    t0: Any
    t1: Any
    y0: PyTree[Array]
    slopes: PyTree[Float[Array, "values ..."]]
    directions: PyTree[Float[Array, "room ..."]]
    rates: Float[Array, " room"]
    inner: Float[Array, "values room"]
    plain: Float[Array, "values room"]
    powers: Float[Array, "values degrees"]

    def evaluate(self, t0, t1=None, left=True):
        del left
        if t1 is not None:
            return jax.tree.map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        dtype, degrees = self.rates.dtype, self.powers.shape[1]
        length = jnp.asarray(self.t1 - self.t0)
        share = ((t0 - self.t0) / jnp.where(length == 0, 1, length)).astype(dtype)
        span = length.astype(dtype) * share
        rates = jnp.append(span * self.rates, jnp.zeros(1, dtype))
        powers = jnp.cumprod(jnp.full(degrees, share).at[0].set(1))
        weights = span * (self.powers * powers) @ moments(rates, degrees)
        inner, rest = weights[:, :-1], weights[:, -1]
        along = jnp.sum(inner * self.inner, axis=0) - rest @ self.plain

        def at(start, slopes, directions):
            moved = jnp.tensordot(rest, slopes, 1)
            return start + moved + jnp.tensordot(along, directions, 1)

        return jax.tree.map(at, self.y0, self.slopes, self.directions)
