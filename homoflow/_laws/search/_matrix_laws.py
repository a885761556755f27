"""Laws of single units that hold for pairs of units too: matrix laws."""

from collections.abc import Sequence

import numpy as np

from .._law import Law, leaf_at, rows_of
from .._residuals import collect_evidence, residual, residual_limits
from ._candidates import Candidate
from ._random_points import Point


def extend_to_pairs(candidate: Candidate, points: Sequence[Point]) -> Law:
    """The law over all pairs of units, or over pairs within equal blocks of them.

    It is the law of single units if there is none: a matrix law means that units only
    ever meet linear maps.
    """
    if not candidate.has_units or not points:
        return candidate.law()
    if any(abs(term.coefficient) != 1 for term in candidate.terms):
        return candidate.law()
    weights, _ = points[0]
    counts = {len(rows_of(t, leaf_at(weights, t.path))) for t in candidate.terms}
    if len(counts) > 1:
        return candidate.law()
    (units,) = counts
    matrix = candidate.matrix_law(blocks=1)
    limits = residual_limits(collect_evidence(matrix, points))
    if limits is None:
        return candidate.law()
    holds = np.ones((units, units), bool)
    for point, limit in zip(points, limits, strict=True):
        holds &= np.abs(residual(matrix, *point)) <= limit
    for blocks in range(1, units // 2 + 1):
        if units % blocks == 0 and _hold_within_blocks(holds, blocks):
            return candidate.matrix_law(blocks)
    return candidate.law()


def _hold_within_blocks(holds: np.ndarray, blocks: int) -> bool:
    each = len(holds) // blocks
    within = (slice(k * each, (k + 1) * each) for k in range(blocks))
    return all(holds[part, part].all() for part in within)
