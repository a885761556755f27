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

#: Newton steps for one set of support margins, and how many sets are tried.
_MAX_STEPS, _MAX_SETS = 30, 50
#: Multipliers above such a share of the largest one may be those of the support.
_SHARES = (NEGLIGIBLE, 1e-3, 1e-2, 1e-1)
#: A residual that is rounding, and what else is.
_RESIDUAL_ROUNDING, _MARGIN_ROUNDING = 1e-14, 1e-9
#: Directions in which the equations change by less than their residual, or this, are flat:
#: those of a symmetry. None that changes them by more than the second number is.
_LEAST_FLAT, _MOST_FLAT = 1e-10, 1e-3
#: How far a direction may be moved: further on there may be other such points.
MAX_MOVE = 0.1


def polish(problem: Problem, start: MarginCertificate) -> MarginCertificate | None:
    """The KKT point next to a certified direction, by Newton's method; `None` if none.

    The equations are w = Σ λ_i ∇m_i and m_i = 1 over the support, from which a margin is
    taken whose multiplier becomes negative, and to which one is added that falls below 1.
    Steps are the least ones, so that there is no motion along symmetries. Kept is what
    lowers the residual, and moves the direction by no more than `MAX_MOVE`.
    """
    if problem.num_weights > MAX_DENSE:
        return None
    at, w, degree = rescaled(problem, flat_weights(problem))
    multipliers = np.ravel(start.multipliers)
    for support in _candidates(at, w, degree, multipliers):
        found = _with_right_support(problem, w, multipliers, support)
        if found is None:
            continue
        moved = direction_distance(found.w, w)
        if moved <= MAX_MOVE:
            better = certificate_at(with_flat_weights(problem, found.w), moved=moved)
            return better if better.residual < start.residual else None
    return None


def direction_distance(one: np.ndarray, other: np.ndarray) -> float:
    """‖one/‖one‖ − other/‖other‖‖."""
    units = one / np.linalg.norm(one), other / np.linalg.norm(other)
    return float(np.linalg.norm(units[0] - units[1]))


class _Point(NamedTuple):
    w: np.ndarray
    multipliers: np.ndarray
    margins: np.ndarray


def _candidates(
    at: Margins, w: np.ndarray, degree: float, multipliers: np.ndarray
) -> Iterator[np.ndarray]:
    """Supports to begin with: of linearized margins, and of the larger multipliers."""
    # ⟨∇m, w⟩ = L·m, so that margins 1 at v are ⟨∇m, v⟩ = 1 + (L − 1)·m to first order.
    yield _support_of_least_norm(at.slopes, 1 + (degree - 1) * at.values)
    for share in _SHARES:
        yield multipliers > share * multipliers.max()


def _support_of_least_norm(rows: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Which of `rows @ v ≥ bounds` hold back the smallest v [Lawson & Hanson 1974]."""
    from scipy.optimize import nnls

    system = np.vstack([rows.T, bounds])
    target = np.zeros(len(system))
    target[-1] = 1
    lengths = np.linalg.norm(system, axis=0)
    dual, _ = nnls(system / lengths, target)
    return dual > NEGLIGIBLE * dual.max()


def _with_right_support(
    problem: Problem, w: np.ndarray, multipliers: np.ndarray, support: np.ndarray
) -> _Point | None:
    tried = set()
    for _ in range(_MAX_SETS):
        if not support.any() or support.tobytes() in tried:
            return None
        tried.add(support.tobytes())
        point = _newton(problem, w, multipliers * support, support)
        if point is None:
            return None
        outside = np.where(support, np.inf, point.margins)
        weakest = int(np.argmin(point.multipliers))
        if np.min(outside) < 1 - _MARGIN_ROUNDING:
            support = support.copy()
            support[int(np.argmin(outside))] = True
        elif point.multipliers[weakest] < -NEGLIGIBLE * point.multipliers.max():
            support = support.copy()
            support[weakest] = False
        else:
            return point
    return None


def _newton(
    problem: Problem, w: np.ndarray, multipliers: np.ndarray, support: np.ndarray
) -> _Point | None:
    """The solution for one support next to the weights; `None` without convergence."""
    size = float(np.linalg.norm(w))
    best, least = None, np.inf
    for _ in range(_MAX_STEPS):
        at = margins_at(problem, w)
        slopes = at.slopes[support]
        lack = w - slopes.T @ multipliers[support]
        excess = at.values[support] - 1
        residual = float(np.hypot(np.linalg.norm(lack) / size, np.linalg.norm(excess)))
        if not np.isfinite(residual) or residual > 1e3 * least:
            break
        if residual < least:
            is_rounding = best is not None and residual > 0.5 * least < 1e-10
            best, least = _Point(w, multipliers, at.values), residual
            if is_rounding or residual <= _RESIDUAL_ROUNDING:
                break
        elif least < 1e-10:
            break
        curved = lagrangian_hessian(problem, w, multipliers)
        zeros = np.zeros((len(slopes), len(slopes)))
        system = np.block([[curved, -slopes.T], [-slopes, zeros]])
        flat = np.clip(residual, _LEAST_FLAT, _MOST_FLAT)
        step = np.linalg.lstsq(system, np.concatenate([-lack, excess]), rcond=flat)[0]
        w = w + step[: w.size]
        multipliers = multipliers.copy()
        multipliers[support] += step[w.size :]
    return best if least <= 1e-9 else None
