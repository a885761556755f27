"""Free unknowns of the scaling equations as rescalings of parameters, in families."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from ._linear_equations import LinearEquations
from ._scaling_vector import Axes, Deviations, ScalingEntry, ScalingVector
from ._sparse_basis import drop_dependent, make_sparse
from ._tracked_array import Leaf


@dataclasses.dataclass(frozen=True)
class OrbitBlock:
    """What units own of an array.

    - `leaf`: which of the arrays.
    - `weight`: how much it is rescaled, relative to the other blocks.
    - `axes`: the axes along which units are told apart; none if each owns everything.
    - `index`: units × the (flat) indices along these axes that each of them owns.
    """

    leaf: int
    weight: int
    axes: Axes
    index: np.ndarray


@dataclasses.dataclass(frozen=True)
class ScalingFamily:
    """Units that are rescaled in the same way, each independently of the others."""

    units: int
    blocks: tuple[OrbitBlock, ...]


def find_families(
    leaves: Sequence[Leaf], equations: LinearEquations
) -> list[ScalingFamily]:
    """Every rescaling that the equations leave free, as families of like units."""
    groups: dict[tuple, list[ScalingVector]] = {}
    for vector in find_generators(leaves, equations):
        groups.setdefault(_signature(vector), []).append(vector)
    families = []
    for members in groups.values():
        if _have_common_entry(members):
            families += [_make_family([vector]) for vector in members]
        else:
            families.append(_make_family(members))
    return families


def find_generators(
    leaves: Sequence[Leaf], equations: LinearEquations
) -> list[ScalingVector]:
    """One rescaling for each free unknown that any parameter depends on."""
    shapes = [leaf.shape for leaf in leaves]
    entries: dict[int, dict[int, ScalingEntry]] = {}
    for k, leaf in enumerate(leaves):
        for unknown, entry in _entries_of_leaf(leaf, equations).items():
            entries.setdefault(unknown, {})[k] = entry
    vectors = [ScalingVector(entries[unknown], shapes) for unknown in sorted(entries)]
    return [v.in_lowest_terms() for v in drop_dependent(make_sparse(vectors))]


def _entries_of_leaf(leaf: Leaf, equations: LinearEquations) -> dict[int, ScalingEntry]:
    """The leaf's log-scale where one free unknown is 1 and all others are 0."""
    by_axes: dict[Axes, dict[int, Deviations]] = {}
    for component in leaf.scale or ():
        exponents = by_axes.setdefault(component.axes, {})
        for i, unknown in enumerate(component.ids.reshape(-1).tolist()):
            for free, c in equations.resolve(unknown).items():
                own = exponents.setdefault(free, {})
                own[i] = own.get(i, Fraction(0)) + c * component.factor
    totals: dict[int, Fraction] = {}
    deviations: dict[int, dict[Axes, Deviations]] = {}
    for axes, exponents in by_axes.items():
        size = math.prod(leaf.shape[a] for a in axes)
        for free, values in exponents.items():
            usual, others = _split_off_usual(values, size)
            totals[free] = totals.get(free, Fraction(0)) + usual
            if others:
                deviations.setdefault(free, {})[axes] = others
    entries = {
        free: ScalingEntry(total, deviations.get(free, {}))
        for free, total in totals.items()
    }
    return {free: entry for free, entry in entries.items() if entry}


def _split_off_usual(values: Deviations, size: int) -> tuple[Fraction, Deviations]:
    """The most common of `size` values, and the entries that differ from it."""
    values = {i: c for i, c in values.items() if c}
    if not values:
        return Fraction(0), {}
    ((usual, count),) = Counter(values.values()).most_common(1)
    if count <= size - len(values):
        return Fraction(0), values
    differences = {i: values.get(i, Fraction(0)) - usual for i in range(size)}
    return usual, {i: c for i, c in differences.items() if c}


def _signature(vector: ScalingVector) -> tuple:
    """What units of one family have in common: the exponents, but not their places."""
    return tuple(
        (k, entry.total, tuple(_histograms(entry)))
        for k, entry in sorted(vector.entries.items())
    )


def _histograms(entry: ScalingEntry) -> list[tuple]:
    """How often each deviation occurs along each group of axes."""
    return [
        (axes, tuple(sorted(Counter(values.values()).items())))
        for axes, values in sorted(entry.deviations.items())
    ]


def _have_common_entry(members: Sequence[ScalingVector]) -> bool:
    """Whether two vectors deviate at the same entry."""
    seen: set[tuple[int, Axes, int]] = set()
    for vector in members:
        for k, entry in vector.entries.items():
            own = {(k, axes, i) for axes, d in entry.deviations.items() for i in d}
            if own & seen:
                return True
            seen |= own
    return False


def _make_family(members: Sequence[ScalingVector]) -> ScalingFamily:
    blocks = []
    for k, entry in sorted(members[0].entries.items()):
        if entry.total:
            everything = np.zeros((len(members), 1), np.int64)
            blocks.append(OrbitBlock(k, int(entry.total), (), everything))
        for axes, deviations in entry.deviations.items():
            own = [sorted(v.entries[k].deviations[axes].items()) for v in members]
            for weight in sorted(set(deviations.values()), reverse=True):
                index = [[i for i, c in items if c == weight] for items in own]
                block = OrbitBlock(k, int(weight), axes, np.asarray(index, np.int64))
                blocks.append(_narrow(block, members[0].shapes[k]))
    return ScalingFamily(len(members), tuple(blocks))


def _narrow(block: OrbitBlock, shape: Sequence[int]) -> OrbitBlock:
    """The block along one axis, if units own all there is along the others."""
    if len(block.axes) < 2:
        return block
    sizes = [shape[a] for a in block.axes]
    coordinates = np.stack(np.unravel_index(block.index, sizes))
    for axis, along, size in zip(block.axes, coordinates, sizes, strict=True):
        distinct = [np.unique(row) for row in along]
        if len({len(row) for row in distinct}) != 1:
            continue
        index = np.stack(distinct)
        owned, full = block.index.shape[1], math.prod(sizes) // size
        if owned == index.shape[1] * full:
            return OrbitBlock(block.leaf, block.weight, (axis,), index)
    return block
