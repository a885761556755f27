"""What only some of a batch need, for those alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import PyTree


def of_those(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(*arrays)` as `(wanted, *arrays)`: computed where it is wanted.

    Elsewhere it is 0, or what the function makes of the numbers there, which is to be
    finite.

    Under `vmap` on a CPU it goes through those that are wanted, one after the other, as
    LAPACK would; on other devices it computes all together. Without `vmap` it is the
    function itself: who calls it there wants it. It has no derivative.
    """

    @custom_vmap
    def one(wanted, *arrays):
        del wanted
        return function(*arrays)

    @one.def_vmap
    def _(count, is_batched, *given):
        results = several(*_all_batched(count, is_batched, given))
        return results, jax.tree.map(lambda _: True, results)

    @custom_vmap
    def several(wanted, *arrays):
        return lax.platform_dependent(
            wanted,
            *arrays,
            cpu=in_turn,
            default=lambda wanted, *arrays: jax.vmap(function)(*arrays),
        )

    @several.def_vmap
    def _(count, is_batched, *given):
        given = _all_batched(count, is_batched, given)
        results = several(*jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), given))
        results = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    def in_turn(wanted, *arrays):
        first = jnp.argsort(~wanted)
        shapes = jax.eval_shape(jax.vmap(function), *arrays)

        def next_one(i, results):
            place = first[i]
            result = function(*jax.tree.map(lambda a: a[place], arrays))
            return jax.tree.map(lambda all_, a: all_.at[place].set(a), results, result)

        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return lax.fori_loop(0, jnp.sum(wanted), next_one, nothing)

    return one


def _all_batched(count: int, is_batched: PyTree, given: tuple[Any, ...]):
    leaves, structure = jax.tree.flatten(given)
    return jax.tree.unflatten(
        structure,
        [
            a if b else jnp.broadcast_to(a, (count, *a.shape))
            for a, b in zip(leaves, jax.tree.leaves(is_batched), strict=True)
        ],
    )
