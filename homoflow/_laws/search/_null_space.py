"""Quadratic and linear laws of a small model, from the null space of many gradients."""

import math

import jax
import numpy as np

from .._law import Entries, Law
from .._residuals import LIMIT, violation
from ._candidates import path_text
from ._random_points import FEWEST_POINTS, LARGEST_GRADIENT, clear_points
from ._vectorized import FlatProblem

#: The most parameters for which the search is tried.
MOST_PARAMETERS = 60
#: Singular values below this, relative to the largest, are zeros.
_NULL = 1e-9
_FAINT = 1e-4
_SMALLEST, _LARGEST_DENOMINATOR = 1e-7, 12
_MOST_WRITTEN = 6
#: How many weights and data, other than those of the null space, laws are certified at.
_CERTIFIED = 8


def quadratic_laws(problem: FlatProblem, known: tuple[Law, ...]) -> tuple[Law, ...]:
    """The laws wᵀAw + bᵀw that are no functions of `known` ones.

    The condition ⟨2Aw + b, ∇L(w)⟩ = 0 at more random weights and data than A and b have
    entries is a linear system; what solves it is certified at others.
    """
    if problem.size > MOST_PARAMETERS:
        return ()
    n = problem.size
    unknowns = n * (n + 1) // 2 + n
    weights, data = problem.drawn(_CERTIFIED + unknowns * 4 // 3 + 40, seed=21)
    gradients = problem.gradients(weights, data)
    rows = _conditions(weights[_CERTIFIED:], gradients[_CERTIFIED:])
    if len(rows) < unknowns:
        return ()  # Too few usable gradients: the null space would be spurious.
    _, values, directions = np.linalg.svd(np.linalg.qr(rows, mode="r"))
    null = directions[values <= _NULL * values[0]]
    if not len(null):
        return ()
    points = clear_points(
        [
            (problem.tree(w), problem.tree(g))
            for w, g in zip(weights[:_CERTIFIED], gradients[:_CERTIFIED], strict=True)
        ]
    )
    if len(points) < FEWEST_POINTS:
        return ()
    generic = weights[:3]
    gradients = [_orthonormal(problem.jacobian(known, w)) for w in generic]
    found: list[Law] = []
    for candidate in _sparse(null):
        more = [
            _orthonormal(np.vstack([g, _gradient(candidate, w)]))
            for g, w in zip(gradients, generic, strict=True)
        ]
        # The product of two linear laws is a quadratic one, but says nothing new.
        if max(map(len, more)) > max(map(len, gradients)):
            law = _law(problem, candidate, len(found) + 1)
            if violation(law, points) <= LIMIT:
                found.append(law)
                gradients = more
    return tuple(found)


def _gradient(candidate: np.ndarray, w: np.ndarray) -> np.ndarray:
    """2Aw + b."""
    n = len(w)
    i, j = np.triu_indices(n)
    matrix = np.zeros((n, n))
    matrix[i, j] = matrix[j, i] = candidate[: len(i)]
    return 2 * matrix @ w + candidate[len(i) :]


def _conditions(weights: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """The equations ⟨2Aw + b, g⟩ = 0, one in each row, for the entries of A and b."""
    n = weights.shape[1]
    usable = np.abs(gradients).max(axis=1) < LARGEST_GRADIENT  # And so not NaN.
    weights, gradients = weights[usable], gradients[usable]
    i, j = np.triu_indices(n)
    quadratic = weights[:, i] * gradients[:, j] + weights[:, j] * gradients[:, i]
    quadratic[:, i == j] /= 2
    rows = np.concatenate([2 * quadratic, gradients], axis=1)
    norms = np.linalg.norm(rows, axis=1)
    # Where a loss saturates, what is left of a gradient is rounding.
    clear = norms > _FAINT * np.median(norms)
    return rows[clear] / norms[clear, None]


def _sparse(null: np.ndarray) -> np.ndarray:
    """Another basis of the same space, reduced so that most entries are 0."""
    rows, done = null.copy(), []
    for _ in range(len(rows)):
        rest = [k for k in range(len(rows)) if k not in done]
        k, pivot = np.unravel_index(np.argmax(np.abs(rows[rest])), rows[rest].shape)
        k = rest[int(k)]
        rows[k] /= rows[k, pivot]
        for other in range(len(rows)):
            if other != k:
                rows[other] -= rows[other, pivot] * rows[k]
        done.append(k)
    rows[np.abs(rows) < _SMALLEST] = 0
    rational = np.round(rows * math.lcm(*range(1, _LARGEST_DENOMINATOR + 1)))
    rational /= math.lcm(*range(1, _LARGEST_DENOMINATOR + 1))
    near = np.abs(rational - rows).max(axis=1, keepdims=True, initial=0) < 1e-8
    rows = np.where(near, rational, rows)
    # Not in the order of the null space's basis, which rounding turns.
    places = [tuple(np.flatnonzero(row)) for row in rows]
    order = sorted(range(len(rows)), key=lambda k: (len(places[k]), places[k]))
    return rows[order]


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(norms > 0, norms, 1)
    if not len(rows):
        return rows
    _, values, directions = np.linalg.svd(rows, full_matrices=False)
    return directions[values > 1e-8 * max(values[0], 1e-300)]


def _law(problem: FlatProblem, candidate: np.ndarray, number: int) -> Law:
    places, candidate = _places(problem), _in_whole_numbers(candidate)
    n = problem.size
    i, j = np.triu_indices(n)
    quadratic, linear = candidate[: len(i)], candidate[len(i) :]
    shares: dict = {}
    texts = []
    for k in np.flatnonzero(quadratic):
        (p, a), (q, b) = places[i[k]], places[j[k]]
        c = float(quadratic[k]) * (1 if i[k] == j[k] else 2)
        shares.setdefault((p, q), []).append((a, b, c))
        texts.append((c, _product(_entry(p, a), _entry(q, b))))
    for k in np.flatnonzero(linear):
        p, a = places[k]
        shares.setdefault((p, None), []).append((a, 0, float(linear[k])))
        texts.append((float(linear[k]), _entry(p, a)))
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
    return Law(
        f"quadratic[{number}]", _written(texts), "total", (), (), entries=entries
    )


def _in_whole_numbers(candidate: np.ndarray) -> np.ndarray:
    """Without fractions, where that is possible."""
    for factor in range(1, 2 * _LARGEST_DENOMINATOR + 1):
        scaled = factor * candidate / np.abs(candidate).max()
        if np.abs(scaled - np.round(scaled)).max() < 1e-8:
            return np.round(scaled)
    return candidate


def _places(problem: FlatProblem) -> list:
    """Which array and which of its entries each coordinate is."""
    paths, _ = jax.tree_util.tree_flatten_with_path(problem.template)
    return [(path, k) for path, leaf in paths for k in range(leaf.size)]


def _entry(path, index: int) -> str:
    return f"{path_text(path)}.flat[{index}]"


def _product(first: str, second: str) -> str:
    return f"{first}²" if first == second else f"{first}·{second}"


def _written(texts: list[tuple[float, str]]) -> str:
    shown = [f"{'−' if c < 0 else '+'} {_number(abs(c))}{t}" for c, t in texts]
    more = f" + … ({len(shown)} terms)" if len(shown) > _MOST_WRITTEN else ""
    return " ".join(shown[:_MOST_WRITTEN]).removeprefix("+ ") + more


def _number(c: float) -> str:
    return "" if c == 1 else f"{c:g}·"
