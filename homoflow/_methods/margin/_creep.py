"""A direction's way where all that matters is which margins are the smallest."""

import dataclasses

import equinox as eqx
import numpy as np
from jax.flatten_util import ravel_pytree

from ..._problem._problem import Problem
from ..._results._margin_certificate import NEGLIGIBLE, MarginCertificate
from ._active_set import Sets, nearest_point
from ._certificate import certificate_at, rescaled
from ._margins import flat_weights, with_flat_weights
from ._piece import has_pieces, piece_at
from ._polish import direction_distance, polish

#: By how much the smallest margin grows in the first step, and at least; how many steps
#: there are.
_GROWTH, _LEAST_GROWTH, _MAX_STEPS = 0.25, 0.01, 150
#: A step that moves the direction by less is followed by a longer one, and one that moves
#: it by more is taken again, shorter.
_SHORT, _LONG = 0.01, 0.03
#: From that growth on, which leaves little of the anchor, the limit is looked for.
_LOOK = 30.0
#: How near the limit must be, and how equal two limits' margins.
_CLOSE, _SAME = 0.05, 1e-8
#: Margins within this of the smallest one are the support that a step begins with.
_TIED = 1e-2


def creep_to_limit(problem: Problem) -> MarginCertificate | None:
    """The limit of a late direction by the flow's own limit; `None` if it is not found.

    At a late time L is that of the smallest margins, and the flow goes where they grow
    fastest: along the shortest vector of the convex hull of their gradients (Clarke's
    subdifferential of min m_i), an error of 1/log t aside. A step of the implicit Euler
    method of that flow goes to the point next to the last one at which all margins have
    grown by some factor: it is solved as a point of maximal margin is, with another anchor.
    Such steps are not bounded by the flow's stiffness: log t grows by that factor.

    It ends where two looks, a step apart, show one limit, to which it has come closer.
    `moved` of the certificate is the distance from where it began.
    """
    w0 = flat_weights(problem)
    piece = piece_at(problem, w0) if has_pieces(problem) else None
    at, w, degree = rescaled(problem, w0, piece)
    sets = Sets(at.values <= 1 + _TIED, piece)
    start, multipliers, growth = w, np.zeros(at.values.size), _GROWTH
    before = None
    for _ in range(_MAX_STEPS):
        anchor = w * (1 + growth) ** (-1 / degree)
        found = nearest_point(problem, w, multipliers, sets, anchor=anchor, tried=set())
        moved = np.inf if found is None else direction_distance(w, found.point.w)
        if found is None or (moved > _LONG and growth > 2 * _LEAST_GROWTH):
            growth /= 2
            if growth < _LEAST_GROWTH:
                return None
            continue
        (point, sets) = found
        w, multipliers = point.w, point.multipliers
        growth = 2 * growth if moved < _SHORT else growth
        sets = sets._replace(support=multipliers > NEGLIGIBLE * multipliers.max())
        if growth < _LOOK:
            continue
        there = with_flat_weights(problem, w)
        now = polish(there, certificate_at(there))
        if _is_one(before, now):
            assert now is not None
            trained = eqx.filter(now.model, problem.mask)
            moved = direction_distance(start, np.asarray(ravel_pytree(trained)[0]))
            return dataclasses.replace(now, moved=moved)
        before = now
    return None


def _is_one(before: MarginCertificate | None, now: MarginCertificate | None) -> bool:
    if before is None or now is None or now.moved > min(_CLOSE, before.moved):
        return False
    change = np.abs(np.asarray(now.margins) / np.asarray(before.margins) - 1)
    return bool(np.max(change) <= _SAME)
