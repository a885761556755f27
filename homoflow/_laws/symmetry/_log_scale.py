"""The log-scale of an array: how much each of its entries grows under a symmetry.

It is a sum of parts, each of which varies along a few axes only. That is what keeps a
model with a million weights small: a dense layer's n × m scales are n + m unknowns.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

#: The unknown that is 0, and with which an entry says that it has no share of a part.
NOTHING = 0
#: The largest part that is written out.
_LARGEST = 4_000_000


class TooLarge(Exception):
    """A scale that would need more unknowns than are worth following."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """factor · x[ids], varying along `axes` (ascending) and the same along all others.

    `ids` says which unknown belongs to which index along these axes.
    """

    factor: Fraction
    axes: tuple[int, ...]
    ids: np.ndarray


Scale = tuple[Part, ...]
#: The scale of what no symmetry changes, such as data.
FIXED: Scale = ()


def scaled(scale: Scale, factor: Fraction | int) -> Scale:
    """The scale of a power of an array."""
    if factor == 0:
        return FIXED
    return tuple(dataclasses.replace(p, factor=p.factor * factor) for p in scale)


def tidy(parts: Iterable[Part]) -> Scale:
    """The same sum with fewer parts: no axis without variation, like parts added."""
    kept: list[Part] = []
    for part in map(_without_idle_axes, parts):
        if part.factor == 0 or not part.ids.size or not part.ids.any():
            continue
        for i, other in enumerate(kept):
            if other.axes == part.axes and np.array_equal(other.ids, part.ids):
                kept[i] = dataclasses.replace(other, factor=other.factor + part.factor)
                break
        else:
            kept.append(part)
    return tuple(p for p in kept if p.factor != 0)


def moved(scale: Scale, places: Sequence[int | None]) -> Scale:
    """Axis a becomes axis `places[a]`; no part may vary along an axis without a place."""
    parts = []
    for part in scale:
        axes = [places[a] for a in part.axes]
        order = sorted(range(len(axes)), key=lambda i: axes[i])  # pyright: ignore
        ids = part.ids.transpose(order)
        parts.append(Part(part.factor, tuple(axes[i] for i in order), ids))  # pyright: ignore
    return tuple(parts)


def taken(scale: Scale, axis: int, index) -> Scale:
    """The scale at `index` along an axis: an integer (the axis stays) or an array."""
    index = np.atleast_1d(index)
    parts = []
    for part in scale:
        if axis in part.axes:
            ids = np.take(part.ids, index, axis=part.axes.index(axis))
            part = dataclasses.replace(part, ids=ids)
        parts.append(part)
    return tidy(parts)


def spread(part: Part, axes: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """The part's unknowns written out along `axes`, which include its own."""
    sizes = [shape[a] for a in axes]
    if math.prod(sizes) > _LARGEST:
        raise TooLarge
    kept = [shape[a] if a in part.axes else 1 for a in axes]
    return np.broadcast_to(part.ids.reshape(kept), sizes)


def reshaped(scale: Scale, old: Sequence[int], new: Sequence[int]) -> Scale:
    """The scale after a reshape from `old` to `new`."""
    blocks = _blocks(old, new)
    parts = []
    for part in scale:
        touched = [b for b in blocks if set(b[0]) & set(part.axes)]
        axes = [a for b in touched for a in b[0]]
        onto = [a for b in touched for a in b[1]]
        ids = spread(part, axes, old).reshape([new[a] for a in onto])
        parts.append(Part(part.factor, tuple(onto), ids))
    return tidy(parts)


def together(parts: Sequence[Part], axes: Iterable[int]) -> list[list[Part]]:
    """The parts that vary along `axes`, in groups that share none of these axes."""
    axes = set(axes)
    groups: list[tuple[set[int], list[Part]]] = []
    for part in parts:
        own = axes & set(part.axes)
        if not own:
            continue
        joined, members = set(own), [part]
        for group in [g for g in groups if g[0] & own]:
            groups.remove(group)
            joined |= group[0]
            members = group[1] + members
        groups.append((joined, members))
    return [members for _, members in groups]


def _without_idle_axes(part: Part) -> Part:
    axes, ids = list(part.axes), part.ids
    for i in reversed(range(len(axes))):
        first = np.take(ids, [0], axis=i) if ids.shape[i] else ids
        if ids.shape[i] == 1 or (ids.shape[i] and (ids == first).all()):
            ids = np.asarray(np.take(ids, 0, axis=i))
            del axes[i]
    return Part(part.factor, tuple(axes), ids)


def _blocks(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of neighbouring axes that a reshape turns into each other."""
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        before, after = [], []
        size_before = size_after = 1
        while True:
            if size_before <= size_after and i < len(old):
                before.append(i)
                size_before *= old[i]
                i += 1
            elif j < len(new):
                after.append(j)
                size_after *= new[j]
                j += 1
            elif i < len(old):
                before.append(i)
                size_before *= old[i]
                i += 1
            if size_before == size_after or (i == len(old) and j == len(new)):
                break
        blocks.append((before, after))
    return blocks
