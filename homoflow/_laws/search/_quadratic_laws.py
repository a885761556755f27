"""Quadratic and linear laws of a small model, from the null space of many gradients."""

import jax
import numpy as np

from .._law import Entries, Law, Path
from .._residuals import MAX_RESIDUAL, max_relative_residual
from ._formula import path_text, write_polynomial
from ._null_space import (
    normalize_rows,
    null_space,
    orthonormal_basis,
    reduce_rows,
    to_whole_numbers,
)
from ._random_points import MAX_GRADIENT, MIN_POINTS, drop_degenerate_points
from ._vectorized import VectorizedProblem

#: The most parameters for which the search is tried.
MAX_PARAMETERS = 60
#: Singular values below this, relative to the largest, are zeros.
_NULL_TOLERANCE = 1e-9
#: Conditions that are so much smaller than usual are left out.
_MIN_SIZE = 1e-4
#: The most terms of a formula that are written out.
_MAX_WRITTEN = 6
#: How many weights and data, other than those of the null space, laws are certified at,
#: and how many weights tell whether laws are independent.
_NUM_CERTIFIED, _NUM_GENERIC = 8, 3


def quadratic_laws(
    problem: VectorizedProblem, known: tuple[Law, ...]
) -> tuple[Law, ...]:
    """The laws wᵀAw + bᵀw that are no functions of `known` ones.

    The condition ⟨2Aw + b, ∇L(w)⟩ = 0 at more random weights and data than A and b have
    entries is a linear system; what solves it is certified at others.
    """
    if problem.size > MAX_PARAMETERS:
        return ()
    n = problem.size
    unknowns = n * (n + 1) // 2 + n
    weights, data = problem.draw(_NUM_CERTIFIED + unknowns * 4 // 3 + 40, seed=21)
    gradients = problem.gradients(weights, data)
    rows = _conditions(weights[_NUM_CERTIFIED:], gradients[_NUM_CERTIFIED:])
    if len(rows) < unknowns:
        return ()  # Too few usable gradients: the null space would be spurious.
    triangle = np.asarray(np.linalg.qr(rows, mode="r"))
    null = null_space(triangle, _NULL_TOLERANCE)
    if not len(null):
        return ()
    points = drop_degenerate_points(
        [
            (problem.unflatten(w), problem.unflatten(g))
            for w, g in zip(
                weights[:_NUM_CERTIFIED], gradients[:_NUM_CERTIFIED], strict=True
            )
        ]
    )
    if len(points) < MIN_POINTS:
        return ()
    generic = weights[:_NUM_GENERIC]
    spans = [_span(problem.jacobian(known, w)) for w in generic]
    found: list[Law] = []
    for candidate in reduce_rows(null):
        larger = [
            _span(np.vstack([span, _law_gradient(candidate, w)]))
            for span, w in zip(spans, generic, strict=True)
        ]
        # The product of two linear laws is a quadratic one, but says nothing new.
        if max(map(len, larger)) > max(map(len, spans)):
            law = _make_law(problem, candidate, len(found) + 1)
            if max_relative_residual(law, points) <= MAX_RESIDUAL:
                found.append(law)
                spans = larger
    return tuple(found)


def _span(rows: np.ndarray) -> np.ndarray:
    return orthonormal_basis(normalize_rows(rows))


def _law_gradient(candidate: np.ndarray, w: np.ndarray) -> np.ndarray:
    """2Aw + b."""
    n = len(w)
    i, j = np.triu_indices(n)
    matrix = np.zeros((n, n))
    matrix[i, j] = matrix[j, i] = candidate[: len(i)]
    return 2 * matrix @ w + candidate[len(i) :]


def _conditions(weights: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """The equations ⟨2Aw + b, g⟩ = 0, one in each row, for the entries of A and b."""
    n = weights.shape[1]
    usable = np.abs(gradients).max(axis=1) < MAX_GRADIENT  # And so not NaN.
    weights, gradients = weights[usable], gradients[usable]
    i, j = np.triu_indices(n)
    quadratic = weights[:, i] * gradients[:, j] + weights[:, j] * gradients[:, i]
    quadratic[:, i == j] /= 2
    rows = np.concatenate([2 * quadratic, gradients], axis=1)
    norms = np.linalg.norm(rows, axis=1)
    # Where a loss saturates, what is left of a gradient is rounding.
    clear = norms > _MIN_SIZE * np.median(norms)
    return rows[clear] / norms[clear, None]


def _make_law(problem: VectorizedProblem, candidate: np.ndarray, number: int) -> Law:
    coordinates = _coordinates(problem)
    whole = to_whole_numbers(candidate)
    candidate = candidate if whole is None else whole
    i, j = np.triu_indices(problem.size)
    quadratic, linear = candidate[: len(i)], candidate[len(i) :]
    shares: dict[tuple[Path, Path | None], list[tuple[int, int, float]]] = {}
    terms: list[tuple[float, str]] = []
    for k in np.flatnonzero(quadratic):
        (p, a), (q, b) = coordinates[i[k]], coordinates[j[k]]
        c = float(quadratic[k]) * (1 if i[k] == j[k] else 2)
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
