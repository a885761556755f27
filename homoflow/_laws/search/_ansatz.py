"""Forms of quadratic laws to look for: which products of weights may come in, and how.

A small model is searched for every product of two weights. In a larger one two arrays are
joined along one axis of each, as Σ_r M[i, j]·u[i, r]·v[j, r], with the same matrix M at
all other indices r, or another one for each index along some of them.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

#: The most unknown coefficients of one search; the time grows with their cube.
MAX_UNKNOWNS = 900
#: Beyond this, matrices of a different value at each index are not looked for.
_MAX_WITH_BATCHES = 500
#: Coefficients below this, relative to the largest, are zeros.
_MIN_COEFFICIENT = 1e-7


class Polynomial(NamedTuple):
    """Σ c_k·w[i_k]·w[j_k] + Σ b[i]·w[i], with i ≤ j."""

    i: np.ndarray
    j: np.ndarray
    c: np.ndarray
    b: np.ndarray

    def gradient(self, w: np.ndarray) -> np.ndarray:
        result = self.b.copy()
        np.add.at(result, self.i, self.c * w[self.j])
        np.add.at(result, self.j, self.c * w[self.i])
        return result


class Pattern(NamedTuple):
    """Σ_r M[b, i, j]·u[b, i, r]·v[b, j, r], with unknown M.

    `left`, `right`: flat indices of u and v in the vector of weights, of the shapes
    (b, i, r) and (b, j, r). If they are the same, M is symmetric.
    """

    left: np.ndarray
    right: np.ndarray
    is_symmetric: bool

    @property
    def size(self) -> int:
        """How many unknowns M has."""
        return len(self.pairs()[0])

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(b, i, j) of each unknown."""
        b, n, m = len(self.left), self.left.shape[1], self.right.shape[1]
        i, j = np.triu_indices(n) if self.is_symmetric else _all_pairs(n, m)
        return np.repeat(np.arange(b), len(i)), np.tile(i, b), np.tile(j, b)

    def conditions(self, weights: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        """The rate of each unknown's share along a gradient, one point in each row."""
        products = weights[:, self.left] @ gradients[:, self.right].swapaxes(2, 3)
        products += gradients[:, self.left] @ weights[:, self.right].swapaxes(2, 3)
        return products[(slice(None), *self.pairs())]

    def touches(self, entries: np.ndarray) -> np.ndarray:
        """For each unknown, whether any of these entries comes in."""
        b, i, j = self.pairs()
        places = np.concatenate([self.left[b, i], self.right[b, j]], axis=1)
        return np.count_nonzero(entries[places], axis=1) > 0


class Ansatz:
    """Unknown coefficients of a law of a vector of weights: those of patterns, then b.

    - `size`: of the vector of weights; `kept`: the unknowns that are solved for.
    - `is_exhaustive`: whether every product of two weights is among the patterns.
    """

    def __init__(
        self, patterns: Sequence[Pattern], size: int, *, is_exhaustive: bool = False
    ):
        self.patterns, self.size, self.is_exhaustive = patterns, size, is_exhaustive
        self.kept = np.ones(sum(p.size for p in patterns) + size, bool)

    def drop_unreached(self, is_unreached) -> None:
        """Leave out what involves weights to which no gradient flows."""
        touched = [p.touches(is_unreached) for p in self.patterns]
        self.kept = ~np.concatenate([*touched, is_unreached])

    def conditions(self, weights: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        """The equations ⟨2Aw + b, g⟩ = 0, one in each row, for the unknowns kept."""
        shares = [p.conditions(weights, gradients) for p in self.patterns]
        return np.concatenate([*shares, gradients], axis=1)[:, self.kept]

    def polynomial(self, solution: np.ndarray) -> Polynomial:
        """The law that belongs to values of the unknowns kept."""
        unknowns = np.zeros(len(self.kept))
        unknowns[self.kept] = solution
        codes, values, start = [], [], 0
        for pattern in self.patterns:
            b, i, j = pattern.pairs()
            own = unknowns[start : start + len(b)]
            start += len(b)
            used = np.flatnonzero(own)
            left = pattern.left[b[used], i[used]].reshape(-1)
            right = pattern.right[b[used], j[used]].reshape(-1)
            low, high = np.minimum(left, right), np.maximum(left, right)
            codes.append(low * self.size + high)
            values.append(np.repeat(own[used], pattern.left.shape[2]))
        code, place = np.unique(np.concatenate([[], *codes]), return_inverse=True)
        c = np.bincount(place.reshape(-1), np.concatenate([[], *values]), len(code))
        linear = unknowns[start:]
        smallest = _MIN_COEFFICIENT * max(
            np.abs(c).max(initial=0.0), np.abs(linear).max(initial=0.0)
        )
        clear = np.abs(c) > smallest
        code = code[clear].astype(int)
        linear = np.where(np.abs(linear) > smallest, linear, 0.0)
        return Polynomial(code // self.size, code % self.size, c[clear], linear)


def every_product(size: int) -> Ansatz:
    """The search for every quadratic law of so many weights."""
    everything = np.arange(size).reshape(1, size, 1)
    return Ansatz([Pattern(everything, everything, True)], size, is_exhaustive=True)


def joined_axes(shapes: Sequence[tuple[int, ...]]) -> Ansatz | None:
    """The search among arrays of these shapes, joined along an axis of each.

    `None` if even what belongs to single arrays takes too many unknowns.
    """
    size = sum(map(math.prod, shapes))
    ends = np.cumsum([0, *map(math.prod, shapes)])
    arrays = [
        np.arange(start, end).reshape(shape or (1,))
        for start, end, shape in zip(ends[:-1], ends[1:], shapes, strict=True)
    ]
    arrays = [a for a in arrays if a.size]
    chosen: dict[tuple, Pattern] = {}
    total = size
    if total > MAX_UNKNOWNS:
        return None
    for group in (_single_arrays, _entry_by_entry, _pairs_of_arrays):
        new = list(group(arrays))
        count = sum(p.size for _, p in new)
        if total + count > MAX_UNKNOWNS:
            if group is _single_arrays:
                return None
            continue
        chosen.update(new)
        total += count
    for key, pattern in list(chosen.items()):
        finer = _with_batches(key, arrays, total - pattern.size)
        if finer is not None:
            total += finer.size - pattern.size
            chosen[key] = finer
    return Ansatz(list(chosen.values()), size)


def _single_arrays(arrays) -> Iterator[tuple[tuple, Pattern]]:
    for p, array in enumerate(arrays):
        for axis, length in enumerate(array.shape):
            if length > 1 or array.size == 1:
                yield (p, axis, p, axis), _join(array, axis, array, axis, ())


def _entry_by_entry(arrays) -> Iterator[tuple[tuple, Pattern]]:
    """u[i]·v[i] of two arrays of the same shape."""
    for (p, u), (q, v) in itertools.combinations(enumerate(arrays), 2):
        if u.shape == v.shape:
            shape = (-1, 1, 1)
            yield (p, q), Pattern(u.reshape(shape), v.reshape(shape), False)


def _pairs_of_arrays(arrays) -> Iterator[tuple[tuple, Pattern]]:
    for (p, u), (q, v) in itertools.combinations(enumerate(arrays), 2):
        for a, c in itertools.product(range(u.ndim), range(v.ndim)):
            if _others(u, a) == _others(v, c):
                yield (p, a, q, c), _join(u, a, v, c, ())


def _with_batches(key: tuple, arrays, others: int) -> Pattern | None:
    """The pattern with another matrix at each index along as many axes as possible."""
    if len(key) != 4:
        return None
    p, a, q, c = key
    rest = len(_others(arrays[p], a))
    for count in range(rest, 0, -1):
        for batch in itertools.combinations(range(rest), count):
            pattern = _join(arrays[p], a, arrays[q], c, batch)
            if others + pattern.size <= _MAX_WITH_BATCHES:
                return pattern
    return None


def _join(u, a: int, v, c: int, batch: tuple[int, ...]) -> Pattern:
    left, right = _in_place(u, a, batch), _in_place(v, c, batch)
    return Pattern(left, right, u is v)


def _in_place(array: np.ndarray, axis: int, batch: tuple[int, ...]) -> np.ndarray:
    """The array as (batch, axis, rest); `batch` counts the axes other than `axis`."""
    others = [k for k in range(array.ndim) if k != axis]
    first = [others[k] for k in batch]
    last = [k for k in others if k not in first]
    count = math.prod(array.shape[k] for k in first)
    moved = array.transpose([*first, axis, *last])
    return moved.reshape(count, array.shape[axis], -1)


def _others(array: np.ndarray, axis: int) -> tuple[int, ...]:
    return array.shape[:axis] + array.shape[axis + 1 :]


def _all_pairs(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    i, j = np.indices((n, m))
    return i.reshape(-1), j.reshape(-1)
