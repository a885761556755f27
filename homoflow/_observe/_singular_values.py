"""Singular values of a matrix that is made of a model's weights, along a run."""

from collections.abc import Callable
from typing import final

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ._base import AbstractObservable, Point


@final
class SingularValues(AbstractObservable):
    """The singular values of a matrix, in falling order.

    `get` makes the matrix from the model: one of its arrays, or a product of layers. The
    values can be differentiated where they are distinct and not zero.

    ```python
    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))

    def product(model):
        return model.layers[1].weight @ model.layers[0].weight

    observe = {"singular values": hf.observe.SingularValues(product)}
    flow = hf.flow(model, (x, x[:, :1]), t1=5.0, observe=observe)
    flow.observed["singular values"].shape  # (101, 1)
    ```
    """

    get: Callable[[PyTree], Array]
    every: int = eqx.field(static=True, default=1)

    @property
    def is_sequential(self) -> bool:
        return False

    def init(self, point: Point) -> None:
        del point

    def __call__(
        self, point: Point, carry: None
    ) -> tuple[Float[Array, " values"], None]:
        matrix = self.get(point.model)
        if jnp.ndim(matrix) != 2:
            raise ValueError(
                "`get` of `homoflow.observe.SingularValues` must return a matrix; it "
                f"returns shape {jnp.shape(matrix)}."
            )
        return jnp.linalg.svd(matrix, compute_uv=False), carry
