"""From a late direction to the point of maximal margin next to it."""

from collections.abc import Iterator

import numpy as np

from ..._problem._problem import Problem
from ..._results._margin_certificate import NEGLIGIBLE, MarginCertificate
from ._active_set import Sets, nearest_point
from ._certificate import MAX_DENSE, certificate_at, rescaled
from ._margins import Margins, flat_weights, with_flat_weights
from ._piece import Piece, has_pieces, kinks_at, piece_at

#: Multipliers above such a share of the largest one may be those of the support.
_SHARES = (NEGLIGIBLE, 1e-3, 1e-2, 1e-1)
#: Kinks whose z is such a share of the largest of their samples' may be those of the limit.
_NEAR = (1e-3, 1e-2, 3e-2, 0.1)
#: How far a direction may be moved: further on there may be other such points.
MAX_MOVE = 0.1


def polish(problem: Problem, start: MarginCertificate) -> MarginCertificate | None:
    """The KKT point next to a certified direction, by Newton's method; `None` if none.

    The equations are w = Σ λ_i ∇m_i + Σ ν_k ∇z_k, m_i = 1 over the support, and z_k = 0 for
    the kinks that are held. A margin whose multiplier becomes negative is taken from the
    support, and one that falls below 1 is added. A kink is held where its pair would change
    sides, and left where ν_k lies outside of its interval. Steps are the least ones, so
    that there is no motion along symmetries. Kept is what lowers the residual, and moves
    the direction by no more than `MAX_MOVE`.
    """
    if problem.num_weights > MAX_DENSE:
        return None
    w = flat_weights(problem)
    piece = piece_at(problem, w) if has_pieces(problem) else None
    at, w, degree = rescaled(problem, w, piece)
    multipliers = np.ravel(start.multipliers)
    tried: set[bytes] = set()
    for near in _pieces_near(problem, w, piece):
        for support in _candidates(at, w, degree, multipliers):
            sets = Sets(support, near)
            found = nearest_point(problem, w, multipliers, sets, tried=tried)
            if found is None:
                continue
            moved = direction_distance(found.point.w, w)
            if moved <= MAX_MOVE:
                there = with_flat_weights(problem, found.point.w)
                better = certificate_at(there, moved=moved)
                return better if better.residual < start.residual else None
    return None


def direction_distance(one: np.ndarray, other: np.ndarray) -> float:
    """‖one/‖one‖ − other/‖other‖‖."""
    units = one / np.linalg.norm(one), other / np.linalg.norm(other)
    return float(np.linalg.norm(units[0] - units[1]))


def _candidates(
    at: Margins, w: np.ndarray, degree: float, multipliers: np.ndarray
) -> Iterator[np.ndarray]:
    """Supports to begin with: of linearized margins, and of the larger multipliers."""
    # ⟨∇m, w⟩ = L·m, so that margins 1 at v are ⟨∇m, v⟩ = 1 + (L − 1)·m to first order.
    yield _support_of_least_norm(at.slopes, 1 + (degree - 1) * at.values)
    for share in _SHARES:
        yield multipliers > share * multipliers.max()


def _pieces_near(
    problem: Problem, w: np.ndarray, piece: Piece | None
) -> Iterator[Piece | None]:
    """The piece, and those with kinks held besides that the weights come close to.

    Close is what a kink's z is to the largest one of its samples.
    """
    yield piece
    if piece is None:
        return
    z = np.abs(kinks_at(problem, w, piece).distances)
    largest = z.max(axis=0)
    ratio = z / np.where(largest > 0, largest, 1)
    for near in _NEAR:
        held = piece.held | (ratio <= near)
        yield Piece(np.where(held, -1, piece.side), held)


def _support_of_least_norm(rows: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Which of `rows @ v ≥ bounds` hold back the smallest v [Lawson & Hanson 1974]."""
    from scipy.optimize import nnls

    system = np.vstack([rows.T, bounds])
    target = np.zeros(len(system))
    target[-1] = 1
    lengths = np.linalg.norm(system, axis=0)
    dual, _ = nnls(system / lengths, target)
    return dual > NEGLIGIBLE * dual.max()
