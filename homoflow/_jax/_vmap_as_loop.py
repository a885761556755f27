"""A function that a CPU applies to the elements of a batch one after the other."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import PyTree


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
            own, shared = eqx.partition(arguments, tuple(is_batched))
            # Under another `vmap` this is called for a batch again.
            return lax.map(lambda own: call(*eqx.combine(own, shared)), own)

        results = lax.platform_dependent(
            *arguments,
            cpu=call_in_turn,
            default=lambda *arguments: jax.vmap(function, axes)(*arguments),
        )
        return results, jax.tree.map(lambda _: True, results)

    return call


def call_in_turn_on_cpu(function: Callable[..., Any], *arguments: PyTree) -> PyTree:
    """`function(*arguments)`, which `vmap` calls once for each element on a CPU.

    As by `vmap_as_loop_on_cpu`, with arguments and a result that hold more than arrays.
    """
    arrays, static = eqx.partition(arguments, eqx.is_array)
    rest = []

    @vmap_as_loop_on_cpu
    def call(arrays):
        out, others = eqx.partition(
            function(*eqx.combine(arrays, static)), eqx.is_array
        )
        rest.append(others)
        return out

    out = call(arrays)
    return eqx.combine(out, rest[-1])
