"""What a sweep's results look like on disk: plain names and numbers, no Python objects."""

import dataclasses
import hashlib
import math
from typing import Any

import numpy as np

from ._plan import Chunk, Plan, cut
from ._program import as_numbers


@dataclasses.dataclass(frozen=True)
class Layout:
    """The dimensions of a sweep with their labels, as JSON can hold them.

    - `axes`: dimension → name → labels of its values.
    - `outer`, `inner`: the dimensions outside of compiled programs, and the batched ones.
    - `box`: how many settings of every batched dimension make a chunk.
    """

    axes: dict[str, dict[str, list[Any]]]
    outer: tuple[str, ...]
    inner: tuple[str, ...]
    box: tuple[int, ...]

    def size(self, dim: str) -> int:
        return len(next(iter(self.axes[dim].values())))

    @property
    def num_groups(self) -> int:
        return math.prod(self.size(dim) for dim in self.outer)

    @property
    def shape(self) -> tuple[int, ...]:
        """The settings of one group."""
        return tuple(self.size(dim) for dim in self.inner)

    def describe(self, place: tuple[int, ...]) -> str:
        """One setting in words, `seed=3, scale=0.1`, by its index along all axes."""
        index = dict(zip((*self.outer, *self.inner), place, strict=True))
        return ", ".join(
            f"{name}={labels[index[dim]]}"
            for dim, columns in self.axes.items()
            for name, labels in columns.items()
        )

    def chunks(self) -> list[Chunk]:
        """All chunks, group by group."""
        sizes = [self.size(dim) for dim in self.inner]
        return cut(self.outer_shape, sizes, self.box)

    @property
    def outer_shape(self) -> tuple[int, ...]:
        return tuple(self.size(dim) for dim in self.outer)


def layout_of(plan: Plan) -> Layout:
    axes = {
        axis.dim: {n: column.labels().tolist() for n, column in axis.columns.items()}
        for axis in plan.settings.axes
    }
    outer, inner = (
        tuple(axis.dim for axis in part) for part in (plan.outer, plan.inner)
    )
    return Layout(axes, outer, inner, plan.box)


def layout_from(code: dict[str, Any]) -> Layout:
    """The layout that `dataclasses.asdict` made JSON of."""
    sides = (tuple(code[name]) for name in ("outer", "inner", "box"))
    return Layout(code["axes"], *sides)


def values_hash(plan: Plan) -> str:
    """A hash of the values of all settings, where labels do not show them."""
    text = hashlib.sha256()
    for axis in plan.settings.axes:
        for name, column in axis.columns.items():
            text.update(f"{axis.dim}.{name}:".encode())
            if column.array is None:
                text.update(repr(column.labels().tolist()).encode())
                continue
            array = np.ascontiguousarray(as_numbers(column.array))
            text.update(f"{array.dtype}{array.shape}".encode())
            text.update(array.tobytes())
    return text.hexdigest()[:32]
