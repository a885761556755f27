"""How the settings of a sweep are cut into chunks, each one compiled program's call."""

import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._jax._text import short_repr
from ._settings import Axis, Settings, _is_key


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some of the settings that one compiled program takes at once.

    - `number`: its place among all chunks of the sweep.
    - `outer`: the index along every axis that runs outside of compiled programs.
    - `group`: the place of `outer` among all of these.
    - `region`: the slice along every axis that is batched.
    """

    number: int
    group: int
    outer: tuple[int, ...]
    region: tuple[slice, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(part.stop - part.start for part in self.region)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def place(self, row: int) -> tuple[int, ...]:
        """The index of one of its settings, along the outer and the batched axes."""
        inner = np.unravel_index(row, self.shape) if self.shape else ()
        starts = (part.start for part in self.region)
        return (*self.outer, *(int(s + i) for s, i in zip(starts, inner, strict=True)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which axes are batched, and how many settings go into one program.

    - `traced`: the names whose values a compiled program takes as arrays.
    - `outer`, `inner`: the axes outside of compiled programs, and the batched ones.
    - `box`: how many settings of every batched axis make a chunk, at most.
    - `batch`: how many settings a program takes: those of a whole box, and as many more
        as make it a multiple of the devices; 0 where nothing is batched.
    """

    settings: Settings
    traced: tuple[str, ...]
    outer: tuple[Axis, ...]
    inner: tuple[Axis, ...]
    box: tuple[int, ...]
    batch: int

    def chunks(self) -> list[Chunk]:
        """All chunks, group by group."""
        return cut([len(a) for a in self.outer], self.shape, self.box)

    @property
    def shape(self) -> tuple[int, ...]:
        """The settings of one group, along its batched axes."""
        return tuple(len(axis) for axis in self.inner)

    def fixed(self, outer: tuple[int, ...]) -> dict[str, Any]:
        """What `run` is given as it is, of one group."""
        return {
            name: column.values[index]
            for axis, index in zip(self.outer, outer, strict=True)
            for name, column in axis.columns.items()
            if name not in self.traced
        }

    def columns(self, chunk: Chunk) -> dict[str, Any]:
        """The values of all traced names, one for each setting of a chunk in order."""
        found = {}
        for axis, index in zip(self.outer, chunk.outer, strict=True):
            for name, column in axis.columns.items():
                if name in self.traced:
                    found[name] = column.array[np.full(chunk.size, index)]
        ranges = [np.arange(part.start, part.stop) for part in chunk.region]
        places = np.meshgrid(*ranges, indexing="ij")
        for axis, indices in zip(self.inner, places, strict=True):
            for name, column in axis.columns.items():
                found[name] = column.array[indices.ravel()]
        return found


def make_plan(
    settings: Settings,
    vectorize: Collection[str] | None,
    chunk: int | None,
    *,
    default_chunk: int,
    num_devices: int,
) -> Plan:
    """The plan for a user's `vectorize` and `chunk`, checked."""
    traced = _traced_names(settings, vectorize)
    if not any(set(axis.columns) <= set(traced) for axis in settings.axes):
        traced = ()  # Nothing is batched: `run` gets what was given.
    inner = tuple(a for a in settings.axes if set(a.columns) <= set(traced))
    outer = tuple(a for a in settings.axes if not set(a.columns) <= set(traced))
    if chunk is not None:
        _check_chunk(chunk, num_devices, has_batch=bool(inner))
    box = _box([len(axis) for axis in inner], default_chunk if chunk is None else chunk)
    batch = math.ceil(math.prod(box) / num_devices) * num_devices if inner else 0
    return Plan(settings, traced, outer, inner, box, batch)


def _traced_names(
    settings: Settings, vectorize: Collection[str] | None
) -> tuple[str, ...]:
    columns = {n: c for axis in settings.axes for n, c in axis.columns.items()}
    if vectorize is None:
        return tuple(n for n, column in columns.items() if column.array is not None)
    if isinstance(vectorize, str) or not isinstance(vectorize, Collection):
        raise TypeError(
            "`vectorize` must be a tuple of names, such as `('seed',)`; got "
            f"{short_repr(vectorize)}."
        )
    for name in vectorize:
        if name not in columns:
            raise ValueError(
                f"`vectorize` has {name!r}, which is no name of `over`: those are "
                f"{', '.join(columns)}."
            )
        if columns[name].array is None:
            raise ValueError(
                f"`{name}` cannot be batched: its values are no numbers of one shape. "
                "Leave it out of `vectorize`."
            )
    return tuple(n for n in columns if n in vectorize)


def _check_chunk(chunk: Any, num_devices: int, *, has_batch: bool) -> None:
    is_count = isinstance(chunk, int | np.integer) and not isinstance(chunk, bool)
    if not is_count or chunk < 1:
        raise ValueError(
            f"`chunk` must be a positive integer, the number of settings in one compiled "
            f"program; got {short_repr(chunk)}."
        )
    if not has_batch:
        raise ValueError(
            "`chunk` is how many settings one compiled program takes, and no axis of "
            "this sweep is batched: leave it out, or see `vectorize`."
        )
    if chunk < num_devices:
        raise ValueError(
            f"`chunk` is {chunk}, and there are {num_devices} devices, which share a "
            "chunk: take more, or fewer `devices`."
        )


def _box(sizes: list[int], most: int) -> tuple[int, ...]:
    """Sides of equal boxes of at most `most` settings; the last axis is cut the least."""
    box = []
    for size in reversed(sizes):
        pieces = math.ceil(size / max(most, 1))
        side = math.ceil(size / pieces)
        box.append(side)
        most //= side
    return tuple(reversed(box))


def cut(outer: Sequence[int], inner: Sequence[int], box: Sequence[int]) -> list[Chunk]:
    """All chunks of axes of these sizes, in boxes of at most `box`, group by group."""
    groups = enumerate(itertools.product(*map(range, outer)))
    parts = [
        [slice(i, min(i + side, size)) for i in range(0, size, side)]
        for size, side in zip(inner, box, strict=True)
    ]
    found = itertools.product(groups, itertools.product(*parts))
    return [
        Chunk(number, group, indices, region)
        for number, ((group, indices), region) in enumerate(found)
    ]


def padded(columns: dict[str, Any], batch: int) -> dict[str, Any]:
    """Columns of a whole program: the last setting again where there are fewer."""

    def pad(array):
        places = np.minimum(np.arange(batch), len(array) - 1)
        return array[jnp.asarray(places)] if _is_key(array) else array[places]

    return {name: pad(array) for name, array in columns.items()}
