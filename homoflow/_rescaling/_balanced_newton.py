"""The least sum of squares over a group of rescalings, by Newton's method.

Where one array meets the same units on two of its axes, as the recurrent weights of a
linear network do (W → GWG⁻¹), singular value decompositions give no closed form. Half the
sum of squares is convex along w(t) = e^{tX}w, for every symmetric generator X: its
derivatives at t = 0 are ⟨w, Xw⟩ and 2‖Xw‖². A step of Newton's method is a least squares
problem.
"""

from collections.abc import Callable, Sequence

import numpy as np

from .._laws._law import Law, Path, rows_of
from ._units import owned_entries, replace_rows

Arrays = dict[Path, np.ndarray]

_MAX_STEPS = 200
#: How far one step may go, as the logarithm of a scale, and how often it may be halved.
_MAX_LENGTH, _MAX_HALVINGS = 1.0, 30
#: Directions that change the weights by less than this, relative to others, are left out.
_RANK_TOLERANCE = 1e-13
#: The most numbers that the least squares problem may have.
_MAX_SIZE = 20_000_000


def meets_itself(law: Law, arrays: Arrays) -> bool:
    """Whether units of a law have entries in common, along two axes of one array."""
    if law.contraction != "matrix":
        return False
    seen: dict[Path, np.ndarray] = {}
    for term in law.quadratic_terms:
        own = owned_entries(term, arrays[term.path].shape)
        if np.isin(own, seen.get(term.path, [])).any():
            return True
        seen[term.path] = np.concatenate([seen.get(term.path, []), own.reshape(-1)])
    return False


def balance_by_newton(
    laws: Sequence[Law], arrays: Arrays, is_balanced: Callable[[Arrays], bool]
) -> Arrays:
    """The arrays of least sum of squares that rescalings of these laws lead to."""
    generators = [
        (k, g) for k, law in enumerate(laws) for g in _generators(law, arrays)
    ]
    if len(generators) * sum(a.size for a in arrays.values()) > _MAX_SIZE:
        raise ValueError(
            "The weights cannot be balanced: where one array meets the same linear units "
            "twice, only smaller networks can be."
        )
    for _ in range(_MAX_STEPS):
        if is_balanced(arrays):
            return arrays
        arrays = _step(laws, generators, arrays)
    raise ValueError(
        f"The weights cannot be balanced: after {_MAX_STEPS} steps of Newton's method some "
        "law is still not 0. There may be no network of least norm, only an infimum."
    )


def _generators(law: Law, arrays: Arrays) -> list[tuple[int, int]]:
    """The pairs of units that a basis of the law's generators mixes."""
    term = law.quadratic_terms[0]
    units = len(rows_of(term, arrays[term.path]))
    if law.contraction == "total":
        return [(0, 0)]
    if law.contraction == "units":
        return [(i, i) for i in range(units)]
    each = units // law.blocks
    return [
        (i, j) for i in range(units) for j in range(i, units) if i // each == j // each
    ]


def _step(laws: Sequence[Law], generators, arrays: Arrays) -> Arrays:
    tangents = np.stack(
        [_flatten(_tangent(laws[k], pair, arrays), arrays) for k, pair in generators], 1
    )
    w = _flatten(arrays, arrays)
    step = np.linalg.lstsq(tangents, -w / 2, rcond=_RANK_TOLERANCE)[0]
    step *= min(1.0, _MAX_LENGTH / max(np.abs(step).max(), 1e-300))
    for _ in range(_MAX_HALVINGS):
        moved = _apply(laws, generators, step, arrays)
        if np.linalg.norm(_flatten(moved, arrays)) <= np.linalg.norm(w):
            return moved
        step = step / 2
    return arrays


def _tangent(law: Law, pair: tuple[int, int], arrays: Arrays) -> Arrays:
    """What a generator makes of the arrays, to first order."""
    i, j = pair
    result = {path: np.zeros(array.size) for path, array in arrays.items()}
    for term in law.quadratic_terms:
        array, c = arrays[term.path], term.coefficient
        own = rows_of(term, np.arange(array.size).reshape(array.shape))
        own = own.reshape(1, -1) if law.contraction == "total" else own
        flat = array.reshape(-1)
        result[term.path][own[i]] += c * flat[own[j]]
        if i != j:
            result[term.path][own[j]] += c * flat[own[i]]
    return result


def _apply(laws: Sequence[Law], generators, step: np.ndarray, arrays: Arrays) -> Arrays:
    """The group element whose logarithm is the step, law after law."""
    for k, law in enumerate(laws):
        term = law.quadratic_terms[0]
        units = len(rows_of(term, arrays[term.path]))
        size = 1 if law.contraction == "total" else units
        matrix = np.zeros((size, size))
        for (owner, (i, j)), length in zip(generators, step, strict=True):
            if owner == k:
                matrix[i, j] = matrix[j, i] = length
        values, vectors = np.linalg.eigh(matrix)
        for term in law.quadratic_terms:
            array = arrays[term.path]
            rows = rows_of(term, array)
            own = rows.reshape(1, -1) if law.contraction == "total" else rows
            element = (vectors * np.expm1(term.coefficient * values)) @ vectors.T
            new = (own + element @ own).reshape(rows.shape)
            arrays = arrays | {term.path: replace_rows(term, array, new)}
    return arrays


def _flatten(parts: Arrays, like: Arrays) -> np.ndarray:
    return np.concatenate([parts[path].reshape(-1) for path in like])
