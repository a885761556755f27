"""The largest eigenvalues of the Hessian of a loss, along a run."""

from typing import NamedTuple, final

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from .._jax._top_eigenvalues import top_eigenvalues
from .._problem._problem import Problem
from ._base import AbstractObservable, Point

#: ‖Hv − λv‖ relative to ‖H‖ at which the iteration stops.
RESIDUAL = 1e-3


class TopEigenvalues(NamedTuple):
    """The largest eigenvalues of ∇²L, in falling order.

    - `values`: NaN where the iteration did not converge.
    - `residuals`: ‖Hv − λv‖: so far away an eigenvalue is at most, and usually much less.
    - `num_products`: Hessian-vector products that it took. A float: what Diffrax records
        has to have room for inf.
    """

    values: Float[Array, " k"]
    residuals: Float[Array, " k"]
    num_products: Float[Array, ""]


@final
class Sharpness(AbstractObservable):
    """The `k` largest eigenvalues of ∇²L at the recorded times.

    The iteration for them starts from the vectors of the time before, and from a random
    one that looks for what those know nothing of. See `homoflow.sharpness` for the
    accuracy. At kinks (ReLU) there is no Hessian; elsewhere the kinks are not in it. The
    values can be differentiated where the eigenvalues are simple.

    Each recorded time costs about ten Hessian-vector products and more: with `every=n`
    every n-th of the run's times is looked at.

    ```python
    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    observe = {"sharpness": hf.observe.Sharpness(k=2, every=10)}
    flow = hf.flow(model, (x, x[:, :1]), t1=5.0, observe=observe)
    flow.observed["sharpness"].values.shape  # (11, 2)
    ```
    """

    k: int = eqx.field(static=True, default=1)
    every: int = eqx.field(static=True, default=1)

    def __check_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"`k` must be a positive integer; got {self.k!r}.")

    @property
    def is_sequential(self) -> bool:
        return False

    def init(self, point: Point) -> Float[Array, "k size"]:
        return random_vectors(point.weights, self.k)

    def __call__(
        self, point: Point, carry: Float[Array, "k size"]
    ) -> tuple[TopEigenvalues, Float[Array, "k size"]]:
        return hessian_eigenvalues(point.problem, point.weights, carry)


def random_vectors(weights: PyTree, k: int) -> Float[Array, "k size"]:
    """Where the iteration for `k` eigenvalues starts from if nothing is known."""
    flat = ravel_pytree(weights)[0]
    if k > flat.size:
        raise ValueError(f"The Hessian of {flat.size} weights has no {k} eigenvalues.")
    return jr.normal(jr.key(1), (k, flat.size), flat.dtype)


def hessian_eigenvalues(
    problem: Problem,
    weights: PyTree,
    guess: Float[Array, "k size"],
    sign: float | Float[Array, ""] = 1.0,
) -> tuple[TopEigenvalues, Float[Array, "k size"]]:
    """The largest eigenvalues of `sign`·∇²L at `weights`, and their vectors.

    The values can be differentiated: with the derivative of a simple eigenvalue.
    """
    flat, unravel = ravel_pytree(weights)

    def gradient(problem, flat):
        return jax.grad(lambda v: sign * problem.loss(unravel(v)))(flat)

    # The iteration is not to be differentiated: with its vector v held still, the
    # derivative of vᵀHv is that of the eigenvalue.
    numbers, static = eqx.partition(problem, eqx.is_array)
    still = eqx.combine(jax.lax.stop_gradient(numbers), static)
    _, product = jax.linearize(
        lambda v: gradient(still, v), jax.lax.stop_gradient(flat)
    )
    found = top_eigenvalues(product, jax.lax.stop_gradient(guess), RESIDUAL)
    found = jax.lax.stop_gradient(found)

    def curvature(v):
        _, image = jax.jvp(lambda u: gradient(problem, u), (flat,), (v,))
        return v @ image

    moving = jax.lax.map(curvature, found.vectors)
    values = found.values + (moving - jax.lax.stop_gradient(moving))
    num_products = found.num_products.astype(values.dtype)
    # A NaN must not be where the next time starts from.
    vectors = jnp.where(jnp.isfinite(found.vectors), found.vectors, guess)
    return TopEigenvalues(values, found.residuals, num_products), vectors
