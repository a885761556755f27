"""Facts that do not depend on the values of arrays, found out once."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import equinox as eqx
import jax

_Fact = TypeVar("_Fact")
#: Structures remembered per kind of fact. They hold functions that a user passed, and
#: what those refer to.
_MOST = 32


def known_by_structure(
    of: Callable[..., Any] = lambda *given: given,
) -> Callable[[Callable[..., _Fact]], Callable[..., _Fact]]:
    """Computes what traces the functions that it is given once for each structure.

    That is everything but the values of arrays, in what `of` takes from the arguments, and
    what JAX is told of dtypes and precision. An error is not remembered.
    """

    def remembering(find: Callable[..., _Fact]) -> Callable[..., _Fact]:
        known: OrderedDict[Hashable, _Fact] = OrderedDict()

        @functools.wraps(find)
        def found(*given: Any) -> _Fact:
            structure = _structure(of(*given)), _settings()
            if not _is_hashable(structure):
                return find(*given)
            if structure not in known:
                known[structure] = find(*given)
            known.move_to_end(structure)
            if len(known) > _MOST:
                known.popitem(last=False)
            return known[structure]

        return found

    return remembering


def _settings() -> tuple[Any, ...]:
    """The settings of JAX that change what a trace holds."""
    names = (
        "jax_enable_x64",
        "jax_numpy_dtype_promotion",
        "jax_default_matmul_precision",
    )
    return tuple(getattr(jax.config, name) for name in names)


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
