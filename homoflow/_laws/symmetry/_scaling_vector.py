"""One rescaling of the parameters, written with as few numbers as possible."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np

Axes = tuple[int, ...]
Shape = tuple[int, ...]
#: The entries (flat indices along some axes) that differ from the rest, and by how much.
Deviations = dict[int, Fraction]

#: The most entries of parameters that are written out to see how simple a vector is.
_MAX_WRITTEN_OUT = 10_000
_ZERO = Fraction(0)


@dataclasses.dataclass(frozen=True)
class ScalingEntry:
    """The exponents of one array: `total` everywhere, and more at some entries.

    `deviations[axes]` holds what is added to `total` at indices along these axes; along
    all other axes it is the same.
    """

    total: Fraction = _ZERO
    deviations: Mapping[Axes, Deviations] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.total or self.deviations)

    def __mul__(self, factor: Fraction) -> "ScalingEntry":
        return ScalingEntry(
            self.total * factor,
            {
                axes: {i: c * factor for i, c in values.items()}
                for axes, values in self.deviations.items()
            },
        )

    def __add__(self, other: "ScalingEntry") -> "ScalingEntry":
        deviations = {}
        for axes in self.deviations.keys() | other.deviations.keys():
            left = self.deviations.get(axes, {})
            right = other.deviations.get(axes, {})
            values = {
                i: left.get(i, _ZERO) + right.get(i, _ZERO)
                for i in left.keys() | right.keys()
            }
            if values := _without_zeros(values):
                deviations[axes] = values
        return ScalingEntry(self.total + other.total, deviations)

    def coefficients(self) -> Iterator[Fraction]:
        """The numbers that are written down, `total` first; none is 0."""
        values = (c for d in self.deviations.values() for c in d.values())
        return (c for c in (self.total, *values) if c)

    def exponents(self) -> set[Fraction]:
        """Exponents that occur in the array, where single axes deviate."""
        return {self.total}.union(
            *({self.total + c for c in d.values()} for d in self.deviations.values())
        )

    def shorten(self, shape: Shape) -> "ScalingEntry":
        """The same exponents, counted from 0 where that takes fewer deviations."""
        total, deviations = self.total, dict(self.deviations)
        for axes, values in list(deviations.items()):
            if total:
                size = math.prod(shape[a] for a in axes)
                from_zero = {i: values.get(i, _ZERO) + total for i in range(size)}
                from_zero = _without_zeros(from_zero)
                if len(from_zero) <= len(values):
                    total = _ZERO
                    deviations |= {axes: from_zero}
        return ScalingEntry(total, {axes: d for axes, d in deviations.items() if d})

    def sum_of_magnitudes(self, shape: Shape) -> float:
        """Σ|exponent| over the entries of the array."""
        full = np.full(shape, float(self.total))
        for axes, values in self.deviations.items():
            part = np.zeros([shape[a] for a in axes])
            part.reshape(-1)[list(values)] = [float(c) for c in values.values()]
            kept = [n if a in axes else 1 for a, n in enumerate(shape)]
            full = full + part.reshape(kept)
        return float(np.abs(full).sum())


@dataclasses.dataclass(frozen=True)
class ScalingVector:
    """A rescaling w → e^{εs}w of the parameters, by its exponents s.

    - `entries`: those of the arrays that it changes, by the number of the array.
    - `shapes`: of all arrays.
    """

    entries: Mapping[int, ScalingEntry]
    shapes: Sequence[Shape]

    def __mul__(self, factor: Fraction) -> "ScalingVector":
        scaled = {k: entry * factor for k, entry in self.entries.items()}
        return ScalingVector(scaled, self.shapes)

    def __add__(self, other: "ScalingVector") -> "ScalingVector":
        nothing, entries = ScalingEntry(), {}
        for k in sorted(self.entries.keys() | other.entries.keys()):
            entry = self.entries.get(k, nothing) + other.entries.get(k, nothing)
            if entry := entry.shorten(self.shapes[k]):
                entries[k] = entry
        return ScalingVector(entries, self.shapes)

    @property
    def num_totals(self) -> int:
        """How many arrays are rescaled as a whole."""
        return sum(bool(entry.total) for entry in self.entries.values())

    def cost(self) -> tuple[float, int]:
        """How much there is to rescale, and how many numbers it takes to write it."""
        written = sum(sum(1 for _ in e.coefficients()) for e in self.entries.values())
        if sum(math.prod(self.shapes[k]) for k in self.entries) > _MAX_WRITTEN_OUT:
            return float(self.num_totals), written
        magnitudes = (
            entry.sum_of_magnitudes(self.shapes[k]) for k, entry in self.entries.items()
        )
        return sum(magnitudes), written

    def in_lowest_terms(self) -> "ScalingVector":
        """A multiple in whole numbers without a common divisor, the first positive."""
        values = [c for entry in self.entries.values() for c in entry.coefficients()]
        denominator = math.lcm(*(c.denominator for c in values))
        divisor = math.gcd(*(int(c * denominator) for c in values))
        factor = Fraction(denominator, divisor)
        return self * (-factor if values[0] < 0 else factor)


def _without_zeros(values: Deviations) -> Deviations:
    return {i: c for i, c in values.items() if c}
