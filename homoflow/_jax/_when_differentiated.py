"""Calling one function, and where the call is differentiated another."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

Result = TypeVar("Result")


def when_differentiated(
    function: Callable[..., Result],
    differentiated: Callable[..., Result],
    arguments: tuple[PyTree, ...],
    *,
    in_reverse: bool,
) -> Result:
    """`function(*arguments)`; under JAX's transformations, derivatives included.

    Where derivatives are taken, in reverse mode (`in_reverse`) or in forward mode,
    `differentiated(*arguments)` is what is called and differentiated: a function of the
    same value, to a tolerance, and of the same structure. What either closes over must
    not be differentiated.
    """
    arrays, static = eqx.partition(arguments, eqx.is_array)
    frozen = []

    def arrays_of(called: Callable[..., Result]) -> Callable[[PyTree], PyTree]:
        def call(arrays: PyTree) -> PyTree:
            out, rest = eqx.partition(
                called(*eqx.combine(arrays, static)), eqx.is_array
            )
            frozen.append(rest)
            return out

        return call

    attach = _attach_reverse if in_reverse else _attach_forward
    out = attach(arrays_of(function), arrays_of(differentiated))(arrays)
    return eqx.combine(out, frozen[-1])


def _attach_forward(call: Callable, differentiated: Callable) -> Callable:
    run = jax.custom_jvp(call)

    @run.defjvp
    def rule(primals, tangents):
        return jax.jvp(differentiated, primals, tangents)

    return run


def _attach_reverse(call: Callable, differentiated: Callable) -> Callable:
    run = jax.custom_vjp(call)

    def forward(marked):
        # What is held fixed needs no cotangent: that of the data costs as much again.
        leaves, structure = jax.tree.flatten(marked, is_leaf=_is_marked)
        values = [leaf.value for leaf in leaves]
        moving = [i for i, leaf in enumerate(leaves) if leaf.perturbed]

        def of_moving(moved):
            known = list(values)
            for i, value in zip(moving, moved, strict=True):
                known[i] = value
            return differentiated(jax.tree.unflatten(structure, known))

        out, pull_back = jax.vjp(of_moving, [values[i] for i in moving])
        return out, (pull_back, _Positions(moving, structure), out)

    def backward(residuals, cotangents):
        pull_back, positions, out = residuals
        (moved,) = pull_back(jax.tree.map(_materialize, out, cotangents))
        grads = [None] * positions.structure.num_leaves
        for i, cotangent in zip(positions.moving, moved, strict=True):
            grads[i] = cotangent
        return (jax.tree.unflatten(positions.structure, grads),)

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


class _Positions(eqx.Module):
    """Where among all leaves those are that are differentiated."""

    moving: list[int] = eqx.field(static=True)
    structure: jax.tree_util.PyTreeDef = eqx.field(static=True)


def _is_marked(leaf) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _materialize(value, cotangent):
    if not isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return cotangent
    return jnp.zeros(cotangent.shape, cotangent.dtype)
