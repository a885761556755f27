"""The verdict on a stationary point."""

from typing import NamedTuple

from ..._models import factorization_objective, regularized_factorization_objective
from ..._problem._losses import AbstractLoss, Risk
from ..._results._stationary_kind import StationaryKind
from ._critical_point import CriticalPoint
from ._degenerate import test_degenerate_directions
from ._flat_loss import FlatLoss
from ._symmetry_tangents import explained_directions

#: A loss below this, relative to that of the start, is as low as one that is never
#: negative can be.
_LOWEST = 1e-15


class Classification(NamedTuple):
    """What a point is, and how many zero eigenvalues laws explain."""

    verdict: StationaryKind
    explained: int


def classify(
    flat_loss: FlatLoss, point: CriticalPoint, loss_at_start: float
) -> Classification:
    """Minimum or saddle, by the Hessian modulo the flat directions that laws explain."""
    if not point.is_stationary:
        return Classification(StationaryKind.not_reached, 0)
    if point.lowest < -point.zero:
        return Classification(StationaryKind.strict_saddle, 0)
    explained = explained_directions(flat_loss, point)
    count = len(explained)
    if point.zeros is not None and point.zeros <= count:
        return Classification(StationaryKind.minimum, count)
    if _is_never_negative(flat_loss) and point.loss <= _LOWEST * loss_at_start:
        return Classification(StationaryKind.minimum, count)
    if not point.is_whole:
        return Classification(StationaryKind.undecided, count)
    found = test_degenerate_directions(flat_loss, point, explained)
    if found.decreases:
        return Classification(StationaryKind.degenerate_saddle, count)
    verdict = StationaryKind.minimum if found.is_flat else StationaryKind.undecided
    return Classification(verdict, count)


def _is_never_negative(flat_loss: FlatLoss) -> bool:
    objective = flat_loss.problem.objective
    if isinstance(objective, Risk):
        return isinstance(objective.loss, AbstractLoss)
    return objective in (factorization_objective, regularized_factorization_objective)
