"""The neural tangent kernel, along a run."""

import functools
from typing import NamedTuple, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ._base import AbstractObservable, Point
from ._outputs import as_arrays, outputs_at


class Kernel(NamedTuple):
    """A neural tangent kernel.

    - `kernel`: JJᵀ, with a row for every output at every input.
    - `distance`: how far it is from that at the start, ‖K − K₀‖/‖K₀‖ in the Frobenius
        norm; NaN where K₀ is 0.
    """

    kernel: Float[Array, "outputs outputs"]
    distance: Float[Array, ""]


@final
class NTK(AbstractObservable):
    """The neural tangent kernel JJᵀ at the inputs `x`: J is ∂f/∂w, for trained weights w.

    Its rows are ordered as `homoflow.observe.Outputs(x)` of shape (m, k), row by row; the
    residuals f − y under the flow of ½Σ‖f − y‖² move as d(f − y)/dt = −K(f − y). It takes
    m·k gradients of one output each, and memory for J. At kinks it is the kernel of the
    derivative that JAX takes there.

    ```python
    model = hf.MLP((3, 8, 1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    observe = {"ntk": hf.observe.NTK(x, every=50)}
    flow = hf.flow(model, (x, x[:, :1]), t1=5.0, observe=observe)
    flow.observed["ntk"].kernel.shape  # (3, 20, 20)
    ```
    """

    x: PyTree[Array] = eqx.field(converter=as_arrays)
    every: int = eqx.field(static=True, default=1)

    @property
    def is_sequential(self) -> bool:
        return False

    def init(self, point: Point) -> Float[Array, "outputs outputs"]:
        return self._kernel(point)

    def __call__(
        self, point: Point, carry: Float[Array, "outputs outputs"]
    ) -> tuple[Kernel, Float[Array, "outputs outputs"]]:
        kernel = self._kernel(point)
        distance = jnp.linalg.norm(kernel - carry) / jnp.linalg.norm(carry)
        return Kernel(kernel, distance), carry

    def _kernel(self, point: Point) -> Float[Array, "outputs outputs"]:
        def outputs(weights: PyTree) -> Float[Array, " outputs"]:
            return outputs_at(point.problem.model_at(weights), self.x).ravel()

        slopes = jax.jacrev(outputs)(point.weights)
        # One array after the other: their rows together would be a copy of J.
        rows = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(slopes)]
        return functools.reduce(jnp.add, (each @ each.T for each in rows))
