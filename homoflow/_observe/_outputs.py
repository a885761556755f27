"""What a model returns at given inputs, along a run."""

from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._problem._data import cast_floats
from ._base import AbstractObservable, Point


def as_arrays(x: Any) -> PyTree[Array]:
    """Inputs as arrays: NumPy's would be constants of what is compiled."""
    return jax.tree.map(jnp.asarray, x)


@final
class Outputs(AbstractObservable):
    """f_w(x) at the inputs `x`, which have samples along their first axis.

    Floating-point inputs are cast to the dtype of the weights, as a run's data are.

    ```python
    model = hf.MLP((3, 8, 1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    observe = {"outputs": hf.observe.Outputs(x[:5])}
    flow = hf.flow(model, (x, x[:, :1]), t1=5.0, observe=observe)
    flow.observed["outputs"].shape  # (101, 5, 1)
    ```
    """

    x: PyTree[Array] = eqx.field(converter=as_arrays)
    every: int = eqx.field(static=True, default=1)

    @property
    def is_sequential(self) -> bool:
        return False

    def init(self, point: Point) -> None:
        del point

    def __call__(self, point: Point, carry: None) -> tuple[PyTree[Array], None]:
        return outputs_at(point.model, self.x), carry


def outputs_at(model: PyTree, x: PyTree) -> PyTree[Array]:
    """The outputs of a model of one sample at all samples of `x`."""
    floats = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    if floats:
        x = cast_floats(x, floats[0].dtype)
    return jax.vmap(model)(x)
