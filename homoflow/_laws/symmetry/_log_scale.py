"""The log-scale of an array: how much each of its entries grows under a symmetry.

It is a sum of components, each of which varies along a few axes only. That keeps the
problem small for a model with a million weights: the n × m scales of a dense layer are
made of n + m unknowns.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

#: The unknown that is 0. A component has it at entries on which it has no effect.
ZERO = 0
#: The largest component that is written out.
_MAX_SIZE = 4_000_000


class TooLarge(Exception):
    """A scale that would need more unknowns than are worth following."""


@dataclasses.dataclass(frozen=True, eq=False)
class Component:
    """factor · x[ids], varying along `axes` (ascending) and the same along all others.

    `ids` says which unknown belongs to which index along these axes.
    """

    factor: Fraction
    axes: tuple[int, ...]
    ids: np.ndarray


LogScale = tuple[Component, ...]
#: The scale of what no symmetry changes, such as data.
FIXED: LogScale = ()


def multiply(scale: LogScale, factor: Fraction | int) -> LogScale:
    """The scale of a power of an array."""
    if factor == 0:
        return FIXED
    return tuple(dataclasses.replace(p, factor=p.factor * factor) for p in scale)


def simplify(components: Iterable[Component]) -> LogScale:
    """The same sum with fewer components, and none that names an axis without need."""
    kept: list[Component] = []
    for component in map(_without_idle_axes, components):
        if component.factor == 0 or not component.ids.size or not component.ids.any():
            continue
        for i, other in enumerate(kept):
            if other.axes == component.axes and np.array_equal(
                other.ids, component.ids
            ):
                kept[i] = dataclasses.replace(
                    other, factor=other.factor + component.factor
                )
                break
        else:
            kept.append(component)
    return tuple(p for p in kept if p.factor != 0)


def permute_axes(scale: LogScale, places: Sequence[int | None]) -> LogScale:
    """Axis a becomes axis `places[a]`; no component may vary along an axis without one."""
    components = []
    for component in scale:
        axes = [places[a] for a in component.axes]
        order = sorted(range(len(axes)), key=lambda i: axes[i])  # pyright: ignore
        ids = component.ids.transpose(order)
        components.append(
            Component(component.factor, tuple(axes[i] for i in order), ids)
        )  # pyright: ignore
    return tuple(components)


def index_axis(scale: LogScale, axis: int, index) -> LogScale:
    """The scale at `index` along an axis: an integer (the axis stays) or an array."""
    index = np.atleast_1d(index)
    components = []
    for component in scale:
        if axis in component.axes:
            ids = np.take(component.ids, index, axis=component.axes.index(axis))
            component = dataclasses.replace(component, ids=ids)
        components.append(component)
    return simplify(components)


def broadcast(
    component: Component, axes: Sequence[int], shape: Sequence[int]
) -> np.ndarray:
    """The component's unknowns written out along `axes`, which include its own."""
    sizes = [shape[a] for a in axes]
    if math.prod(sizes) > _MAX_SIZE:
        raise TooLarge
    kept = [shape[a] if a in component.axes else 1 for a in axes]
    return np.broadcast_to(component.ids.reshape(kept), sizes)


def reshape_scale(scale: LogScale, old: Sequence[int], new: Sequence[int]) -> LogScale:
    """The scale after a reshape from `old` to `new`."""
    blocks = _blocks(old, new)
    components = []
    for component in scale:
        touched = [b for b in blocks if set(b[0]) & set(component.axes)]
        axes = [a for b in touched for a in b[0]]
        onto = [a for b in touched for a in b[1]]
        ids = broadcast(component, axes, old).reshape([new[a] for a in onto])
        components.append(Component(component.factor, tuple(onto), ids))
    return simplify(components)


def connected_components(
    components: Sequence[Component], axes: Iterable[int]
) -> list[list[Component]]:
    """The components that vary along `axes`, in groups that share none of these axes."""
    axes = set(axes)
    groups: list[tuple[set[int], list[Component]]] = []
    for component in components:
        own = axes & set(component.axes)
        if not own:
            continue
        joined, members = set(own), [component]
        for group in [g for g in groups if g[0] & own]:
            groups.remove(group)
            joined |= group[0]
            members = group[1] + members
        groups.append((joined, members))
    return [members for _, members in groups]


def _without_idle_axes(component: Component) -> Component:
    axes, ids = list(component.axes), component.ids
    for i in reversed(range(len(axes))):
        first = np.take(ids, [0], axis=i) if ids.shape[i] else ids
        if ids.shape[i] == 1 or (ids.shape[i] and (ids == first).all()):
            ids = np.asarray(np.take(ids, 0, axis=i))
            del axes[i]
    return Component(component.factor, tuple(axes), ids)


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
