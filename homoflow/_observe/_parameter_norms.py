"""The norms of a model's trained arrays, along a run."""

from typing import NamedTuple, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._jax._arrays import unit_of
from ._base import AbstractObservable, Point


class Norms(NamedTuple):
    """Norms of the trained weights.

    - `total`: ‖w‖₂ of all of them.
    - `arrays`: the Frobenius norm of each array, by its path in the model.
    """

    total: Float[Array, ""]
    arrays: dict[str, Float[Array, ""]]


@final
class ParameterNorms(AbstractObservable):
    """‖w‖₂ of all trained weights, and the Frobenius norm of each array.

    ```python
    model = hf.MLP((3, 8, 1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    observe = {"norms": hf.observe.ParameterNorms()}
    flow = hf.flow(model, (x, x[:, :1]), t1=5.0, observe=observe)
    flow.observed["norms"].arrays["layers[0].weight"].shape  # (101,)
    ```
    """

    every: int = eqx.field(static=True, default=1)

    @property
    def is_sequential(self) -> bool:
        return False

    def init(self, point: Point) -> None:
        del point

    def __call__(self, point: Point, carry: None) -> tuple[Norms, None]:
        arrays = {
            jax.tree_util.keystr(path).lstrip("."): _norm(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(point.weights)
        }
        return Norms(_norm(*jax.tree.leaves(point.weights)), arrays), carry


def _norm(*arrays: Array) -> Float[Array, ""]:
    """‖w‖₂ of all arrays together, with a derivative of 0 where it is 0."""
    unit = jax.lax.stop_gradient(unit_of(arrays))
    square = jnp.sum(jnp.stack([jnp.sum((w / unit) ** 2) for w in arrays]))
    is_zero = square == 0
    return unit * jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))
