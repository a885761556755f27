"""Linear laws: sums of weights that no gradient changes.

A loss that does not see a constant added to all outputs (softmax), or a layer that
subtracts a mean, leaves sums over an axis of the arrays before it alone.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .._law import Law, leaf_at
from .._residuals import (
    MAX_RESIDUAL,
    Evidence,
    is_conserved,
    shows_conservation,
)
from ..symmetry import Leaf, OrbitBlock
from ._candidates import make_term
from ._formula import Formula, SumOverAxes, path_text
from ._null_space import null_space, reduce_rows, to_whole_numbers
from ._random_points import Point

#: How much smaller than the largest gradient one has to be to count as zero.
_ZERO_TOLERANCE = 1e-13
#: The most sums of one shape among which relations are looked for, and of their entries.
_MAX_SUMS, _MAX_ENTRIES = 64, 20_000


class AxisSum(NamedTuple):
    """The sum of an array (by its number among the leaves) over some axes."""

    leaf: int
    axes: tuple[int, ...]


#: Σ coefficient · sum = 0.
Relation = list[tuple[int, AxisSum]]


def linear_laws(
    leaves: Sequence[Leaf],
    points: Sequence[Point],
    is_untouched: Callable[[Leaf], bool],
) -> list[Law]:
    """Σ over some axes of an array, or of several arrays together, that are conserved.

    Only what holds at every index of the other axes counts, so that no unit that happens
    to be dead makes a law. Where a gradient was 0 at every point it may be that the points
    have missed what reaches it: it counts only if `is_untouched` knows that nothing does.
    """
    gradients = [
        _relative([leaf_at(g, leaf.path) for leaf in leaves]) for _, g in points
    ]
    if not gradients:
        return []
    vanishing = list(_vanishing_sums(leaves, gradients, is_untouched))
    laws = [_make_law(leaves, [(1, s)]) for s in vanishing]
    relations = _relations(leaves, gradients, vanishing)
    joint = [_make_law(leaves, relation) for relation in relations]
    return laws + [law for law in joint if is_conserved(law, points)]


def _relative(gradients: list[np.ndarray]) -> list[np.ndarray]:
    """The gradients of one point, relative to the largest entry of all."""
    largest = max(np.abs(g).max(initial=0.0) for g in gradients)
    return [g / (largest or 1.0) for g in gradients]


def _vanishing_sums(leaves, gradients, is_untouched) -> Iterator[AxisSum]:
    """The sums over as few axes as possible that are 0 of every gradient."""
    for k, leaf in enumerate(leaves):
        found: list[set[int]] = []
        for axes in _subsets_of_axes(leaf.shape):
            if any(f <= set(axes) for f in found):
                continue
            own = [point[k] for point in gradients]
            if _vanish(own, axes, lambda leaf=leaf: is_untouched(leaf)):
                found.append(set(axes))
                yield AxisSum(k, axes)


def _vanish(
    gradients: list[np.ndarray], axes: tuple[int, ...], is_untouched: Callable[[], bool]
) -> bool:
    """Whether the sums over these axes are 0; of single entries if there are no axes."""
    sizes = [np.abs(g) for g in gradients]
    if not axes:
        if max(size.max(initial=0.0) for size in sizes) > _ZERO_TOLERANCE:
            return False
        return any(size.any() for size in sizes) or is_untouched()
    count = math.prod(gradients[0].shape[a] for a in axes)
    return shows_conservation(
        [
            Evidence(
                float(np.abs(g.sum(axis=axes)).max(initial=0.0)),
                float(size.sum(axis=axes).max(initial=0.0)),
                float(count),
            )
            for g, size in zip(gradients, sizes, strict=True)
        ]
    )


def _relations(leaves, gradients, vanishing: list[AxisSum]) -> Iterator[Relation]:
    """Sums of different arrays that cancel each other."""
    by_shape: dict[tuple[int, ...], list[AxisSum]] = {}
    for k, leaf in enumerate(leaves):
        known = [set(s.axes) for s in vanishing if s.leaf == k]
        for axes in _subsets_of_axes(leaf.shape):
            if not any(f <= set(axes) for f in known):
                shape = tuple(n for a, n in enumerate(leaf.shape) if a not in axes)
                by_shape.setdefault(shape, []).append(AxisSum(k, axes))
    seen: list[list[AxisSum]] = []
    for _, sums in sorted(by_shape.items(), key=lambda item: -math.prod(item[0])):
        if len({s.leaf for s in sums}) < 2 or len(sums) > _MAX_SUMS:
            continue
        for relation in _null_relations(sums, gradients):
            members = [s for _, s in relation]
            if not any(_implies(known, members) for known in seen):
                seen.append(members)
                yield relation


def _null_relations(sums: list[AxisSum], gradients) -> list[Relation]:
    columns = np.stack([_column(gradients, s) for s in sums], axis=1)
    if len(columns) < 2 * len(sums):
        return []
    norms = np.linalg.norm(columns, axis=0)
    if not norms.all():
        return []
    relations: list[Relation] = []
    for row in reduce_rows(null_space(columns / norms, MAX_RESIDUAL) / norms):
        coefficients = to_whole_numbers(row)
        if coefficients is not None and np.count_nonzero(coefficients) > 1:
            sign = np.sign(coefficients[np.flatnonzero(coefficients)[0]])
            signed = (sign * coefficients).astype(int).tolist()
            pairs = zip(signed, sums, strict=True)
            relations.append([(c, s) for c, s in pairs if c])
    return relations


def _column(gradients, axis_sum: AxisSum) -> np.ndarray:
    """A sum of every gradient, or a sample of its entries if there are many."""
    sums = []
    for point in gradients:
        total = point[axis_sum.leaf].sum(axis=axis_sum.axes).reshape(-1)
        step = max(1, len(total) * len(gradients) // _MAX_ENTRIES)
        sums.append(total[::step])
    return np.concatenate(sums)


def _implies(known: list[AxisSum], members: list[AxisSum]) -> bool:
    """Whether a relation is a known one, summed over more axes."""
    coarser = dict(members)
    return {s.leaf for s in known} == set(coarser) and all(
        set(s.axes) <= set(coarser[s.leaf]) for s in known
    )


def _subsets_of_axes(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    axes = [a for a, n in enumerate(shape) if n > 1]
    for size in range(len(axes) + 1):
        yield from itertools.combinations(axes, size)


def _make_law(leaves: Sequence[Leaf], relation: Relation) -> Law:
    terms, expressions, counts = [], [], []
    for coefficient, (k, axes) in relation:
        leaf = leaves[k]
        others = tuple(a for a, n in enumerate(leaf.shape) if a not in axes and n > 1)
        count = math.prod(leaf.shape[a] for a in others)
        block = OrbitBlock(k, coefficient, others, np.arange(count)[:, None])
        terms.append(make_term(block, leaf, count))
        expressions.append((coefficient, SumOverAxes(leaf.path, len(leaf.shape), axes)))
        counts.append(count)
    kind = "sums" if relation[0][1].axes else "entries"
    paths = ", ".join(path_text(leaves[s.leaf].path) for _, s in relation)
    formula = Formula(tuple(expressions))
    return Law(
        f"{kind}[{paths}]",
        formula.text(),
        "total" if all(count == 1 for count in counts) else "units",
        (),
        tuple(terms),
        tex=formula.tex(),
    )
