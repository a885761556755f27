"""Matrix laws of wide layers, of which a run records a summary."""

from typing import NamedTuple, final

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._laws import Law
from ._base import AbstractObservable, Point


class MatrixLawSummary(NamedTuple):
    """What is recorded of a matrix law H that is too large to be recorded whole.

    - `norm`: ‖H‖ in the Frobenius norm; `drift`: ‖H − H₀‖, with H₀ at the start.
    - `diagonal`: the entries on the diagonal, those of the law of single units.
    """

    norm: Float[Array, ""]
    drift: Float[Array, ""]
    diagonal: Float[Array, " units"]


@final
class LargeLaw(AbstractObservable):
    """The summary of a matrix law. Each takes as many products as the law itself."""

    law: Law
    every: int = eqx.field(static=True, default=1)

    @property
    def is_sequential(self) -> bool:
        return False

    def init(self, point: Point) -> Float[Array, "..."]:
        return self.law.value(point.weights)

    def __call__(
        self, point: Point, carry: Float[Array, "..."]
    ) -> tuple[MatrixLawSummary, Float[Array, "..."]]:
        value = self.law.value(point.weights)
        diagonal = jnp.diagonal(value, axis1=-2, axis2=-1).ravel()
        summary = MatrixLawSummary(_norm(value), _norm(value - carry), diagonal)
        return summary, carry


def _norm(matrix: Float[Array, "..."]) -> Float[Array, ""]:
    """The Frobenius norm, with a derivative of 0 where it is 0."""
    square = jnp.sum(matrix**2)
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))
