"""Between two steps of a one-step method: a polynomial of the time."""

from abc import abstractmethod
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


class AbstractStepPolynomial(dfx.AbstractLocalInterpolation):
    """From `y0` to `y1`, with `coefficients` as the method's stages give them."""

    t0: Any
    t1: Any
    y0: PyTree[Array]
    y1: PyTree[Array]
    coefficients: PyTree[Float[Array, "coefficients ..."]]

    @staticmethod
    @abstractmethod
    def evaluate_leaf(
        s: Float[Array, ""],
        start: Array,
        end: Array,
        coefficients: Float[Array, "coefficients ..."],
    ) -> Array:
        """One array at the fraction `s` of the step."""

    def evaluate(self, t0, t1=None, left=True):
        del left
        if t1 is not None:
            return jax.tree.map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        length = jnp.asarray(self.t1 - self.t0)
        fraction = (t0 - self.t0) / jnp.where(length == 0, 1, length)
        return jax.tree.map(
            lambda start, end, coefficients: self.evaluate_leaf(
                fraction.astype(start.dtype), start, end, coefficients
            ),
            self.y0,
            self.y1,
            self.coefficients,
        )
