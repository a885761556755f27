"""Linear equations between unknown log-scales, solved exactly over the rationals."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from ._log_scale import NOTHING, Part, Scale, spread, together

Combination = dict[int, Fraction]


class Equations:
    """Homogeneous equations, mostly of two to four unknowns each.

    Of an equation's unknowns the youngest is expressed in the others, so that what stays
    free are scales of the parameters met first.
    """

    def __init__(self):
        self.count = 1  # The unknown 0 is 0.
        self._solved: dict[int, Combination] = {NOTHING: {}}

    def unknowns(self, shape: Sequence[int]) -> np.ndarray:
        """An array of new unknowns."""
        size = math.prod(shape)
        ids = np.arange(self.count, self.count + size, dtype=np.int64).reshape(shape)
        self.count += size
        return ids

    def vanish(self, scale: Scale, shape: Sequence[int]) -> None:
        """Demand that the scale is 0 at every index of an array of this shape."""
        axes = range(len(shape))
        at_origin = self.independent(scale, axes, shape)
        self._demand(
            [(p.factor, p.ids.reshape(-1)) for p in at_origin],
        )

    def equal(self, left: Scale, right: Scale, shape: Sequence[int]) -> None:
        """Demand that two scales agree at every index."""
        opposite = tuple(Part(-p.factor, p.axes, p.ids) for p in right)
        self.vanish(_cancelled((*left, *opposite)), shape)

    def independent(self, scale: Scale, axes, shape: Sequence[int]) -> Scale:
        """Demand that the scale does not vary along `axes`; returns it without them."""
        axes = [a for a in axes if shape[a] > 0]
        for group in together(scale, axes):
            union = sorted({a for p in group for a in p.axes})
            along = [union.index(a) for a in union if a in axes]
            terms = []
            for part in group:
                ids = spread(part, union, shape)
                origin = ids[tuple(slice(0, 1) if i in along else slice(None)
                                   for i in range(ids.ndim))]  # fmt: skip
                terms.append((part.factor, ids.reshape(-1)))
                terms.append(
                    (-part.factor, np.broadcast_to(origin, ids.shape).reshape(-1))
                )
            self._demand(terms)
        return tuple(_at_origin(p, axes) for p in scale)

    def demand(self, equation: Combination) -> None:
        """Demand that a combination of unknowns is 0."""
        self._eliminate(equation)

    def is_free(self, unknown: int) -> bool:
        """Whether nothing determines the unknown."""
        return unknown not in self._solved

    def resolve(self, unknown: int) -> Combination:
        """The unknown in terms of free ones."""
        known = self._solved.get(unknown)
        if known is None:
            return {unknown: Fraction(1)}
        if any(v in self._solved for v in known):
            known = self._solved[unknown] = self._reduced(known)
        return known

    def _demand(self, terms: list[tuple[Fraction, np.ndarray]]) -> None:
        if not terms:
            return
        factors = [f for f, _ in terms]
        rows = np.stack([ids for _, ids in terms], axis=1)
        for row in _distinct(rows, factors):
            self._eliminate(_summed(row.tolist(), factors))

    def _eliminate(self, equation: Combination) -> None:
        equation = self._reduced(equation)
        if not equation:
            return
        youngest = max(equation)
        pivot = -equation.pop(youngest)
        self._solved[youngest] = {v: c / pivot for v, c in equation.items()}

    def _reduced(self, equation: Combination) -> Combination:
        while any(v in self._solved for v in equation):
            result: Combination = {}
            for v, c in equation.items():
                for u, d in self._solved.get(v, {v: 1}).items():
                    result[u] = result.get(u, 0) + c * d
            equation = {v: c for v, c in result.items() if c != 0}
        return equation


def _at_origin(part: Part, axes: Sequence[int]) -> Part:
    for a in axes:
        if a in part.axes:
            ids = np.asarray(np.take(part.ids, 0, axis=part.axes.index(a)))
            part = Part(part.factor, tuple(b for b in part.axes if b != a), ids)
    return part


def _cancelled(parts: Sequence[Part]) -> Scale:
    """Without the pairs of parts that plainly cancel."""
    left = list(parts)
    for part in parts:
        for other in left:
            if (
                part is not other
                and any(part is p for p in left)
                and part.factor == -other.factor
                and part.axes == other.axes
                and np.array_equal(part.ids, other.ids)
            ):
                left = [p for p in left if p is not part and p is not other]
                break
    return tuple(left)


def _distinct(rows: np.ndarray, factors: Sequence[Fraction]) -> np.ndarray:
    """The rows that are not plainly 0 = 0, each once."""
    plain = np.ones(len(rows), bool)
    for i in range(0, len(factors) - 1, 2):
        if factors[i] == -factors[i + 1]:
            plain &= rows[:, i] == rows[:, i + 1]
        else:
            plain[:] = False
    if len(factors) % 2:
        plain[:] = False
    return np.unique(rows[~plain], axis=0)


def _summed(unknowns: Sequence[int], factors: Sequence[Fraction]) -> Combination:
    total: Combination = {}
    for v, c in zip(unknowns, factors, strict=True):
        total[v] = total.get(v, Fraction(0)) + c
    return {v: c for v, c in total.items() if c != 0}
