"""Facts that do not depend on the values of arrays, found out once."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import equinox as eqx
import jax

from ._problem import Problem

_Fact = TypeVar("_Fact")
#: Structures remembered per kind of fact. They hold functions that a user passed, and
#: what those refer to.
_MOST = 32


def known_by_structure(
    find: Callable[[Problem], _Fact],
) -> Callable[[Problem], _Fact]:
    """`find`, which traces a problem's functions, computed once for each structure.

    That is everything but the values of arrays. Laws play no part.
    """
    known: OrderedDict[Hashable, _Fact] = OrderedDict()

    @functools.wraps(find)
    def found(problem: Problem) -> _Fact:
        structure = _structure(
            (problem.model, problem.data, problem.objective, problem.mask)
        )
        if not _is_hashable(structure):
            return find(problem)
        if structure not in known:
            known[structure] = find(problem)
        known.move_to_end(structure)
        if len(known) > _MOST:
            known.popitem(last=False)
        return known[structure]

    return found


def _structure(tree: Any) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, *map(_of_leaf, leaves)


def _of_leaf(leaf: Any) -> Any:
    if not eqx.is_array(leaf):
        # A float and an int that are equal may not be the same to a function.
        return type(leaf), leaf
    return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
