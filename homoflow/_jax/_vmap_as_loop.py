"""A function that a CPU applies to the elements of a batch one after the other."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.custom_batching import custom_vmap


def vmap_as_loop_on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which `vmap` calls once for each element on a CPU.

    For loops with branches: under `vmap` every branch is taken by every element, and all
    go on until the last has ended. Alone, each takes its own branches and ends when it
    is done. On other devices `vmap` is what it always is: there a batch takes hardly
    longer than one element.

    Its arguments and results are pytrees of arrays. It has no derivative of its own:
    give it one from outside, by `jax.custom_jvp`.
    """

    @custom_vmap
    def call(*arguments):
        return function(*arguments)

    @call.def_vmap
    def _(count, is_batched, *arguments):
        del count
        axes = jax.tree.map(lambda batched: 0 if batched else None, is_batched)

        def call_in_turn(*arguments):
            leaves, structure = jax.tree.flatten(arguments)
            batched = jax.tree.leaves(is_batched)
            own = [a for a, is_own in zip(leaves, batched, strict=True) if is_own]

            def call_next(own):
                rest = iter(own)
                mixed = [
                    next(rest) if is_own else a
                    for a, is_own in zip(leaves, batched, strict=True)
                ]
                # Under another `vmap` this is called for a batch again.
                return call(*jax.tree.unflatten(structure, mixed))

            return lax.map(call_next, own)

        results = lax.platform_dependent(
            *arguments,
            cpu=call_in_turn,
            default=lambda *arguments: jax.vmap(function, axes)(*arguments),
        )
        return results, jax.tree.map(lambda _: True, results)

    return call
