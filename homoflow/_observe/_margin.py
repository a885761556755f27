"""The smallest margin over the samples, along a run."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._jax._arrays import tree_norm_of_any_size
from .._problem._losses import Risk
from ._base import AbstractObservable, Point
from ._outputs import outputs_at


@final
class Margin(AbstractObservable):
    """The smallest margin over the samples: positive once all are classified correctly.

    With labels −1 and +1 a sample's margin is y·f, the smallest over the outputs if there
    are several; with class indices, or one-hot targets, f_y − max_{c≠y} f_c. It is NaN
    with targets of any other kind.

    `degree`: divide by ‖w‖^degree, over the trained weights. With the degree of
    homogeneity of the network (its number of layers, without biases) that is the
    normalized margin, which only the direction of the weights decides
    [Lyu & Li 2020].

    ```python
    model = hf.MLP((3, 8, 1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    observe = {"margin": hf.observe.Margin(degree=2)}
    data = (x, jnp.sign(x[:, :1]))
    flow = hf.flow(model, data, 5.0, loss=hf.LogisticLoss(), observe=observe)
    flow.observed["margin"].shape  # (101,)
    ```
    """

    degree: float | int | None = eqx.field(static=True, default=None)
    every: int = eqx.field(static=True, default=1)

    @property
    def is_sequential(self) -> bool:
        return False

    def init(self, point: Point) -> None:
        del point

    def __call__(self, point: Point, carry: None) -> tuple[Float[Array, ""], None]:
        if not isinstance(point.problem.objective, Risk):
            raise ValueError(
                "`homoflow.observe.Margin` is of a loss over samples with labels, which a "
                "custom `objective` does not show."
            )
        x, y = point.problem.data
        margin = jnp.min(jax.vmap(_margin)(outputs_at(point.model, x), y))
        if self.degree is not None:
            margin = margin / tree_norm_of_any_size(point.weights) ** self.degree
        return margin, carry


def _margin(output: Float[Array, "*out"], target: Shaped[Array, "..."]) -> Array:
    """The margin of one sample."""
    if jnp.issubdtype(target.dtype, jnp.integer) and target.ndim == 0 < output.ndim:
        return _margin_of_class(output, jnp.arange(output.size) == target)
    if target.shape != output.shape:
        raise ValueError(
            f"A margin takes a class index or a target like the output: shapes are "
            f"{target.shape} and {output.shape}."
        )
    of_signs = jnp.min(target.astype(output.dtype) * output)
    margin = jnp.where(jnp.all(jnp.abs(target) == 1), of_signs, jnp.nan)
    if output.size < 2:
        return margin
    is_class = target == 1
    is_one_hot = (jnp.sum(is_class) == 1) & jnp.all(is_class | (target == 0))
    return jnp.where(is_one_hot, _margin_of_class(output, is_class), margin)


def _margin_of_class(output: Float[Array, "*out"], is_class: Array) -> Array:
    of_class = jnp.sum(jnp.where(is_class, output, 0))
    return of_class - jnp.max(jnp.where(is_class, -jnp.inf, output))
