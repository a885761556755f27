"""Whether a model takes the sample that is to be an example of its inputs."""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import PyTree

from .._jax._text import first_line


def check_example(model: Callable, x_example: PyTree, *, batched: bool) -> None:
    """`ValueError` that says what to pass, if the model cannot be called with it."""
    try:
        eqx.filter_eval_shape(model, x_example)
    except Exception as error:  # Whatever a user's model raises.
        what = "a batch of inputs" if batched else "one input sample"
        raise ValueError(
            f"{type(model).__name__} cannot be called with this `x_example`, which is to "
            f"be {what}: {_advice(x_example, batched)} The model says "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _advice(x_example: PyTree, batched: bool) -> str:
    sample = "x" if batched else "x[0]"
    if isinstance(x_example, tuple) and len(x_example) == 2:
        return f"of data `(x, y)` pass `{sample}`; targets are drawn at random."
    shapes = [jax.numpy.shape(leaf) for leaf in jax.tree.leaves(x_example)]
    shown = ", ".join(map(str, shapes))
    return f"of data `(x, y)` it is `{sample}`, and this one has shape {shown}."
