"""The free unknowns of a walk as rescalings of parameters, and these in families."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from ._linear_equations import Equations
from ._sparse_basis import Deviations, Generator, Share, independent, simplified
from ._tracked_array import Leaf


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
    simple = simplified([found[unknown] for unknown in sorted(found)], leaves)
    return [_normalized(g) for g in independent(simple, leaves)]


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
