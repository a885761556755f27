"""The largest eigenvalue of the Hessian of a loss, along a run."""

from typing import NamedTuple, final

import equinox as eqx
import jax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from .._jax._lanczos import largest_eigenvalue
from .._problem._problem import Problem
from ._base import AbstractObservable, Point

#: ‖Hv − λv‖ relative to ‖H‖ at which the iteration stops.
RESIDUAL = 1e-3


class TopEigenvalues(NamedTuple):
    """The largest eigenvalues of ∇²L, and the number of products that they took.

    That number is a float: what Diffrax records has to have room for inf.
    """

    values: Float[Array, " k"]
    num_products: Float[Array, ""]


@final
class Sharpness(AbstractObservable):
    """λ_max(∇²L) at the recorded times."""

    every: int = eqx.field(static=True, default=1)

    def init(self, point: Point) -> None:
        del point

    def __call__(self, point: Point, carry: None) -> tuple[TopEigenvalues, None]:
        found = sharpness_of(point.problem, point.weights)
        return TopEigenvalues(found.value[None], found.products), carry


class LargestEigenvalue(NamedTuple):
    """λ_max(∇²L), and the number of Hessian-vector products that it took."""

    value: Float[Array, ""]
    products: Float[Array, ""]


def sharpness_of(problem: Problem, weights: PyTree) -> LargestEigenvalue:
    """λ_max(∇²L) at `weights`, differentiable (a simple eigenvalue's derivative)."""
    flat, unravel = ravel_pytree(weights)

    def gradient(problem, flat):
        return jax.grad(lambda v: problem.loss(unravel(v)))(flat)

    # The iteration is not to be differentiated: with its vector v held still, the
    # derivative of vᵀHv is that of the eigenvalue.
    still, fixed = eqx.partition(problem, eqx.is_array)
    still = eqx.combine(jax.lax.stop_gradient(still), fixed)
    _, product = jax.linearize(
        lambda v: gradient(still, v), jax.lax.stop_gradient(flat)
    )
    found = largest_eigenvalue(product, flat.size, flat.dtype, RESIDUAL)
    v = jax.lax.stop_gradient(found.vector)
    _, image = jax.jvp(lambda u: gradient(problem, u), (flat,), (v,))
    moving = v @ image
    value = found.value + (moving - jax.lax.stop_gradient(moving))
    return LargestEigenvalue(value, found.products.astype(value.dtype))
