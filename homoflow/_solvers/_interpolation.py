"""Between two steps of a one-step method: a polynomial of the time."""

from abc import abstractmethod
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


class AbstractStepPolynomial(dfx.AbstractLocalInterpolation):
    """From `y0` to `y1`, with `bends` as the method's stages give them."""

    t0: Any
    t1: Any
    y0: PyTree[Array]
    y1: PyTree[Array]
    bends: PyTree[Float[Array, "bends ..."]]

    @staticmethod
    @abstractmethod
    def at(
        s: Float[Array, ""], start: Array, end: Array, bends: Float[Array, "bends ..."]
    ) -> Array:
        """One array at the share `s` of the step."""

    def evaluate(self, t0, t1=None, left=True):
        del left
        if t1 is not None:
            return jax.tree.map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        length = jnp.asarray(self.t1 - self.t0)
        here = (t0 - self.t0) / jnp.where(length == 0, 1, length)
        return jax.tree.map(
            lambda start, end, bends: self.at(
                here.astype(start.dtype), start, end, bends
            ),
            self.y0,
            self.y1,
            self.bends,
        )
