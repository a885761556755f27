"""Linear equations between unknown log-scales, solved exactly over the rationals."""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from ._log_scale import (
    ZERO,
    Component,
    LogScale,
    broadcast,
    connected_components,
    multiply,
)

Combination = dict[int, Fraction]


class LinearEquations:
    """Homogeneous equations, mostly of two to four unknowns each.

    Of an equation's unknowns the youngest is expressed in the others, so that what stays
    free are scales of the parameters met first.
    """

    def __init__(self):
        self.count = 1  # The unknown 0 is 0.
        self._solved: dict[int, Combination] = {ZERO: {}}

    def new_unknowns(self, shape: Sequence[int]) -> np.ndarray:
        """An array of new unknowns."""
        size = math.prod(shape)
        ids = np.arange(self.count, self.count + size, dtype=np.int64).reshape(shape)
        self.count += size
        return ids

    def require_zero(self, scale: LogScale, shape: Sequence[int]) -> None:
        """Demand that the scale is 0 at every index of an array of this shape."""
        axes = range(len(shape))
        at_origin = self.require_constant_along(scale, axes, shape)
        self._require_zero_sums([(c.factor, c.ids.reshape(-1)) for c in at_origin])

    def require_equal(
        self, left: LogScale, right: LogScale, shape: Sequence[int]
    ) -> None:
        """Demand that two scales agree at every index."""
        difference = (*left, *multiply(right, -1))
        self.require_zero(_drop_opposites(difference), shape)

    def require_constant_along(
        self, scale: LogScale, axes, shape: Sequence[int]
    ) -> LogScale:
        """Demand that the scale does not vary along `axes`; returns it without them."""
        axes = [a for a in axes if shape[a] > 0]
        for group in connected_components(scale, axes):
            union = sorted({a for p in group for a in p.axes})
            origin = tuple(slice(0, 1) if a in axes else slice(None) for a in union)
            terms = []
            for component in group:
                ids = broadcast(component, union, shape)
                at_origin = np.broadcast_to(ids[origin], ids.shape)
                terms.append((component.factor, ids.reshape(-1)))
                terms.append((-component.factor, at_origin.reshape(-1)))
            self._require_zero_sums(terms)
        return tuple(_take_origin(c, axes) for c in scale)

    def require_zero_sum(self, equation: Combination) -> None:
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
            known = self._solved[unknown] = self._substitute(known)
        return known

    def _require_zero_sums(self, terms: list[tuple[Fraction, np.ndarray]]) -> None:
        """Demand that Σ factor · x[ids] is 0, at every index of the terms' arrays."""
        if not terms:
            return
        factors = [f for f, _ in terms]
        rows = np.stack([ids for _, ids in terms], axis=1)
        for row in _distinct_equations(rows, factors):
            equation: Combination = {}
            for unknown, c in zip(row.tolist(), factors, strict=True):
                equation[unknown] = equation.get(unknown, Fraction(0)) + c
            self._eliminate(equation)

    def _eliminate(self, equation: Combination) -> None:
        equation = self._substitute(equation)
        if not equation:
            return
        youngest = max(equation)
        pivot = -equation.pop(youngest)
        self._solved[youngest] = {v: c / pivot for v, c in equation.items()}

    def _substitute(self, equation: Combination) -> Combination:
        """The equation in terms of free unknowns, without those that cancel."""
        equation = {v: c for v, c in equation.items() if c}
        while any(v in self._solved for v in equation):
            result: Combination = {}
            for v, c in equation.items():
                for u, d in self._solved.get(v, {v: 1}).items():
                    result[u] = result.get(u, 0) + c * d
            equation = {v: c for v, c in result.items() if c}
        return equation


def _take_origin(component: Component, axes: Sequence[int]) -> Component:
    """The component at index 0 of these axes, along which it no longer varies."""
    for axis in axes:
        if axis in component.axes:
            place = component.axes.index(axis)
            ids = np.asarray(np.take(component.ids, 0, axis=place))
            others = component.axes[:place] + component.axes[place + 1 :]
            component = Component(component.factor, others, ids)
    return component


def _drop_opposites(components: Sequence[Component]) -> LogScale:
    """Without the pairs of components that plainly cancel."""
    left = list(components)
    for component in components:
        if not any(component is other for other in left):
            continue
        for other in left:
            if (
                component is not other
                and component.factor == -other.factor
                and component.axes == other.axes
                and np.array_equal(component.ids, other.ids)
            ):
                left = [c for c in left if c is not component and c is not other]
                break
    return tuple(left)


def _distinct_equations(rows: np.ndarray, factors: Sequence[Fraction]) -> np.ndarray:
    """The equations that are not plainly 0 = 0, each once.

    `rows` holds the unknowns that `factors` multiply, one equation in each row.
    """
    is_trivial = np.ones(len(rows), bool)
    for i in range(0, len(factors) - 1, 2):
        if factors[i] == -factors[i + 1]:
            is_trivial &= rows[:, i] == rows[:, i + 1]
        else:
            is_trivial[:] = False
    if len(factors) % 2:
        is_trivial[:] = False
    return np.unique(rows[~is_trivial], axis=0)


def sum_combinations(combinations: Iterable[Combination]) -> Combination:
    """Their sum, without unknowns that cancel."""
    total: Combination = {}
    for combination in combinations:
        for unknown, c in combination.items():
            total[unknown] = total.get(unknown, Fraction(0)) + c
    return {unknown: c for unknown, c in total.items() if c}
