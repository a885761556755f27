"""Laws of layers that are stacked in one array, as laws of that array."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from jax.tree_util import SequenceKey

from .._law import Law, Path, Term, rows_of

#: The most entries of a slice that are listed one by one.
_MAX_LISTED = 200_000


def refer_to_arrays(law: Law, shapes: Mapping[Path, tuple[int, ...]]) -> Law:
    """The law with terms of whole arrays, in place of the slices that a loop takes.

    `shapes` are those of the model's arrays: what takes weights by their path, such as the
    projection to laws, finds arrays only.
    """
    return dataclasses.replace(
        law,
        quadratic_terms=tuple(_refer(t, shapes) for t in law.quadratic_terms),
        linear_terms=tuple(_refer(t, shapes) for t in law.linear_terms),
    )


def _refer(term: Term, shapes: Mapping[Path, tuple[int, ...]]) -> Term:
    path, index = term.path, []
    while path not in shapes:
        if not path or not isinstance(path[-1], SequenceKey):
            return term
        index.insert(0, path[-1].idx)
        path = path[:-1]
    if not index:
        return term
    size = math.prod(shapes[path])
    places = np.arange(size).reshape(shapes[path])[tuple(index)]
    rows = rows_of(term, places)
    units, each = rows.shape
    first = rows[:, 0]
    if (rows == first[:, None] + np.arange(each)).all() and not (first % each).any():
        view, own = (size // each, each), first // each
    elif rows.size <= _MAX_LISTED:
        view, own = (size,), rows.reshape(-1)
    else:
        return term
    return dataclasses.replace(
        term, path=path, axis=0, view=view, index=tuple(own.tolist()), units=units
    )
