"""Which entries of an array compete in a reduction to the largest (or smallest) one."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Contest(NamedTuple):
    """Results that are the largest of equally many entries.

    - `results`: places in the flattened result.
    - `entries`: column i holds the places, in the flattened operand, of what result i
        is the largest of.
    """

    results: Int[np.ndarray, " results"]
    entries: Int[np.ndarray, "entries results"]


def contests_of(eqn) -> list[Contest]:
    """All contests of a `reduce_max`, `reduce_min`, `reduce_window_max` or `_min`."""
    shape = eqn.invars[0].aval.shape
    if "axes" not in eqn.params:
        return _of_windows(shape, **{k: eqn.params[k] for k in _WINDOW})
    places = np.arange(math.prod(shape)).reshape(shape)
    axes = [int(axis) for axis in eqn.params["axes"]]
    first = np.moveaxis(places, axes, range(len(axes)))
    count = math.prod(shape[axis] for axis in axes)
    entries = first.reshape(count, -1)
    return [Contest(np.arange(entries.shape[1]), entries)]


def have_pairs_in_common(contests: list[Contest]) -> bool:
    """Whether two entries compete for more than one result.

    They would have a kink in each, and the order of three entries at such kinks is not
    made of independent ones.
    """
    pairs = [
        np.sort(np.stack([c.entries[i], c.entries[j]]), 0)
        for c in contests
        for i in range(len(c.entries))
        for j in range(i)
    ]
    if not pairs:
        return False
    every = np.concatenate(pairs, 1)
    return np.unique(every, axis=1).shape[1] < every.shape[1]


_WINDOW = (
    "window_dimensions", "window_strides", "padding", "base_dilation",
    "window_dilation",
)  # fmt: skip


def _of_windows(
    shape, window_dimensions, window_strides, padding, base_dilation, window_dilation
) -> list[Contest]:
    """Padding and the holes of a dilated base do not compete."""
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
        Contest(np.flatnonzero(counts == n), ordered[counts == n, :n].T)
        for n in np.unique(counts)
    ]
