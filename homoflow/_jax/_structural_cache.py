"""A cache for what does not depend on the values of arrays."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import equinox as eqx
import jax

_Result = TypeVar("_Result")
#: Results kept per function. Their keys hold functions that a user passed, and what those
#: refer to.
_MAX_SIZE = 32


def cached_by_structure(
    key: Callable[..., Any] = lambda *arguments: arguments,
) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """Caches a function that traces its arguments, by their structure.

    That is everything but the values of arrays, in what `key` takes from the arguments,
    and JAX's settings for dtypes and precision. An error is not cached.
    """

    def decorate(function: Callable[..., _Result]) -> Callable[..., _Result]:
        # By the hash that a structure had when it was stored: what a user's functions
        # refer to may change, and an ordered dictionary would lose its way.
        cache: OrderedDict[int, tuple[Hashable, _Result]] = OrderedDict()

        @functools.wraps(function)
        def call(*arguments: Any) -> _Result:
            structure = _structure(key(*arguments)), _settings()
            if not _is_hashable(structure):
                return function(*arguments)
            place = hash(structure)
            if place in cache and cache[place][0] == structure:
                cache.move_to_end(place)
                return cache[place][1]
            result = function(*arguments)
            cache[place] = structure, result
            if len(cache) > _MAX_SIZE:
                cache.popitem(last=False)
            return result

        return call

    return decorate


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
    return structure, *map(_leaf_structure, leaves)


def _leaf_structure(leaf: Any) -> Any:
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
