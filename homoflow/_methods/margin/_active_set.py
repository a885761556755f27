"""Weights that fulfil the conditions of a maximal margin, by an active set."""

from typing import NamedTuple

import numpy as np

from ..._problem._problem import Problem
from ..._results._margin_certificate import NEGLIGIBLE
from ._margins import lagrangian_hessian, margins_at
from ._piece import ON_KINK, Kinks, Piece, kinks_at

#: Newton steps for one set of support margins, and how many sets are tried.
_MAX_STEPS, _MAX_SETS = 30, 50
#: A residual that is rounding, and what else is.
_RESIDUAL_ROUNDING, _MARGIN_ROUNDING = 1e-14, 1e-9
#: Directions in which the equations change by less than their residual, or this, are flat:
#: those of a symmetry. None that changes them by more than the second number is.
_LEAST_FLAT, _MOST_FLAT = 1e-10, 1e-3


class Sets(NamedTuple):
    """Which margins are held at 1, and which kinks at 0; on which sides the others are."""

    support: np.ndarray
    piece: Piece | None

    @property
    def key(self) -> bytes:
        return self.support.tobytes() + (self.piece.key if self.piece else b"")

    def with_margin(self, i: int, is_held: bool) -> "Sets":
        support = self.support.copy()
        support[i] = is_held
        return self._replace(support=support)

    def with_kink(self, pair: int, is_held: bool, side: int) -> "Sets":
        assert self.piece is not None
        held, sides = self.piece.held.copy(), self.piece.side.copy()
        held.flat[pair], sides.flat[pair] = is_held, side
        return self._replace(piece=Piece(sides, held))


class Point(NamedTuple):
    w: np.ndarray
    multipliers: np.ndarray
    forces: np.ndarray
    margins: np.ndarray
    kinks: Kinks | None


class Found(NamedTuple):
    """A point, and its sets."""

    point: Point
    sets: Sets


def nearest_point(
    problem: Problem,
    w: np.ndarray,
    multipliers: np.ndarray,
    sets: Sets,
    *,
    anchor: np.ndarray | float = 0.0,
    tried: set[bytes],
) -> Found | None:
    """The point of margins ≥ 1 from which the `anchor` is nearest; `None` if not found.

    w − anchor = Σ λ_i ∇m_i + Σ ν_k ∇z_k, λ ≥ 0, beginning with some `sets`. `tried`: the
    keys of sets that are not tried again; those that are tried here are added.
    """
    for _ in range(_MAX_SETS):
        if not sets.support.any() or sets.key in tried:
            return None
        tried.add(sets.key)
        point = _newton(problem, w, multipliers * sets.support, sets, anchor)
        if point is None:
            return None
        better = _corrected(sets, point)
        if better is None:
            return Found(point, sets)
        sets = better
    return None


def _corrected(sets: Sets, point: Point) -> Sets | None:
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
    sets: Sets, piece: Piece, point: Point, kinks: Kinks
) -> Sets | None:
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
    # Too small a force holds z down: without it z would be above 0.
    is_above = point.forces[worst] < low[worst]
    return sets.with_kink(int(held[worst]), False, 1 if is_above else -1)


def _newton(
    problem: Problem,
    w: np.ndarray,
    multipliers: np.ndarray,
    sets: Sets,
    anchor: np.ndarray | float,
) -> Point | None:
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
        lack = w - anchor - slopes.T @ np.concatenate([multipliers[support], forces])
        residual = float(np.hypot(np.linalg.norm(lack) / size, np.linalg.norm(excess)))
        if not np.isfinite(residual) or residual > 1e3 * least:
            break
        if residual < least:
            is_rounding = best is not None and residual > 0.5 * least < 1e-10
            best, least = Point(w, multipliers, forces, at.values, kinks), residual
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
