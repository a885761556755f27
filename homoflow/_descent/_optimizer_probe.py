"""Optimizers are measured, not guessed from a name: a factory may be anything.

An optimizer is run on a small copy of the weights. `_clock` and `_update_parts` read
different things from its updates.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

#: Steps for which an optimizer is run.
NUM_STEPS = 6

_Reading = TypeVar("_Reading")


@dataclasses.dataclass(frozen=True)
class OptimizerProbe:
    """An optimizer of learning rate 1, and weights of the smallest size, all 0."""

    optimizer: optax.GradientTransformationExtraArgs
    weights: PyTree

    @property
    def size(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.weights))

    def init(self) -> PyTree:
        """The optimizer's state before the first step."""
        return self.optimizer.init(self.weights)

    def update(
        self,
        gradient: Float[Array, " size"],
        state: PyTree,
        weights: Float[Array, " size"],
        *,
        value: Float[Array, ""],
        value_fn: Callable[[PyTree], Any],
    ) -> tuple[Float[Array, " size"], PyTree]:
        """The optimizer's update and next state, for flat gradient and weights."""
        unravel = jax.flatten_util.ravel_pytree(self.weights)[1]
        gradient_tree = unravel(gradient)
        update, state = self.optimizer.update(
            gradient_tree,
            state,
            unravel(weights),
            value=value,
            grad=gradient_tree,
            value_fn=value_fn,
        )
        return jax.flatten_util.ravel_pytree(update)[0], state


def read_by_probe(
    read: Callable[[OptimizerProbe], _Reading],
) -> Callable[[Callable, PyTree], _Reading]:
    """`read` as a function of a factory of optimizers and of weights, with a cache."""

    @functools.lru_cache(maxsize=256)
    def read_cached(make_optimizer: Callable, structure: Any, shapes: tuple):
        # Double precision, whatever the run's own: rounding is not to pass for an effect.
        with (
            jax.ensure_compile_time_eval(),
            jax.numpy_dtype_promotion("standard"),
            jax.enable_x64(True),
        ):
            weights = jax.tree.unflatten(structure, [jnp.zeros(s) for s in shapes])
            optimizer = optax.with_extra_args_support(make_optimizer(1.0))
            return read(OptimizerProbe(optimizer, weights))

    @functools.wraps(read)
    def read_optimizer(make_optimizer: Callable, weights: PyTree) -> _Reading:
        leaves, structure = jax.tree.flatten(weights)
        # An optimizer may tell weights apart by their place and rank, not by their size.
        shapes = tuple(tuple(min(n, 2) for n in leaf.shape) for leaf in leaves)
        return read_cached(make_optimizer, structure, shapes)

    return read_optimizer
