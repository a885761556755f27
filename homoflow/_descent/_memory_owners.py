"""Which arrays of an optimizer's state are memory, and of which weights."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def is_memory(leaf: Any, index: int, owners: dict[int, int]) -> bool:
    """Whether a leaf of the state remembers gradients, rather than being a setting."""
    is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    return is_float and (jnp.ndim(leaf) > 0 or index in owners)


def memory_owners(state: PyTree, weights: PyTree) -> dict[int, int]:
    """Which array of weights each array of the state is kept for.

    Its place ends as that of the weights does, and it has the same shape.
    """
    places = [
        (tuple(map(str, path)), jnp.shape(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights)
    ]
    owners = {}
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(state)):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            continue
        names = tuple(map(str, path))
        fitting = [
            (len(place), j)
            for j, (place, shape) in enumerate(places)
            if shape == jnp.shape(leaf) and names[len(names) - len(place) :] == place
        ]
        if fitting:
            owners[i] = max(fitting)[1]
    return owners
