"""Quadratic and linear laws of a small model, from the null space of many gradients."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from .._law import Entries, Law, Path
from .._residuals import is_conserved
from ._ansatz import Ansatz, Polynomial, every_product, joined_axes
from ._formula import path_text, write_polynomial
from ._null_space import (
    normalize_rows,
    null_space,
    orthonormal_basis,
    reduce_rows,
    to_whole_numbers,
)
from ._random_points import MAX_GRADIENT, Point, Probe
from ._vectorized import VectorizedProblem

#: The most parameters for which every product of two weights is tried.
MAX_EXHAUSTIVE = 40
#: Singular values below this, relative to the largest, are zeros.
_NULL_TOLERANCE = 1e-9
#: Conditions that are so much smaller than usual are left out.
_MIN_SIZE = 1e-4
#: Up to this size, relative to the largest, a column of conditions is rounding.
_MIN_COLUMN = 1e-12
#: A gradient of a law that is larger than this outside of those of others is a new one.
_MIN_NEW = 1e-6
#: The most terms of a formula that are written out.
_MAX_WRITTEN = 6
#: How many weights tell whether laws are independent.
_NUM_GENERIC = 3


class Found(NamedTuple):
    """What a numerical search has found.

    - `laws`: those that are not functions of known ones.
    - `is_searched`: whether there was a search, `is_exhaustive`: of all quadratic ones.
    - `has_refuted`: whether candidates failed at other points, which may hide laws that
        the null space has mixed with them.
    - `has_unreached`: whether there are weights to which no gradient came.
    """

    laws: tuple[Law, ...] = ()
    is_searched: bool = False
    is_exhaustive: bool = False
    has_refuted: bool = False
    has_unreached: bool = False


def quadratic_laws(
    problem: VectorizedProblem,
    known: Sequence[Law],
    points: Sequence[Point],
    *,
    max_exhaustive: int = MAX_EXHAUSTIVE,
) -> Found:
    """The laws wᵀAw + bᵀw that are no functions of `known` ones.

    The condition ⟨2Aw + b, ∇L(w)⟩ = 0 at more random weights and data than there are
    unknown coefficients is a linear system; what solves it is certified at `points`.
    """
    ansatz: Ansatz | None
    if problem.size <= max_exhaustive:
        ansatz = every_product(problem.size)
    else:
        leaves = jax.tree.leaves(problem.template)
        ansatz = joined_axes([leaf.shape for leaf in leaves])
    if ansatz is None:
        return Found()
    weights, gradients = problem.probe.draw_vectors(
        len(ansatz.kept) * 5 // 4 + 40, seed=21
    )
    clear = np.abs(gradients).max(axis=1, initial=0.0) < MAX_GRADIENT  # So not NaN.
    weights, gradients = weights[clear], gradients[clear]
    is_unreached = np.all(gradients == 0, axis=0)
    if np.all(is_unreached):
        return Found()
    ansatz.drop_unreached(is_unreached)
    rows = _usable(ansatz.conditions(weights, gradients))
    if len(rows) < ansatz.kept.sum():
        return Found()  # Too few usable gradients: the null space would be spurious.
    candidates = [ansatz.polynomial(x) for x in _solutions(rows)]
    generic, _ = problem.draw(_NUM_GENERIC, seed=23)
    found, refuted = _choose_new(problem, known, candidates, generic, points)
    has_unreached = is_unreached.any() and np.any(
        is_unreached & ~_unused_weights(problem.probe)
    )
    return Found(
        tuple(found), True, ansatz.is_exhaustive, refuted > 0, bool(has_unreached)
    )


def _unused_weights(probe: Probe) -> np.ndarray:
    """The weights from which no derivative flows: each of them is constant, as is known."""
    leaves = jax.tree.leaves(probe.trained)
    unused = zip(probe.find_unused(), leaves, strict=True)
    return np.concatenate([np.full(leaf.size, u) for u, leaf in unused])


def _solutions(rows: np.ndarray) -> np.ndarray:
    """What solves all equations, in whole numbers where that is possible."""
    sizes = np.linalg.norm(rows, axis=0)
    largest = sizes.max(initial=0.0)
    # A column of rounding is a law by itself, and stays small.
    sizes = np.where(sizes > _MIN_COLUMN * largest, sizes, largest)
    triangle = np.asarray(np.linalg.qr(rows / sizes, mode="r"))
    null = null_space(triangle, _NULL_TOLERANCE)
    return reduce_rows(normalize_rows(null / sizes)) if len(null) else null


def _usable(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1)
    # Where a loss saturates, what is left of a gradient is rounding.
    clear = norms > _MIN_SIZE * np.median(norms)
    return rows[clear] / norms[clear, None]


def _choose_new(problem, known, candidates, generic, points) -> tuple[list[Law], int]:
    """The candidates that are conserved, and no functions of the known laws or of others.

    And how many are not conserved. The product of two linear laws is a quadratic one, but
    says nothing new.
    """
    spans = [_span(problem.jacobian(tuple(known), w)) for w in generic]
    found: list[Law] = []
    refuted = 0
    for candidate in candidates:
        new = []
        for span, w in zip(spans, generic, strict=True):
            slope = candidate.gradient(w)
            length = np.linalg.norm(slope)
            rest = slope - span.T @ (span @ slope)
            rest = rest - span.T @ (span @ rest)
            size = np.linalg.norm(rest)
            new.append(rest / size if size > _MIN_NEW * length else None)
        if all(direction is None for direction in new):
            continue
        law = _make_law(problem, candidate, len(found) + 1)
        if not is_conserved(law, points):
            refuted += 1
        else:
            found.append(law)
            spans = [
                span if direction is None else np.vstack([span, direction])
                for span, direction in zip(spans, new, strict=True)
            ]
    return found, refuted


def _span(rows: np.ndarray) -> np.ndarray:
    return orthonormal_basis(normalize_rows(rows))


def _make_law(problem: VectorizedProblem, candidate: Polynomial, number: int) -> Law:
    coordinates = _coordinates(problem)
    i, j, quadratic, linear = candidate
    whole = to_whole_numbers(np.concatenate([quadratic, linear]))
    if whole is not None:
        quadratic, linear = whole[: len(i)], whole[len(i) :]
    shares: dict[tuple[Path, Path | None], list[tuple[int, int, float]]] = {}
    terms: list[tuple[float, str]] = []
    for k in np.flatnonzero(quadratic):
        (p, a), (q, b) = coordinates[i[k]], coordinates[j[k]]
        c = float(quadratic[k])
        shares.setdefault((p, q), []).append((a, b, c))
        terms.append((c, _product_text(_entry_text(p, a), _entry_text(q, b))))
    for k in np.flatnonzero(linear):
        p, a = coordinates[k]
        shares.setdefault((p, None), []).append((a, 0, float(linear[k])))
        terms.append((float(linear[k]), _entry_text(p, a)))
    entries = tuple(
        Entries(
            p,
            tuple(a for a, _, _ in own),
            tuple(c for _, _, c in own),
            q,
            () if q is None else tuple(b for _, b, _ in own),
        )
        for (p, q), own in shares.items()
    )
    formula = write_polynomial(terms, _MAX_WRITTEN)
    return Law(f"quadratic[{number}]", formula, "total", (), (), entries=entries)


def _coordinates(problem: VectorizedProblem) -> list[tuple[Path, int]]:
    """Which array and which of its entries each coordinate is."""
    paths, _ = jax.tree_util.tree_flatten_with_path(problem.template)
    return [(path, k) for path, leaf in paths for k in range(leaf.size)]


def _entry_text(path: Path, index: int) -> str:
    return f"{path_text(path)}.flat[{index}]"


def _product_text(first: str, second: str) -> str:
    return f"{first}²" if first == second else f"{first}·{second}"
