"""The stationary point next to where a flow has come to rest."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree

from ..._laws import Laws
from ..._problem._problem import Problem
from ..._results._stationary_kind import StationaryKind
from ..._results._status import RESULTS
from ._classify import classify
from ._dense_hessian import MAX_WEIGHTS, dense_hessian, make_dense_analyzer
from ._flat_loss import FlatLoss, ravel_weights, with_weights
from ._polish import polish
from ._search import HANDOVER_STEP, MAX_POLISH, Outcome, numbers_of


class Rest(NamedTuple):
    """A stationary point: its model, how the search ended, what `stats` says of it."""

    model: PyTree
    result: RESULTS
    numbers: dict[str, Any]


def stationary_point_near(problem: Problem, model: PyTree, laws: Laws) -> Rest:
    """The point next to `model`, on the flow from `problem`'s weights, and its kind."""
    flat_loss = FlatLoss(problem, None, laws)
    start, end = ravel_weights(problem, problem.model), ravel_weights(problem, model)
    outcome = Outcome(RESULTS.end_not_reached)
    if end.size > MAX_WEIGHTS:
        return Rest(model, outcome.result, numbers_of(outcome))
    size = float(np.linalg.norm(end)) or 1.0
    norm = float(np.linalg.norm(dense_hessian(flat_loss, start)))
    analyze = make_dense_analyzer(flat_loss, size, norm)
    reach, ones = MAX_POLISH * HANDOVER_STEP * size, np.ones_like(end)
    point = polish(analyze, analyze(end), reach, ones)
    at_start = float(problem.loss(problem.weights))
    verdict, explained = classify(flat_loss, point, at_start)
    if verdict != StationaryKind.not_reached:
        distance = float(np.linalg.norm(point.weights - end)) / size
        outcome = Outcome(RESULTS.successful, verdict, point, explained, distance)
        model = with_weights(problem, point.weights)
    return Rest(model, outcome.result, numbers_of(outcome))
