"""Laws of single units that hold for pairs of units too: matrix laws."""

from collections.abc import Sequence

import numpy as np

from .._law import Law, leaf_at, rows_of
from .._residuals import collect_evidence, residual, residual_limits
from ._candidates import Candidate
from ._random_points import Point

#: The most groups of units that get laws of their own.
_MAX_GROUPS = 4


def extend_to_pairs(candidate: Candidate, points: Sequence[Point]) -> list[Law]:
    """The law over all pairs of units, or over pairs within groups of them.

    It is the law of single units if there is none: a matrix law means that units only
    ever meet linear maps. Where only some units do, they get a law of their own.
    """
    holds = _find_pairs(candidate, points)
    if holds is None:
        return [candidate.law()]
    units = len(holds)
    for blocks in range(1, units // 2 + 1):
        if units % blocks == 0 and _hold_within_blocks(holds, blocks):
            return [candidate.matrix_law(blocks)]
    groups = _groups_of_pairs(holds)
    if not groups or len(groups) > _MAX_GROUPS:
        return [candidate.law()]
    laws = [candidate.restrict(group).matrix_law(blocks=1) for group in groups]
    single = [i for i in range(units) if not any(i in group for group in groups)]
    return [*laws, *([candidate.restrict(single).law()] if single else [])]


def _find_pairs(candidate: Candidate, points: Sequence[Point]) -> np.ndarray | None:
    """For which pairs of units the law holds; `None` if pairs make no sense."""
    if not candidate.has_units or not points:
        return None
    if any(abs(term.coefficient) != 1 for term in candidate.terms):
        return None
    weights, _ = points[0]
    counts = {len(rows_of(t, leaf_at(weights, t.path))) for t in candidate.terms}
    matrix = candidate.matrix_law(blocks=1)
    limits = residual_limits(collect_evidence(matrix, points))
    if len(counts) > 1 or limits is None:
        return None
    (units,) = counts
    holds = np.ones((units, units), bool)
    for point, limit in zip(points, limits, strict=True):
        holds &= np.abs(residual(matrix, *point)) <= limit
    return holds


def _groups_of_pairs(holds: np.ndarray) -> list[list[int]]:
    """Units with the same partners, each of them a partner of all, in groups."""
    groups: dict[tuple[bool, ...], list[int]] = {}
    for i, row in enumerate(holds):
        groups.setdefault(tuple(row.tolist()), []).append(i)
    return [g for g in groups.values() if len(g) > 1 and holds[np.ix_(g, g)].all()]


def _hold_within_blocks(holds: np.ndarray, blocks: int) -> bool:
    each = len(holds) // blocks
    within = (slice(k * each, (k + 1) * each) for k in range(blocks))
    return all(holds[part, part].all() for part in within)
