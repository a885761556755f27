"""The names of an enumeration's members, which Equinox keeps beside their messages."""

from typing import Any

import equinox as eqx
import jax
import numpy as np


def member_names(enumeration: type[eqx.Enumeration]) -> tuple[str, ...]:
    """The names of all members, in the order of their indices."""
    return tuple(enumeration._name_to_item)


def member_indices(item: Any) -> np.ndarray:
    """The index of a member, or an array of them under vmap."""
    return np.asarray(jax.tree.leaves(item)[0])


def names_of(item: Any, enumeration: type[eqx.Enumeration]) -> np.ndarray:
    """The name of a member, or an array of names under vmap."""
    return np.asarray(np.asarray(member_names(enumeration))[member_indices(item)])


def member_at(indices: Any, enumeration: type[eqx.Enumeration]) -> Any:
    """The member with an index, or a batch of members."""
    first = getattr(enumeration, member_names(enumeration)[0])
    return jax.tree.unflatten(jax.tree.structure(first), [indices])
