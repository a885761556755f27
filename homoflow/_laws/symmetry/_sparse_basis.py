"""A basis of rescalings that is easy to read: each of as few weights as possible."""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np

from ._linear_equations import Equations
from ._tracked_array import Leaf

#: Per leaf: the weight of the whole array, and by axes the entries that differ from it.
Deviations = dict[int, Fraction]
Share = tuple[Fraction, dict[tuple[int, ...], Deviations]]
Generator = dict[int, Share]

#: The most generators that rescale whole arrays among which simpler ones are looked for.
_MOST_COMMON = 60
#: The most entries of parameters that are written out to see how simple a generator is.
_LARGEST_WRITTEN_OUT = 10_000


def simplified(found: list[Generator], leaves: Sequence[Leaf]) -> list[Generator]:
    """The same span, with fewer generators that rescale whole arrays.

    An equation between units is written with the first unit as the reference, which then
    carries what is common to all.
    """
    common = [i for i, g in enumerate(found) if _totals(g)]
    if len(common) > _MOST_COMMON:
        return found
    found, improves = list(found), True
    while improves:
        improves = False
        for i in common:
            for j in common:
                better = _reduced(found[i], found[j], leaves) if i != j else None
                if better is not None:
                    found[i], improves = better, True
    return found


def _reduced(
    generator: Generator, other: Generator, leaves: Sequence[Leaf]
) -> Generator | None:
    """The generator plus a multiple of the other, if that is simpler."""
    factors = set()
    for k in generator.keys() & other.keys():
        own, its = _values(generator[k]), _values(other[k])
        factors |= {-a / b for a in own for b in its if a and b}
    candidates = [_plus(generator, other, f, leaves) for f in sorted(factors)]
    best = min(candidates, key=lambda g: _cost(g, leaves), default=generator)
    return best if _cost(best, leaves) < _cost(generator, leaves) else None


def _values(share: Share) -> set[Fraction]:
    """Weights that occur in an array."""
    total, others = share
    return {total}.union(*({total + c for c in d.values()} for d in others.values()))


def _totals(generator: Generator) -> dict[int, Fraction]:
    return {k: total for k, (total, _) in generator.items() if total}


def _cost(generator: Generator, leaves: Sequence[Leaf]) -> tuple[float, int]:
    """How much there is to rescale, and how much to write."""
    entries = sum(len(d) for _, o in generator.values() for d in o.values())
    written = len(_totals(generator)) + entries
    if sum(math.prod(leaves[k].shape) for k in generator) > _LARGEST_WRITTEN_OUT:
        return float(len(_totals(generator))), written
    return sum(_weight(g, leaves[k].shape) for k, g in generator.items()), written


def _weight(share: Share, shape: Sequence[int]) -> float:
    """Σ|weight| over the entries of an array."""
    total, others = share
    full = np.full(shape, float(total))
    for axes, deviations in others.items():
        part = np.zeros([shape[a] for a in axes])
        part.reshape(-1)[list(deviations)] = [float(c) for c in deviations.values()]
        full = full + part.reshape([n if a in axes else 1 for a, n in enumerate(shape)])
    return float(np.abs(full).sum())


def _plus(
    generator: Generator, other: Generator, factor: Fraction, leaves: Sequence[Leaf]
) -> Generator:
    result: Generator = {}
    for k in sorted(generator.keys() | other.keys()):
        total, own = generator.get(k, (Fraction(0), {}))
        more, its = other.get(k, (Fraction(0), {}))
        deviations = {}
        for axes in own.keys() | its.keys():
            mine, theirs = own.get(axes, {}), its.get(axes, {})
            values = {
                i: mine.get(i, Fraction(0)) + factor * theirs.get(i, Fraction(0))
                for i in mine.keys() | theirs.keys()
            }
            if values := {i: c for i, c in values.items() if c}:
                deviations[axes] = values
        share = _shortest(total + factor * more, deviations, leaves[k].shape)
        if share[0] or share[1]:
            result[k] = share
    return result


def _shortest(
    total: Fraction, deviations: dict[tuple[int, ...], Deviations], shape: Sequence[int]
) -> Share:
    """The same weights, counted from another value where that takes fewer entries."""
    for axes, values in list(deviations.items()):
        if total:
            size = math.prod(shape[a] for a in axes)
            rest = {i: values.get(i, Fraction(0)) + total for i in range(size)}
            rest = {i: c for i, c in rest.items() if c}
            if len(rest) <= len(values):
                total = Fraction(0)
                deviations = deviations | {axes: rest}
    return total, {axes: values for axes, values in deviations.items() if values}


def independent(found: list[Generator], leaves: Sequence[Leaf]) -> list[Generator]:
    """Without generators that are combinations of simpler ones.

    Where two parameters meet in a product, what one gives along the contracted axis the
    other takes, and a combination of the unknowns may rescale nothing at all.
    """
    by_cost = sorted(range(len(found)), key=lambda i: _cost(found[i], leaves))
    equations = Equations()
    unknowns = equations.unknowns((len(found),)).tolist()
    unknown_of = dict(zip(reversed(by_cost), unknowns, strict=True))
    for k, leaf in enumerate(leaves):
        shares = {unknown_of[i]: g[k] for i, g in enumerate(found) if k in g}
        for row in _at_each_place(shares, leaf.shape):
            equations.demand(row)
    free = {u for u in unknowns if equations.is_free(u)}
    return [g for i, g in enumerate(found) if unknown_of[i] not in free]


def _at_each_place(
    shares: dict[int, Share], shape: Sequence[int]
) -> Iterator[dict[int, Fraction]]:
    """Weights, by generator, at places that determine all of an array's weights."""
    groups = sorted({axes for _, others in shares.values() for axes in others})
    origin: dict[tuple[int, ...], dict[int, Fraction]] = {axes: {} for axes in groups}
    entries: dict[tuple[int, ...], dict[int, dict[int, Fraction]]] = {
        axes: {} for axes in groups
    }
    for g, (_, others) in shares.items():
        for axes, deviations in others.items():
            for i, c in deviations.items():
                entries[axes].setdefault(i, {})[g] = c
                if i == 0:
                    origin[axes][g] = c
    total = {g: t for g, (t, _) in shares.items() if t}
    yield _summed([total, *origin.values()])
    for axes in groups:
        elsewhere = [total, *(o for other, o in origin.items() if other != axes)]
        size = math.prod(shape[a] for a in axes)
        places = (
            entries[axes] if len(entries[axes]) == size else {-1: {}, **entries[axes]}
        )
        for own in places.values():
            yield _summed([*elsewhere, own])


def _summed(parts: Sequence[dict[int, Fraction]]) -> dict[int, Fraction]:
    result: dict[int, Fraction] = {}
    for part in parts:
        for g, c in part.items():
            result[g] = result.get(g, Fraction(0)) + c
    return {g: c for g, c in result.items() if c}
