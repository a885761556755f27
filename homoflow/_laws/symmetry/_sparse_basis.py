"""A basis of rescalings that is easy to read: each changes as little as possible."""

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from ._linear_equations import Combination, LinearEquations, sum_combinations
from ._scaling_vector import Axes, ScalingEntry, ScalingVector, Shape

#: The most vectors that rescale whole arrays among which simpler ones are looked for.
_MAX_VECTORS = 60


def make_sparse(vectors: list[ScalingVector]) -> list[ScalingVector]:
    """The same span, by vectors that rescale fewer whole arrays.

    An equation between units is written with the first unit as the reference, which then
    carries what is common to all of them.
    """
    candidates = [i for i, v in enumerate(vectors) if v.num_totals]
    if len(candidates) > _MAX_VECTORS:
        return vectors
    vectors, improves = list(vectors), True
    while improves:
        improves = False
        for i in candidates:
            for j in candidates:
                simpler = _reduce(vectors[i], vectors[j]) if i != j else None
                if simpler is not None:
                    vectors[i], improves = simpler, True
    return vectors


def _reduce(vector: ScalingVector, other: ScalingVector) -> ScalingVector | None:
    """The vector plus a multiple of the other, if that is simpler."""
    factors = set()
    for k in vector.entries.keys() & other.entries.keys():
        own, its = vector.entries[k].exponents(), other.entries[k].exponents()
        factors |= {-a / b for a in own for b in its if a and b}
    candidates = [vector + other * factor for factor in sorted(factors)]
    best = min(candidates, key=ScalingVector.cost, default=vector)
    return best if best.cost() < vector.cost() else None


def drop_dependent(vectors: list[ScalingVector]) -> list[ScalingVector]:
    """Without the vectors that are combinations of simpler ones.

    Where two parameters meet in a product, what one gives along the contracted axis the
    other takes, and a combination of the unknowns may rescale nothing at all.
    """
    if not vectors:
        return []
    by_cost = sorted(range(len(vectors)), key=lambda i: vectors[i].cost())
    equations = LinearEquations()
    unknowns = equations.new_unknowns((len(vectors),)).tolist()
    unknown_of = dict(zip(reversed(by_cost), unknowns, strict=True))
    for k, shape in enumerate(vectors[0].shapes):
        entries = {
            unknown_of[i]: v.entries[k] for i, v in enumerate(vectors) if k in v.entries
        }
        for equation in _equations_of_array(entries, shape):
            equations.require_zero_sum(equation)
    free = {u for u in unknowns if equations.is_free(u)}
    return [v for i, v in enumerate(vectors) if unknown_of[i] not in free]


def _equations_of_array(
    entries: Mapping[int, ScalingEntry], shape: Shape
) -> Iterator[Combination]:
    """Equations that say that a combination of entries rescales nothing of an array.

    The keys of `entries` are the combination's unknown coefficients. Exponents are a sum
    of one function for each group of axes, so it is enough to ask at the origin and, for
    one group after another, at all indices along its axes.
    """
    groups = sorted({axes for entry in entries.values() for axes in entry.deviations})
    origin: dict[Axes, Combination] = {axes: {} for axes in groups}
    deviating: dict[Axes, dict[int, Combination]] = {axes: {} for axes in groups}
    for unknown, entry in entries.items():
        for axes, values in entry.deviations.items():
            for i, c in values.items():
                deviating[axes].setdefault(i, {})[unknown] = c
                if i == 0:
                    origin[axes][unknown] = c
    total = {unknown: e.total for unknown, e in entries.items() if e.total}
    yield sum_combinations([total, *origin.values()])
    for axes in groups:
        elsewhere = [total, *(c for other, c in origin.items() if other != axes)]
        indices: Sequence[Combination] = list(deviating[axes].values())
        if len(indices) < math.prod(shape[a] for a in axes):
            no_deviation: dict[int, Fraction] = {}
            indices = [no_deviation, *indices]
        for own in indices:
            yield sum_combinations([*elsewhere, own])
