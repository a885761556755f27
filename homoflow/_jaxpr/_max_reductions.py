"""Which entries each result of a max (or min) reduction is the largest of."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class MaxGroup(NamedTuple):
    """Results that are the largest of equally many entries.

    - `results`: places in the flattened result.
    - `entries`: column i holds the places, in the flattened operand, of what result i
        is the largest of.
    """

    results: Int[np.ndarray, " results"]
    entries: Int[np.ndarray, "entries results"]


def find_max_groups(eqn) -> list[MaxGroup]:
    """The groups of a `reduce_max`, `reduce_min`, `reduce_window_max` or `_min`."""
    shape = eqn.invars[0].aval.shape
    if "axes" not in eqn.params:
        return _groups_of_windows(
            shape, **{k: eqn.params[k] for k in _WINDOW_PARAMETERS}
        )
    places = np.arange(math.prod(shape)).reshape(shape)
    axes = [int(axis) for axis in eqn.params["axes"]]
    first = np.moveaxis(places, axes, range(len(axes)))
    count = math.prod(shape[axis] for axis in axes)
    entries = first.reshape(count, -1)
    return [MaxGroup(np.arange(entries.shape[1]), entries)]


def have_common_pairs(groups: list[MaxGroup]) -> bool:
    """Whether two entries belong to more than one group.

    Their order would then be a kink in each of these groups, and the kinks would not be
    independent.
    """
    pairs = [
        np.sort(np.stack([c.entries[i], c.entries[j]]), 0)
        for c in groups
        for i in range(len(c.entries))
        for j in range(i)
    ]
    if not pairs:
        return False
    every = np.concatenate(pairs, 1)
    return np.unique(every, axis=1).shape[1] < every.shape[1]


_WINDOW_PARAMETERS = (
    "window_dimensions",
    "window_strides",
    "padding",
    "base_dilation",
    "window_dilation",
)


def _groups_of_windows(
    shape, window_dimensions, window_strides, padding, base_dilation, window_dilation
) -> list[MaxGroup]:
    """Padding and the holes of a dilated base belong to no group."""
    rank = len(shape)
    place, inside = np.zeros((1,) * (2 * rank), int), np.ones((1,) * (2 * rank), bool)
    for axis, size in enumerate(shape):
        low, high = padding[axis]
        window, spread = window_dimensions[axis], window_dilation[axis]
        base = base_dilation[axis]
        length = (size - 1) * base + 1
        reach = (window - 1) * spread + 1
        count = (length + low + high - reach) // window_strides[axis] + 1
        starts = np.arange(count) * window_strides[axis] - low
        at = starts[:, None] + np.arange(window) * spread
        valid = (at >= 0) & (at < length) & (at % base == 0)
        dims = [1] * (2 * rank)
        dims[axis], dims[rank + axis] = count, window
        index = np.where(valid, at // base, 0).reshape(dims)
        place = place * size + index
        inside = inside & valid.reshape(dims)
    results = math.prod(place.shape[:rank])
    place, inside = (
        np.broadcast_to(a, inside.shape).reshape(results, -1) for a in (place, inside)
    )
    counts = inside.sum(1)
    front = np.argsort(~inside, axis=1, kind="stable")
    ordered = np.take_along_axis(place, front, 1)
    return [
        MaxGroup(np.flatnonzero(counts == n), ordered[counts == n, :n].T)
        for n in np.unique(counts)
    ]
