"""An array on its way through a function, and what is known of its log-scale."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import numpy as np

from ._linear_equations import Equations
from ._log_scale import FIXED, Part, Scale, moved, tidy

#: Up to this size an array of parameters may have a scale for each entry.
_LARGEST_BY_ENTRY = 4096
_ONE = Fraction(1)


@dataclasses.dataclass(eq=False)
class Leaf:
    """An array of parameters. `scale` is `None` until the first operation on it.

    - `path`: JAX key path from the model.
    - `slices`: the arrays it consists of, once a loop has taken it apart.
    """

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    scale: Scale | None = None
    slices: "list[Leaf] | None" = None

    def parts(self) -> "list[Leaf]":
        """The leaf, or the slices that it was taken apart into."""
        if self.slices is None:
            return [self]
        return [leaf for s in self.slices for leaf in s.parts()]


@dataclasses.dataclass(eq=False)
class Tracked:
    """What is known of an array.

    - `scale`: its log-scale (while it is `fresh`: not yet decided).
    - `fresh`: an untouched parameter, and which axis of the array each of its axes is.
    - `is_wild`: zero, infinite or NaN everywhere, so that every scale suits it.
    - `known`: its value, if no parameter and no data enter it.
    """

    shape: tuple[int, ...]
    scale: Scale = FIXED
    fresh: tuple[Leaf, tuple[int | None, ...]] | None = None
    is_wild: bool = False
    known: Callable[[], Any] | None = None

    def undecided(self) -> bool:
        """Whether it is a parameter whose scale has no form yet."""
        return self.fresh is not None and self.fresh[0].scale is None

    def settled(self, equations: Equations) -> Scale:
        """Its scale; an untouched parameter gets as many unknowns as it can."""
        if self.fresh is None:
            return self.scale
        leaf, places = self.fresh
        if leaf.scale is None:
            leaf.scale = _general(leaf.shape, equations)
        return moved(leaf.scale, places)

    def value(self) -> np.ndarray | None:
        """The known value."""
        if self.known is None:
            return None
        with jax.ensure_compile_time_eval():
            return np.asarray(self.known())


def parameter(leaf: Leaf) -> Tracked:
    """An array of parameters that nothing has happened to."""
    places = tuple(a if n > 1 else None for a, n in enumerate(leaf.shape))
    return Tracked(leaf.shape, fresh=(leaf, places))


def constant(value: Any) -> Tracked:
    """A number or an array that is known."""
    array = np.asarray(value) if not _is_key(value) else None
    shape = tuple(getattr(value, "shape", ()))
    return Tracked(shape, is_wild=is_wild(array), known=lambda: value)


def is_wild(array: np.ndarray | None) -> bool:
    """Whether every entry is zero, infinite or NaN."""
    if array is None or not is_inexact(array.dtype):
        return False
    array = array.astype(np.float64)
    return bool(np.all((array == 0) | ~np.isfinite(array)))


def is_inexact(dtype: Any) -> bool:
    """Whether numbers of this type can be rescaled."""
    return jax.numpy.issubdtype(dtype, np.inexact)


def along_each_axis(shape: Sequence[int], equations: Equations) -> Scale:
    """A sum of unknowns along every axis."""
    parts = []
    for axis, n in enumerate(shape):
        if n > 1:
            ids = equations.unknowns((n,))
            if parts:
                ids = np.where(np.arange(n) == 0, 0, ids)
            parts.append(Part(_ONE, (axis,), ids))
    if not parts:
        parts.append(Part(_ONE, (), equations.unknowns(())))
    return tidy(parts)


def by_entry(shape: Sequence[int], equations: Equations) -> Scale:
    """An unknown for every entry."""
    axes = tuple(range(len(shape)))
    return tidy([Part(_ONE, axes, equations.unknowns(shape))])


def _general(shape: Sequence[int], equations: Equations) -> Scale:
    if math.prod(shape) <= _LARGEST_BY_ENTRY:
        return by_entry(shape, equations)
    return along_each_axis(shape, equations)


def _is_key(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)
