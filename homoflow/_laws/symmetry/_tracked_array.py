"""An array on its way through a function, and what is known of its log-scale."""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
import numpy as np

from ._constant import Constant
from ._linear_equations import LinearEquations
from ._log_scale import FIXED, Component, LogScale, permute_axes, simplify

#: Up to this size an array of parameters may have a scale for each entry.
_MAX_BY_ENTRY = 4096
_ONE = Fraction(1)


@dataclasses.dataclass(eq=False)
class Leaf:
    """An array of parameters. `scale` is `None` until the first operation on it.

    - `path`: JAX key path from the model.
    - `slices`: the arrays it consists of, once a loop has taken it apart.
    """

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    scale: LogScale | None = None
    slices: "list[Leaf] | None" = None

    def parts(self) -> "list[Leaf]":
        """The leaf, or the slices that it was taken apart into."""
        if self.slices is None:
            return [self]
        return [leaf for s in self.slices for leaf in s.parts()]


@dataclasses.dataclass(eq=False)
class TrackedArray:
    """What is known of an array.

    - `scale`: its log-scale (not in use for an untouched parameter).
    - `untouched_leaf`: the parameter that it is, apart from its shape, and which axis of
        the array each axis of the parameter is.
    - `has_any_scale`: zero, infinite or NaN everywhere, so that every scale suits it.
    - `constant`: its value, if no parameter and no data enter it.
    """

    shape: tuple[int, ...]
    scale: LogScale = FIXED
    untouched_leaf: tuple[Leaf, tuple[int | None, ...]] | None = None
    has_any_scale: bool = False
    constant: Constant | None = None

    @property
    def is_undetermined(self) -> bool:
        """Whether it is a parameter whose scale has no form yet."""
        return self.untouched_leaf is not None and self.untouched_leaf[0].scale is None

    def log_scale(self, equations: LinearEquations) -> LogScale:
        """Its log-scale; an untouched parameter gets as many unknowns as it can."""
        if self.untouched_leaf is None:
            return self.scale
        leaf, places = self.untouched_leaf
        if leaf.scale is None:
            leaf.scale = _most_general(leaf.shape, equations)
        return permute_axes(leaf.scale, places)

    def value(self) -> np.ndarray | None:
        """The value, if it is constant."""
        return None if self.constant is None else np.asarray(self.constant.value())


def track_parameter(leaf: Leaf) -> TrackedArray:
    """An array of parameters that nothing has happened to."""
    places = tuple(a if n > 1 else None for a, n in enumerate(leaf.shape))
    return TrackedArray(leaf.shape, untouched_leaf=(leaf, places))


def track_constant(value: Any) -> TrackedArray:
    """A number or an array that is known."""
    array = np.asarray(value) if not _is_key(value) else None
    shape = tuple(getattr(value, "shape", ()))
    return TrackedArray(
        shape,
        has_any_scale=suits_any_scale(array),
        constant=Constant((), lambda: value),
    )


def suits_any_scale(array: np.ndarray | None) -> bool:
    """Whether every entry is zero, infinite or NaN."""
    if array is None or not is_inexact(array.dtype):
        return False
    array = np.abs(array).astype(np.float64)
    return bool(np.all((array == 0) | ~np.isfinite(array)))


def is_inexact(dtype: Any) -> bool:
    """Whether numbers of this type can be rescaled."""
    return jax.numpy.issubdtype(dtype, np.inexact)


def make_scale_by_axis(shape: Sequence[int], equations: LinearEquations) -> LogScale:
    """A sum of unknowns along every axis."""
    components = []
    for axis, n in enumerate(shape):
        if n > 1:
            ids = equations.new_unknowns((n,))
            if components:
                ids = np.where(np.arange(n) == 0, 0, ids)
            components.append(Component(_ONE, (axis,), ids))
    if not components:
        components.append(Component(_ONE, (), equations.new_unknowns(())))
    return simplify(components)


def make_scale_by_entry(shape: Sequence[int], equations: LinearEquations) -> LogScale:
    """An unknown for every entry."""
    axes = tuple(range(len(shape)))
    return simplify([Component(_ONE, axes, equations.new_unknowns(shape))])


def _most_general(shape: Sequence[int], equations: LinearEquations) -> LogScale:
    if math.prod(shape) <= _MAX_BY_ENTRY:
        return make_scale_by_entry(shape, equations)
    return make_scale_by_axis(shape, equations)


def _is_key(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)
