"""Linear laws: sums of weights that no gradient changes.

A loss that does not see a constant added to all outputs (softmax), or a layer that
subtracts a mean, leaves sums over an axis of the arrays before it alone.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from .._law import Law, leaf_at
from .._residuals import LIMIT, violation
from ..symmetry import Leaf, Portion
from ._candidates import path_text, signed_sum, term_of
from ._random_points import Point

#: How much smaller than the largest gradient one has to be to count as zero.
_FLAT = 1e-13
#: The most sums of one shape among which relations are looked for, and of their entries.
_MOST_SUMS, _MOST_ENTRIES = 64, 20_000
_LARGEST_COEFFICIENT = 16

Sum = tuple[int, tuple[int, ...]]


def linear_laws(leaves: Sequence[Leaf], points: Sequence[Point]) -> list[Law]:
    """Σ over some axes of an array, or of several arrays together, that are conserved.

    Only what holds at every index of the other axes counts, so that no unit that happens
    to be dead makes a law.
    """
    gradients = [[leaf_at(g, leaf.path) for leaf in leaves] for _, g in points]
    if not gradients:
        return []
    alone = list(_vanishing(leaves, gradients))
    laws = [_law(leaves, [(1, s)]) for s in alone]
    joint = (_law(leaves, r) for r in _relations(leaves, gradients, alone))
    return laws + [law for law in joint if violation(law, points) <= LIMIT]


def _vanishing(leaves, gradients) -> Iterator[Sum]:
    largest = [max(np.abs(g).max(initial=0.0) for g in point) for point in gradients]
    for k, leaf in enumerate(leaves):
        found: list[set[int]] = []
        for axes in _subsets(leaf.shape):
            if any(f <= set(axes) for f in found):
                continue
            if all(
                _is_zero(point[k], axes, top)
                for point, top in zip(gradients, largest, strict=True)
            ):
                found.append(set(axes))
                yield k, axes


def _is_zero(gradient: np.ndarray, axes: tuple[int, ...], largest: float) -> bool:
    if not axes:
        return bool(np.abs(gradient).max(initial=0.0) <= _FLAT * largest)
    total = np.abs(gradient.sum(axis=axes)).max(initial=0.0)
    return bool(total <= LIMIT * np.abs(gradient).sum(axis=axes).max(initial=0.0))


def _relations(leaves, gradients, alone: list[Sum]) -> Iterator[list[tuple[int, Sum]]]:
    """Sums of different arrays that cancel each other."""
    shapes: dict[tuple[int, ...], list[Sum]] = {}
    for k, leaf in enumerate(leaves):
        done = [set(axes) for j, axes in alone if j == k]
        for axes in _subsets(leaf.shape):
            if not any(d <= set(axes) for d in done):
                rest = tuple(n for a, n in enumerate(leaf.shape) if a not in axes)
                shapes.setdefault(rest, []).append((k, axes))
    seen: list[list[Sum]] = []
    for _, sums in sorted(shapes.items(), key=lambda item: -math.prod(item[0])):
        if len({k for k, _ in sums}) < 2 or len(sums) > _MOST_SUMS:
            continue
        for relation in _null_relations(sums, gradients):
            members = [s for _, s in relation]
            if not any(_implies(s, members) for s in seen):
                seen.append(members)
                yield relation


def _null_relations(sums: list[Sum], gradients) -> list[list[tuple[int, Sum]]]:
    columns = np.stack([_column(gradients, s) for s in sums], axis=1)
    if len(columns) < 2 * len(sums):
        return []
    norms = np.linalg.norm(columns, axis=0)
    if not norms.all():
        return []
    _, values, directions = np.linalg.svd(columns / norms, full_matrices=False)
    null = directions[values <= LIMIT * values[0]] / norms
    relations = []
    for row in _row_reduced(null):
        whole = _whole_numbers(row)
        if whole is not None:
            relations.append([(c, s) for c, s in zip(whole, sums, strict=True) if c])
    return [r for r in relations if len(r) > 1]


def _column(gradients, which: Sum) -> np.ndarray:
    k, axes = which
    parts = []
    for point in gradients:
        total = point[k].sum(axis=axes).reshape(-1)
        step = max(1, len(total) * len(gradients) // _MOST_ENTRIES)
        parts.append(total[::step])
    return np.concatenate(parts)


def _row_reduced(rows: np.ndarray) -> np.ndarray:
    rows = rows.copy()
    for i in range(len(rows)):
        pivot = int(np.argmax(np.abs(rows[i])))
        rows[i] /= rows[i, pivot]
        for j in range(len(rows)):
            if j != i:
                rows[j] -= rows[j, pivot] * rows[i]
    return rows


def _whole_numbers(row: np.ndarray) -> list[int] | None:
    row = np.where(np.abs(row) < 1e-9, 0, row)
    for factor in range(1, _LARGEST_COEFFICIENT + 1):
        scaled = row * factor
        if np.abs(scaled - np.round(scaled)).max() < 1e-8:
            first = next(c for c in np.round(scaled) if c)
            return [int(np.sign(first) * c) for c in np.round(scaled)]
    return None


def _implies(known: list[Sum], members: list[Sum]) -> bool:
    """Whether a relation is a known one, summed over more axes."""
    coarser = dict(members)
    return {k for k, _ in known} == set(coarser) and all(
        set(axes) <= set(coarser[k]) for k, axes in known
    )


def _subsets(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    axes = [a for a, n in enumerate(shape) if n > 1]
    for size in range(len(axes) + 1):
        yield from itertools.combinations(axes, size)


def _law(leaves: Sequence[Leaf], relation: list[tuple[int, Sum]]) -> Law:
    terms, texts, formulas = [], [], []
    for coefficient, (k, axes) in relation:
        leaf = leaves[k]
        rest = tuple(a for a, n in enumerate(leaf.shape) if a not in axes and n > 1)
        count = math.prod(leaf.shape[a] for a in rest)
        index = np.arange(count)[:, None]
        terms.append(term_of(Portion(k, coefficient, rest, index), leaf, count))
        texts.append(_text(path_text(leaf.path), leaf.shape, axes))
        formulas.append(_tex(path_text(leaf.path), leaf.shape, axes))
    coefficients = [c for c, _ in relation]
    _, (k, axes) = relation[0]
    kind = "sums" if axes else "entries"
    single = all(
        math.prod(_rest(leaves[k].shape, axes)) == 1 for _, (k, axes) in relation
    )
    paths = ", ".join(path_text(leaves[k].path) for _, (k, _) in relation)
    return Law(
        f"{kind}[{paths}]",
        signed_sum(coefficients, texts),
        "total" if single else "units",
        (),
        tuple(terms),
        tex=signed_sum(coefficients, formulas).replace("−", "-"),
    )


def _rest(shape: Sequence[int], axes: Sequence[int]) -> list[int]:
    return [n for a, n in enumerate(shape) if a not in axes]


def _letters(shape: Sequence[int], axes: Sequence[int]) -> tuple[list[str], str]:
    summed, free = iter("iklmnpqr"), iter("juvwxyzst")
    spots = [next(summed) if a in axes else next(free) for a in range(len(shape))]
    return spots, "".join(s for a, s in enumerate(spots) if a in axes)


def _text(path: str, shape: Sequence[int], axes: Sequence[int]) -> str:
    spots, over = _letters(shape, axes)
    entry = f"{path}[{', '.join(spots)}]" if spots else path
    return f"Σ_{over} {entry}" if over else entry


def _tex(path: str, shape: Sequence[int], axes: Sequence[int]) -> str:
    spots, over = _letters(shape, axes)
    name = rf"\mathtt{{{path}}}".replace("_", r"\_")
    entry = f"{name}[{', '.join(spots)}]" if spots else name
    return rf"\sum_{{{over}}} {entry}" if over else entry
