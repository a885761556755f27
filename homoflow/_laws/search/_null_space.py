"""Null spaces, ranks, and vectors in whole numbers."""

import math

import numpy as np

#: Singular values below this, relative to the largest, are rounding.
_RANK_TOLERANCE = 1e-8
#: Entries of a reduced basis below this are zeros.
_MIN_ENTRY = 1e-7
#: How close a number has to be to a whole one, or to a fraction, to be taken for it.
_ROUNDING = 1e-8
_MAX_DENOMINATOR = 12
_MAX_COEFFICIENT = 24


def null_space(rows: np.ndarray, tolerance: float) -> np.ndarray:
    """An orthonormal basis of {x : rows·x = 0}, one vector in each row.

    There are at least as many rows as unknowns. Singular values up to `tolerance` times
    the largest count as zero.
    """
    if not rows.size:
        return np.zeros((0, rows.shape[1]))
    _, values, directions = np.linalg.svd(rows, full_matrices=False)
    return directions[values <= tolerance * values[0]]


def reduce_rows(rows: np.ndarray) -> np.ndarray:
    """Another basis of the same space, reduced so that most entries are 0.

    Gauss–Jordan elimination with complete pivoting. Entries near fractions of a small
    denominator become those. The order does not depend on that of the given basis, which
    rounding may turn: vectors with the fewest entries come first.
    """
    rows, done = rows.copy(), []
    for _ in range(len(rows)):
        left = [k for k in range(len(rows)) if k not in done]
        k, pivot = np.unravel_index(np.argmax(np.abs(rows[left])), rows[left].shape)
        k = left[int(k)]
        rows[k] /= rows[k, pivot]
        factors = rows[:, pivot].copy()
        factors[k] = 0
        rows -= factors[:, None] * rows[k]
        done.append(k)
    rows[np.abs(rows) < _MIN_ENTRY] = 0
    denominator = math.lcm(*range(1, _MAX_DENOMINATOR + 1))
    fractions = np.round(rows * denominator) / denominator
    near = np.abs(fractions - rows).max(axis=1, keepdims=True, initial=0) < _ROUNDING
    rows = np.where(near, fractions, rows)
    places = [tuple(np.flatnonzero(row)) for row in rows]
    return rows[sorted(range(len(rows)), key=lambda k: (len(places[k]), places[k]))]


def to_whole_numbers(vector: np.ndarray) -> np.ndarray | None:
    """The smallest multiple in whole numbers; `None` if they would be large."""
    for largest in range(1, _MAX_COEFFICIENT + 1):
        scaled = largest * vector / np.abs(vector).max()
        if np.abs(scaled - np.round(scaled)).max() < _ROUNDING:
            return np.round(scaled)
    return None


def orthonormal_basis(rows: np.ndarray) -> np.ndarray:
    """Of the span of the rows, up to rounding."""
    if not len(rows):
        return rows
    _, values, directions = np.linalg.svd(rows, full_matrices=False)
    return directions[values > _RANK_TOLERANCE * values[0]]


def normalize_rows(rows: np.ndarray) -> np.ndarray:
    """The rows that are finite and not 0, each at length one."""
    rows = rows[np.isfinite(rows).all(axis=1)]
    # Scaled first: squares of what is beyond 1e154 overflow.
    largest = np.max(np.abs(rows), axis=1, keepdims=True, initial=0.0)
    rows = rows / np.where(largest > 0, largest, 1)
    norms = np.linalg.norm(rows, axis=1)
    return rows[norms > 0] / norms[norms > 0, None]
