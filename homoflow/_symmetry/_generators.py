"""The free unknowns of a walk as rescalings of parameters, and these in families."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from ._equations import Equations
from ._tracked import Leaf

#: The most generators that rescale whole arrays among which simpler ones are looked for.
_MOST_COMMON = 60
#: The most entries of parameters that are written out to see how simple a generator is.
_LARGEST_WRITTEN_OUT = 10_000
#: Per leaf: the weight of the whole array, and by axes the entries that differ from it.
Deviations = dict[int, Fraction]
Share = tuple[Fraction, dict[tuple[int, ...], Deviations]]
Generator = dict[int, Share]


@dataclasses.dataclass(frozen=True)
class Portion:
    """What units own of an array.

    - `leaf`: which of the arrays.
    - `weight`: how much it is rescaled, relative to the other portions.
    - `axes`: the axes along which units are told apart; none if each owns everything.
    - `index`: units × the (flat) indices along these axes that each of them owns.
    """

    leaf: int
    weight: int
    axes: tuple[int, ...]
    index: np.ndarray


@dataclasses.dataclass(frozen=True)
class Family:
    """Units that are rescaled in the same way, each independently of the others."""

    units: int
    portions: tuple[Portion, ...]


def families(leaves: Sequence[Leaf], equations: Equations) -> list[Family]:
    """Every rescaling that the equations leave free, as families of like units."""
    found = generators(leaves, equations)
    groups: dict[tuple, list[Generator]] = {}
    for generator in found:
        groups.setdefault(_signature(generator), []).append(generator)
    result = []
    for members in groups.values():
        if _overlap(members):
            result += [_family([g], leaves) for g in members]
        else:
            result.append(_family(members, leaves))
    return result


def generators(leaves: Sequence[Leaf], equations: Equations) -> list[Generator]:
    """One rescaling for each free unknown that any parameter depends on."""
    found: dict[int, Generator] = {}
    for k, leaf in enumerate(leaves):
        for unknown, share in _shares(leaf, equations).items():
            found.setdefault(unknown, {})[k] = share
    simple = _simplified([found[unknown] for unknown in sorted(found)], leaves)
    return [_normalized(g) for g in simple]


def _simplified(found: list[Generator], leaves: Sequence[Leaf]) -> list[Generator]:
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
        return len(_totals(generator)), written
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


def _shares(leaf: Leaf, equations: Equations) -> dict[int, Share]:
    by_axes: dict[tuple[int, ...], dict[int, Deviations]] = {}
    for part in leaf.scale or ():
        entries = by_axes.setdefault(part.axes, {})
        for i, unknown in enumerate(part.ids.reshape(-1).tolist()):
            for free, c in equations.resolve(unknown).items():
                own = entries.setdefault(free, {})
                own[i] = own.get(i, Fraction(0)) + c * part.factor
    shares: dict[int, Share] = {}
    for axes, entries in by_axes.items():
        size = math.prod(leaf.shape[a] for a in axes)
        for free, values in entries.items():
            base, deviations = _from_usual(values, size)
            total, others = shares.get(free, (Fraction(0), {}))
            if deviations:
                others[axes] = deviations
            shares[free] = (total + base, others)
    return {f: s for f, s in shares.items() if s[0] or s[1]}


def _from_usual(values: Deviations, size: int) -> tuple[Fraction, Deviations]:
    """The most common value, and the entries that differ from it."""
    values = {i: c for i, c in values.items() if c}
    if not values:
        return Fraction(0), {}
    ((usual, count),) = Counter(values.values()).most_common(1)
    if count <= size - len(values):
        return Fraction(0), values
    rest = {i: values.get(i, Fraction(0)) - usual for i in range(size)}
    return usual, {i: c for i, c in rest.items() if c}


def _normalized(generator: Generator) -> Generator:
    """In whole numbers without a common divisor, the first array's being positive."""
    values = [
        c for total, others in generator.values()
        for c in (total, *(v for d in others.values() for v in d.values())) if c
    ]  # fmt: skip
    scale = Fraction(
        math.lcm(*(c.denominator for c in values)),
        math.gcd(*(c.numerator * math.lcm(*(v.denominator for v in values))
                   // c.denominator for c in values)),
    )  # fmt: skip
    if values[0] < 0:
        scale = -scale
    return {
        k: (
            total * scale,
            {a: {i: c * scale for i, c in d.items()} for a, d in o.items()},
        )
        for k, (total, o) in generator.items()
    }


def _signature(generator: Generator) -> tuple:
    return tuple(
        (k, total, tuple((a, tuple(sorted(Counter(d.values()).items())))
                         for a, d in sorted(others.items())))
        for k, (total, others) in sorted(generator.items())
    )  # fmt: skip


def _overlap(members: Sequence[Generator]) -> bool:
    """Whether two generators deviate at the same entry."""
    seen: set[tuple] = set()
    for generator in members:
        for k, (_, others) in generator.items():
            own = {(k, axes, i) for axes, d in others.items() for i in d}
            if own & seen:
                return True
            seen |= own
    return False


def _family(members: Sequence[Generator], leaves: Sequence[Leaf]) -> Family:
    portions = []
    for k, (total, others) in sorted(members[0].items()):
        if total:
            everything = np.zeros((len(members), 1), np.int64)
            portions.append(Portion(k, int(total), (), everything))
        for axes, deviations in others.items():
            for weight in sorted(set(deviations.values()), reverse=True):
                index = [
                    [i for i, c in sorted(g[k][1][axes].items()) if c == weight]
                    for g in members
                ]
                portion = Portion(k, int(weight), axes, np.asarray(index, np.int64))
                portions.append(_narrowed(portion, leaves[k].shape))
    return Family(len(members), tuple(portions))


def _narrowed(portion: Portion, shape: Sequence[int]) -> Portion:
    """The portion along one axis, if units own all there is along the others."""
    if len(portion.axes) < 2:
        return portion
    sizes = [shape[a] for a in portion.axes]
    places = np.stack(np.unravel_index(portion.index, sizes))
    for axis, spots, size in zip(portion.axes, places, sizes, strict=True):
        index = np.stack([np.unique(row) for row in spots]) if _alike(spots) else None
        if index is not None and index.shape[1] * math.prod(sizes) == (
            portion.index.shape[1] * size
        ):
            return Portion(portion.leaf, portion.weight, (axis,), index)
    return portion


def _alike(rows: np.ndarray) -> bool:
    """Whether all rows hold the same number of different values."""
    return len({len(np.unique(row)) for row in rows}) == 1


def dimension(found: Iterable[Family]) -> int:
    """How many independent rescalings there are."""
    return sum(f.units for f in found)
