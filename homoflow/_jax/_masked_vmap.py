"""A function under `vmap`, for only some elements of the batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import PyTree


def masked_vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """Applies `function` to those elements of a batch only that a mask selects.

    Returns `g(mask, *arrays)`. Outside of `vmap`, `g` calls `function(*arrays)`: its
    caller has decided that it is needed. Under `vmap` it depends on the platform:

    - CPU: a loop calls the function once for each selected element. The others are 0.
    - Elsewhere: `jax.vmap(function)` on the whole batch. What is not selected is computed
      from its own numbers, which have to be finite.

    It is for small dense linear algebra, such as `eigh`: on a CPU XLA goes through the
    matrices of a batch one by one anyway. It has no derivative.
    """

    @custom_vmap
    def call(mask, *arrays):
        del mask
        return function(*arrays)

    @call.def_vmap
    def _(count, is_batched, *arguments):
        results = call_batch(*_broadcast(count, is_batched, arguments))
        return results, jax.tree.map(lambda _: True, results)

    @custom_vmap
    def call_batch(mask, *arrays):
        return lax.platform_dependent(
            mask,
            *arrays,
            cpu=loop_over_selected,
            default=lambda mask, *arrays: jax.vmap(function)(*arrays),
        )

    @call_batch.def_vmap
    def _(count, is_batched, *arguments):
        arguments = _broadcast(count, is_batched, arguments)
        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), arguments)
        results = jax.tree.map(
            lambda a: a.reshape(count, -1, *a.shape[1:]), call_batch(*flat)
        )
        return results, jax.tree.map(lambda _: True, results)

    def loop_over_selected(mask, *arrays):
        selected_first = jnp.argsort(~mask)
        shapes = jax.eval_shape(jax.vmap(function), *arrays)

        def call_next(i, results):
            place = selected_first[i]
            result = function(*jax.tree.map(lambda a: a[place], arrays))
            return jax.tree.map(lambda all_, a: all_.at[place].set(a), results, result)

        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return lax.fori_loop(0, jnp.sum(mask), call_next, zeros)

    return call


def _broadcast(count: int, is_batched: PyTree, arguments: tuple[Any, ...]):
    """The arguments, each with the batch's axis in front."""
    leaves, structure = jax.tree.flatten(arguments)
    return jax.tree.unflatten(
        structure,
        [
            a if b else jnp.broadcast_to(a, (count, *a.shape))
            for a, b in zip(leaves, jax.tree.leaves(is_batched), strict=True)
        ],
    )
