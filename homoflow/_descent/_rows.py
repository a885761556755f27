"""What is recorded over time, in few arrays."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

#: Arrays of more numbers have rows of their own.
_MAX_SMALL = 4096


class _Place(NamedTuple):
    """Where a value is: in which of the arrays, and from which column on."""

    array: int
    column: int
    shape: tuple[int, ...]


class Rows(eqx.Module):
    """Values over time, a row for each recorded step.

    Small values of a dtype stand side by side in one array: XLA compiles as much code to
    write one number into an array of its own as to write them all.
    """

    arrays: tuple[Array, ...]
    places: tuple[_Place, ...] = eqx.field(static=True)
    structure: Any = eqx.field(static=True)

    @staticmethod
    def create(shapes: PyTree, rows: int) -> "Rows":
        """So many rows of zeros, for values of these shapes and dtypes."""
        leaves, structure = jax.tree.flatten(shapes)
        arrays: list[tuple[tuple[int, ...], Any]] = []
        shared: dict[Any, int] = {}
        places = []
        for leaf in leaves:
            size = math.prod(leaf.shape)
            if size > _MAX_SMALL:
                places.append(_Place(len(arrays), -1, leaf.shape))
                arrays.append((leaf.shape, leaf.dtype))
                continue
            which = shared.setdefault(leaf.dtype, len(arrays))
            if which == len(arrays):
                arrays.append(((0,), leaf.dtype))
            ((column,), dtype) = arrays[which]
            places.append(_Place(which, column, leaf.shape))
            arrays[which] = (column + size,), dtype
        zeros = tuple(jnp.zeros((rows, *shape), dtype) for shape, dtype in arrays)
        return Rows(zeros, tuple(places), structure)

    def write(self, row: Int[Array, ""], values: PyTree) -> "Rows":
        """The rows with these values in one of them."""
        parts: list[list[Array]] = [[] for _ in self.arrays]
        for place, value in zip(self.places, jax.tree.leaves(values), strict=True):
            whole = value if place.column < 0 else value.ravel()
            parts[place.array].append(whole)
        arrays = [
            jax.lax.dynamic_update_index_in_dim(
                array, part[0] if len(part) == 1 else jnp.concatenate(part), row, 0
            )
            for array, part in zip(self.arrays, parts, strict=True)
        ]
        return Rows(tuple(arrays), self.places, self.structure)

    def values(self) -> PyTree:
        """The values over time, of arrays of JAX or of NumPy."""
        leaves = []
        for which, column, shape in self.places:
            array = self.arrays[which]
            if column >= 0:
                array = array[:, column : column + math.prod(shape)]
                array = array.reshape(array.shape[0], *shape)
            leaves.append(array)
        return jax.tree.unflatten(self.structure, leaves)

    def are_finite(self, choose: Callable[[PyTree], PyTree]) -> Bool[Array, " rows"]:
        """Whether all numbers that are chosen among the values are finite, row by row."""
        numbered = jax.tree.unflatten(self.structure, range(len(self.places)))
        chosen = [self.places[i] for i in jax.tree.leaves(choose(numbered))]
        finite = []
        for which, array in enumerate(self.arrays):
            places = [place for place in chosen if place.array == which]
            if not places or not jnp.issubdtype(array.dtype, jnp.inexact):
                continue
            is_chosen = np.ones(array.shape[1:], bool)
            if places[0].column >= 0:
                is_chosen[:] = False
                for _, column, shape in places:
                    is_chosen[column : column + math.prod(shape)] = True
            good = jnp.isfinite(array) | ~is_chosen
            finite.append(jnp.all(good, axis=tuple(range(1, array.ndim))))
        return functools.reduce(jnp.logical_and, finite)
