"""The verdict on a stationary point."""

from typing import NamedTuple

from ..._models import factorization_objective, regularized_factorization_objective
from ..._problem._losses import AbstractLoss, Risk
from ..._results._stationary_kind import StationaryKind
from ._critical_point import View
from ._degenerate import valley
from ._landscape import Landscape
from ._symmetry_tangents import explained_directions

#: A loss below this, relative to that of the start, is as low as one that is never
#: negative can be.
_LOWEST = 1e-15


class Judgement(NamedTuple):
    """What a point is, and how many zero eigenvalues laws explain."""

    verdict: StationaryKind
    explained: int


def judged(landscape: Landscape, view: View, loss_at_start: float) -> Judgement:
    """Minimum or saddle, by the Hessian modulo the flat directions that laws explain."""
    if not view.is_stationary:
        return Judgement(StationaryKind.not_reached, 0)
    if view.lowest < -view.zero:
        return Judgement(StationaryKind.strict_saddle, 0)
    explained = explained_directions(landscape, view)
    count = len(explained)
    if view.zeros is not None and view.zeros <= count:
        return Judgement(StationaryKind.minimum, count)
    if _is_never_negative(landscape) and view.loss <= _LOWEST * loss_at_start:
        return Judgement(StationaryKind.minimum, count)
    if not view.is_whole:
        return Judgement(StationaryKind.undecided, count)
    found = valley(landscape, view, explained)
    if found.falls:
        return Judgement(StationaryKind.degenerate_saddle, count)
    verdict = StationaryKind.minimum if found.is_flat else StationaryKind.undecided
    return Judgement(verdict, count)


def _is_never_negative(landscape: Landscape) -> bool:
    objective = landscape.problem.objective
    if isinstance(objective, Risk):
        return isinstance(objective.loss, AbstractLoss)
    return objective in (factorization_objective, regularized_factorization_objective)
