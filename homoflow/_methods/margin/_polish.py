"""From a late direction to the point of maximal margin next to it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..._problem._problem import Problem
from ..._results._margin_certificate import NEGLIGIBLE, MarginCertificate
from ._certificate import MAX_DENSE, certificate_at, rescaled
from ._margins import (
    Margins,
    flat_weights,
    lagrangian_hessian,
    margins_at,
    with_flat_weights,
)
from ._piece import ON_KINK, Kinks, Piece, has_pieces, kinks_at, piece_at

#: Newton steps for one set of support margins, and how many sets are tried.
_MAX_STEPS, _MAX_SETS = 30, 50
#: Multipliers above such a share of the largest one may be those of the support.
_SHARES = (NEGLIGIBLE, 1e-3, 1e-2, 1e-1)
#: Kinks whose z is such a share of the largest of their samples' may be those of the limit.
_NEAR = (1e-3, 1e-2, 3e-2, 0.1)
#: A residual that is rounding, and what else is.
_RESIDUAL_ROUNDING, _MARGIN_ROUNDING = 1e-14, 1e-9
#: Directions in which the equations change by less than their residual, or this, are flat:
#: those of a symmetry. None that changes them by more than the second number is.
_LEAST_FLAT, _MOST_FLAT = 1e-10, 1e-3
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
            sets = _Sets(support, near)
            found = _with_right_sets(problem, w, multipliers, sets, tried)
            if found is None:
                continue
            moved = direction_distance(found.w, w)
            if moved <= MAX_MOVE:
                there = with_flat_weights(problem, found.w)
                better = certificate_at(there, moved=moved)
                return better if better.residual < start.residual else None
    return None


def direction_distance(one: np.ndarray, other: np.ndarray) -> float:
    """‖one/‖one‖ − other/‖other‖‖."""
    units = one / np.linalg.norm(one), other / np.linalg.norm(other)
    return float(np.linalg.norm(units[0] - units[1]))


class _Sets(NamedTuple):
    """Which margins are held at 1, and which kinks at 0; on which sides the others are."""

    support: np.ndarray
    piece: Piece | None

    @property
    def key(self) -> bytes:
        return self.support.tobytes() + (self.piece.key if self.piece else b"")

    def with_margin(self, i: int, is_held: bool) -> "_Sets":
        support = self.support.copy()
        support[i] = is_held
        return self._replace(support=support)

    def with_kink(self, pair: int, is_held: bool, side: int) -> "_Sets":
        assert self.piece is not None
        held, sides = self.piece.held.copy(), self.piece.side.copy()
        held.flat[pair], sides.flat[pair] = is_held, side
        return self._replace(piece=Piece(sides, held))


class _Point(NamedTuple):
    w: np.ndarray
    multipliers: np.ndarray
    forces: np.ndarray
    margins: np.ndarray
    kinks: Kinks | None


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


def _with_right_sets(
    problem: Problem,
    w: np.ndarray,
    multipliers: np.ndarray,
    sets: _Sets,
    tried: set[bytes],
) -> _Point | None:
    for _ in range(_MAX_SETS):
        if not sets.support.any() or sets.key in tried:
            return None
        tried.add(sets.key)
        point = _newton(problem, w, multipliers * sets.support, sets)
        if point is None:
            return None
        better = _corrected(sets, point)
        if better is None:
            return point
        sets = better
    return None


def _corrected(sets: _Sets, point: _Point) -> _Sets | None:
    """The sets with what is most wrong with them set right; `None` if nothing is."""
    outside = np.where(sets.support, np.inf, point.margins)
    if np.min(outside) < 1 - _MARGIN_ROUNDING:
        return sets.with_margin(int(np.argmin(outside)), True)
    weakest = int(np.argmin(point.multipliers))
    if point.multipliers[weakest] < -NEGLIGIBLE * point.multipliers.max():
        return sets.with_margin(weakest, False)
    if sets.piece is None or point.kinks is None:
        return None
    beyond = np.where(sets.piece.held, 0, -sets.piece.side * point.kinks.distances)
    furthest = int(np.argmax(beyond))
    if beyond.flat[furthest] > ON_KINK:
        return sets.with_kink(furthest, True, -1)
    return _without_wrong_kink(sets, sets.piece, point, point.kinks)


def _without_wrong_kink(
    sets: _Sets, piece: Piece, point: _Point, kinks: Kinks
) -> _Sets | None:
    """The sets without the held kink that is furthest from its interval, if one is.

    ν lies between 0 and the width, the sum of λ times jump over the sample's margins.
    """
    held = np.flatnonzero(piece.held)
    if not held.size:
        return None
    outputs = kinks.jumps.shape[1]
    of_margins = point.multipliers.reshape(-1, outputs)
    width = np.einsum("ic,ick->ik", of_margins, kinks.jumps).ravel()[held]
    lengths = np.linalg.norm(kinks.held_slopes, axis=1)
    low, high = np.minimum(width, 0), np.maximum(width, 0)
    excess = np.maximum(low - point.forces, point.forces - high) * lengths
    worst = int(np.argmax(excess))
    if excess[worst] <= NEGLIGIBLE * np.linalg.norm(point.w):
        return None
    is_above = point.forces[worst] * np.sign(width[worst]) > 0
    return sets.with_kink(int(held[worst]), False, 1 if is_above else -1)


def _newton(
    problem: Problem, w: np.ndarray, multipliers: np.ndarray, sets: _Sets
) -> _Point | None:
    """The solution for such sets next to the weights; `None` without convergence."""
    size, (support, piece) = float(np.linalg.norm(w)), sets
    best, least = None, np.inf
    forces = np.zeros(0 if piece is None else piece.held.sum())
    for _ in range(_MAX_STEPS):
        at = margins_at(problem, w, piece)
        kinks = None if piece is None else kinks_at(problem, w, piece)
        slopes, excess = at.slopes[support], at.values[support] - 1
        if piece is not None and kinks is not None:
            slopes = np.vstack([slopes, kinks.held_slopes])
            lengths = np.linalg.norm(kinks.held_slopes, axis=1) * np.linalg.norm(w)
            z = kinks.distances[piece.held] * lengths
            excess = np.concatenate([excess, z])
        lack = w - slopes.T @ np.concatenate([multipliers[support], forces])
        residual = float(np.hypot(np.linalg.norm(lack) / size, np.linalg.norm(excess)))
        if not np.isfinite(residual) or residual > 1e3 * least:
            break
        if residual < least:
            is_rounding = best is not None and residual > 0.5 * least < 1e-10
            best, least = _Point(w, multipliers, forces, at.values, kinks), residual
            if is_rounding or residual <= _RESIDUAL_ROUNDING:
                break
        elif least < 1e-10:
            break
        curved = lagrangian_hessian(problem, w, multipliers, piece, forces)
        zeros = np.zeros((len(slopes), len(slopes)))
        system = np.block([[curved, -slopes.T], [-slopes, zeros]])
        flat = np.clip(residual, _LEAST_FLAT, _MOST_FLAT)
        step = np.linalg.lstsq(system, np.concatenate([-lack, excess]), rcond=flat)[0]
        w = w + step[: w.size]
        of_margins, of_kinks = np.split(step[w.size :], [int(support.sum())])
        multipliers, forces = multipliers.copy(), forces + of_kinks
        multipliers[support] += of_margins
    return best if least <= 1e-9 else None
