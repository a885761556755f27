"""The gradients of laws as rows of a matrix over the vector of all weights."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from .._law import Entries, Law, Term, leaf_at, rows_of


def jacobian_of_laws(laws: Sequence[Law], weights: PyTree) -> np.ndarray:
    """2Aw + b of every component of every law, one in each row."""
    leaves, structure = jax.tree.flatten(weights)
    ends = np.cumsum([0, *(leaf.size for leaf in leaves)])
    places = jax.tree.unflatten(
        structure,
        [
            np.arange(start, end).reshape(leaf.shape)
            for start, end, leaf in zip(ends[:-1], ends[1:], leaves, strict=True)
        ],
    )
    w = np.concatenate([np.zeros(0), *(leaf.reshape(-1) for leaf in leaves)])
    rows = [_jacobian(law, places, w) for law in laws]
    return np.concatenate([np.zeros((0, len(w))), *rows])


def _jacobian(law: Law, places: PyTree, w: np.ndarray) -> np.ndarray:
    parts = [
        _quadratic(law, rows_of(t, leaf_at(places, t.path)), w) * t.coefficient
        for t in law.quadratic_terms
    ]
    parts += [_linear(law, t, places, w) for t in law.linear_terms]
    parts += [_of_entries(e, places, w) for e in law.entries]
    return np.asarray(sum(parts))


def _quadratic(law: Law, own: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Of ‖rows‖² or of the products of rows; `own` says which weights each row has."""
    if law.contraction == "total":
        result = np.zeros((1, len(w)))
        np.add.at(result[0], own, 2 * w[own])
        return result
    units, result = np.arange(len(own)), np.zeros((len(own), len(w)))
    if law.contraction == "units":
        np.add.at(result, (units[:, None], own), 2 * w[own])
        return result
    each = len(own) // law.blocks
    i, j = np.nonzero(units[:, None] // each == units // each)
    result = np.zeros((len(i), len(w)))
    pairs = np.arange(len(i))[:, None]
    np.add.at(result, (pairs, own[i]), w[own[j]])
    np.add.at(result, (pairs, own[j]), w[own[i]])
    return result


def _linear(law: Law, term: Term, places: PyTree, w: np.ndarray) -> np.ndarray:
    own = rows_of(term, leaf_at(places, term.path))
    own = own.reshape(1, -1) if law.contraction == "total" else own
    result = np.zeros((len(own), len(w)))
    np.add.at(result, (np.arange(len(own))[:, None], own), term.coefficient)
    return result


def _of_entries(entries: Entries, places: PyTree, w: np.ndarray) -> np.ndarray:
    result = np.zeros((1, len(w)))
    c = np.asarray(entries.coefficients)
    i = leaf_at(places, entries.path).reshape(-1)[np.asarray(entries.index)]
    if entries.other_path is None:
        np.add.at(result[0], i, c)
        return result
    j = leaf_at(places, entries.other_path).reshape(-1)[np.asarray(entries.other_index)]
    np.add.at(result[0], i, c * w[j])
    np.add.at(result[0], j, c * w[i])
    return result
