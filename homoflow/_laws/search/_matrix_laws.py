"""Laws of single units that hold for pairs of units too: matrix laws."""

import re
from collections.abc import Sequence

import numpy as np

from .._law import Law, leaf_at, rows_of
from .._residuals import LIMIT, rate_and_size
from ._candidates import renamed
from ._random_points import Point


def promoted(law: Law, points: Sequence[Point]) -> Law:
    """The matrix law over all pairs of units, or over pairs within equal blocks of them.

    It is the law itself if there is none: a matrix law means that units only ever meet
    linear maps.
    """
    if law.contraction != "units" or not points or law.linear_terms:
        return law
    if any(abs(t.coefficient) != 1 for t in law.quadratic_terms):
        return law
    weights, _ = points[0]
    counts = {
        len(rows_of(t, leaf_at(weights, t.path))) for t in law.quadratic_terms
    }  # fmt: skip
    if len(counts) > 1:
        return law
    (units,) = counts
    whole = _as_matrix(law, 1)
    vanishes = np.ones((units, units), bool)
    for point in points:
        rate, size = rate_and_size(whole, *point)
        vanishes &= np.abs(rate) <= LIMIT * np.max(size, initial=0.0)
    for blocks in range(1, units // 2 + 1):
        if units % blocks == 0 and _all_within(vanishes, blocks):
            return _as_matrix(law, blocks)
    return law


def _all_within(vanishes: np.ndarray, blocks: int) -> bool:
    n = len(vanishes) // blocks
    return all(
        vanishes[k * n : (k + 1) * n, k * n : (k + 1) * n].all() for k in range(blocks)
    )


def _as_matrix(law: Law, blocks: int) -> Law:
    kind = "matrix" if blocks == 1 else "blocks"
    within = "" if blocks == 1 else f", i and j in the same of {blocks} blocks"
    return renamed(
        law,
        name=f"{kind}[{law.name.partition('[')[2]}",
        formula=_polarized(law.formula) + within,
        tex=_polarized_tex(law.latex),
        contraction="matrix",
        blocks=blocks,
    )


def _polarized(formula: str) -> str:
    """‖W[i, :]‖² as ⟨W[i, :], W[j, :]⟩."""
    formula = re.sub(
        r"‖([^‖]*)‖²", lambda m: f"⟨{m[1]}, {_other(m[1])}⟩", formula
    )  # fmt: skip
    return re.sub(r"(\S+\[(?:\d+\+)?i\])²", lambda m: f"{m[1]}·{_other(m[1])}", formula)


def _polarized_tex(formula: str) -> str:
    formula = re.sub(
        r"\\lVert (.*?)\\rVert\^2",
        lambda m: rf"\langle {m[1]}, {_other(m[1])}\rangle",
        formula,
    )
    return re.sub(
        r"(\\mathtt\{[^}]*\}\[(?:\d+\+)?i\])\^2",
        lambda m: f"{m[1]}{_other(m[1])}",
        formula,
    )


def _other(term: str) -> str:
    head, bracket, where = term.rpartition("[")
    old, new = ("part i", "part j") if "part i" in where else ("i", "j")
    return head + bracket + where.replace(old, new, 1)
