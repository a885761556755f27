"""Refusing derivatives that would be wrong."""

import functools

import equinox as eqx
import jax
from jaxtyping import PyTree


def refuse_derivatives(tree: PyTree, message: str) -> PyTree:
    """The tree itself; whoever differentiates with respect to it gets a `ValueError`."""
    numbers, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(_identity(message, numbers), rest)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _identity(message: str, numbers: PyTree) -> PyTree:
    del message
    return numbers


@_identity.defjvp
def _refuse(message, primals, tangents):
    raise ValueError(message)
