"""Continuous piecewise-linear functions of one number, and how they combine.

Knots are numbers; slopes and intercepts are numbers or arrays, one entry for each entry
of what the function is applied to. What would need the values of an array to be told,
such as where two lines with array slopes cross, is answered by `None`.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp

#: Two numbers that differ by less than this relative to their size are one.
_ROUNDING = 1e-12


class Line(NamedTuple):
    """z ↦ slope·z + intercept."""

    slope: Any
    intercept: Any

    @property
    def is_known(self) -> bool:
        return _is_number(self.slope) and _is_number(self.intercept)

    def at(self, z: float) -> Any:
        return add(multiply(self.slope, z), self.intercept)


class Piecewise(NamedTuple):
    """`lines[i]` holds between `knots[i − 1]` and `knots[i]`."""

    knots: tuple[float, ...]
    lines: tuple[Line, ...]

    @property
    def is_linear(self) -> bool:
        return not self.knots

    @property
    def is_known(self) -> bool:
        return all(line.is_known for line in self.lines)

    @property
    def is_increasing(self) -> bool:
        """Whether it is known never to fall."""
        return all(_is_number(line.slope) and line.slope >= 0 for line in self.lines)

    @property
    def is_nonnegative(self) -> bool:
        """Whether it is known never to be below 0."""
        first, last = self.lines[0].slope, self.lines[-1].slope
        if not self.knots or not (_is_number(first) and _is_number(last)):
            return False
        values = [self.lines[i].at(knot) for i, knot in enumerate(self.knots)]
        return first <= 0 <= last and all(_is_number(v) and v >= 0 for v in values)

    def pieces(self) -> list[tuple[float, float, Line]]:
        """Each line with the interval where it holds."""
        ends = (-math.inf, *self.knots, math.inf)
        return [(a, b, c) for (a, b), c in zip(pairwise(ends), self.lines, strict=True)]

    def line_below(self, z: float) -> Line:
        return self.lines[sum(knot < z for knot in self.knots)]

    def line_above(self, z: float) -> Line:
        return self.lines[sum(knot <= z for knot in self.knots)]


def linear(slope: Any, intercept: Any = 0.0) -> Piecewise:
    return Piecewise((), (Line(slope, intercept),))


IDENTITY = linear(1.0)
ABSOLUTE_VALUE = Piecewise((0.0,), (Line(-1.0, 0.0), Line(1.0, 0.0)))
RELU = Piecewise((0.0,), (Line(0.0, 0.0), Line(1.0, 0.0)))


def compose_with_line(p: Piecewise, inner: Line) -> Piecewise | None:
    """z ↦ p(inner(z)), for a line p."""
    if not p.is_linear:
        return None
    (outer,) = p.lines
    slope = multiply(outer.slope, inner.slope)
    return linear(slope, add(multiply(outer.slope, inner.intercept), outer.intercept))


def absolute_value(p: Piecewise) -> Piecewise | None:
    negative = (Line(multiply(-1.0, a), multiply(-1.0, b)) for a, b in p.lines)
    return extremum(p, Piecewise(p.knots, tuple(negative)), is_max=True)


def extremum(p: Piecewise, q: Piecewise, *, is_max: bool) -> Piecewise | None:
    """The larger (or smaller) of two functions."""
    ends = (-math.inf, *sorted({*p.knots, *q.knots}), math.inf)
    knots: list[float] = []
    lines: list[Line] = []
    for low, high in pairwise(ends):
        f, g = p.line_above(low), q.line_above(low)
        part = _extremum_of_lines(f, g, low, high, is_max=is_max)
        if part is None:
            return None
        if lines:
            knots.append(low)
        knots.extend(part.knots)
        lines.extend(part.lines)
    return _drop_idle_knots(knots, lines)


def join_at(threshold: float, below: Piecewise, above: Piecewise) -> Piecewise:
    """`below` up to the threshold, `above` from there."""
    first = [k for k in below.knots if k < threshold]
    last = [k for k in above.knots if k > threshold]
    lines = (
        *below.lines[: len(first) + 1],
        *above.lines[len(above.lines) - len(last) - 1 :],
    )
    return _drop_idle_knots([*first, threshold, *last], list(lines))


def jumps_at(threshold: float, below: Piecewise, above: Piecewise) -> bool | None:
    """Whether `chosen` has a jump at the threshold."""
    before = below.line_below(threshold).at(threshold)
    after = above.line_above(threshold).at(threshold)
    if not (_is_number(before) and _is_number(after)):
        return None
    return abs(before - after) > _ROUNDING * max(1.0, abs(before), abs(after))


def multiply(a: Any, b: Any) -> Any:
    return 0.0 if is_zero(a) or is_zero(b) else a * b


def add(a: Any, b: Any) -> Any:
    return b if is_zero(a) else a if is_zero(b) else a + b


def is_zero(a: Any) -> bool:
    return _is_number(a) and a == 0


def _extremum_of_lines(
    f: Line, g: Line, low: float, high: float, *, is_max: bool
) -> Piecewise | None:
    if f == g if f.is_known and g.is_known else f is g:
        return Piecewise((), (f,))
    intercepts = f.intercept, g.intercept
    if all(map(_is_number, intercepts)) and intercepts[0] == intercepts[1]:
        small, large = (
            Line(_pick(jnp_fn, f.slope, g.slope), f.intercept)
            for jnp_fn in (jnp.minimum, jnp.maximum)
        )
        left, right = (small, large) if is_max else (large, small)
        return _join_lines(0.0, left, right, low, high)
    if not (f.is_known and g.is_known):
        return None
    if f.slope == g.slope:
        f_is_it = (f.intercept > g.intercept) == is_max
        return Piecewise((), (f if f_is_it else g,))
    crossing = (g.intercept - f.intercept) / (f.slope - g.slope)
    left, right = (g, f) if (f.slope > g.slope) == is_max else (f, g)
    return _join_lines(crossing, left, right, low, high)


def _join_lines(
    at: float, left: Line, right: Line, low: float, high: float
) -> Piecewise:
    if at <= low:
        return Piecewise((), (right,))
    return Piecewise((), (left,)) if at >= high else Piecewise((at,), (left, right))


def _pick(choose, a: Any, b: Any) -> Any:
    if _is_number(a) and _is_number(b):
        return min(a, b) if choose is jnp.minimum else max(a, b)
    return choose(a, b)


def _drop_idle_knots(knots: list[float], lines: list[Line]) -> Piecewise:
    """Without knots between lines that are the same."""
    kept_knots: list[float] = []
    kept = [lines[0]]
    for knot, line in zip(knots, lines[1:], strict=True):
        last = kept[-1]
        if last is line or (last.is_known and line.is_known and last == line):
            continue
        kept_knots.append(knot)
        kept.append(line)
    return Piecewise(tuple(kept_knots), tuple(kept))


def _is_number(a: Any) -> bool:
    return isinstance(a, float | int)
