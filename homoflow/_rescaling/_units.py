"""Which entries of an array a unit owns."""

import math

import numpy as np

from .._laws._law import Law, Term, rows_of


def owned_entries(
    term: Term, shape: tuple[int, ...], *, is_total: bool = False
) -> np.ndarray:
    """Flat indices of the entries that each unit owns, one row for each unit."""
    rows = rows_of(term, np.arange(math.prod(shape)).reshape(shape))
    return rows.reshape(1, -1) if is_total else rows


def label_entries(law: Law, term: Term, shape: tuple[int, ...]) -> np.ndarray:
    """For every entry of an array the unit of the law that owns it, −1 for none."""
    result = np.full(math.prod(shape), -1)
    entries = owned_entries(term, shape, is_total=law.contraction == "total")
    result[entries] = np.arange(len(entries))[:, None]
    return result


def count_units(law: Law, shapes: dict) -> int:
    """How many units a law has."""
    term = law.quadratic_terms[0]
    return len(
        owned_entries(term, shapes[term.path], is_total=law.contraction == "total")
    )


def replace_rows(term: Term, array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The array with other entries where the units' rows are."""
    flat = array.reshape(-1).copy()
    flat[owned_entries(term, array.shape)] = rows
    return flat.reshape(array.shape)
