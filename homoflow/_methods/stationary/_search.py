"""The flow to a stationary point, and what kind of point that is."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..._dynamics._gradient_flow import GradientFlow
from ..._problem._problem import Problem
from ..._results._failure import TrajectoryInterrupt
from ..._results._stationary_kind import StationaryKind
from ..._results._status import RESULTS
from ..._results._trajectory import Trajectory
from .._settings import Settings
from .._task import Task
from ._classify import judged
from ._critical_point import View
from ._dense_hessian import MAX_WEIGHTS, dense_look
from ._krylov import krylov_look
from ._landscape import Landscape, raveled, with_weights
from ._merge import joined, with_closer_looks
from ._polish import polished
from ._restore_laws import Keep, keeping
from ._segments import Pace, Segment, segments
from ._separable import separation_loss

#: The share of the loss's fall so far that would fall in as much time again, below which
#: it is worth to look at the Hessian.
_SLOW = 1e-3
#: Complete segments before the first look, so that there is something to draw.
_FEWEST = 4
#: The step to a stationary point, relative to ‖w‖, at which the flow hands over, and how
#: many times as far the polish may go.
_NEAR, _REACH = 1e-5, 10.0
#: A part along negative curvature below this, in absolute tolerances, is not resolved.
_UNRESOLVED = 1e-2
#: A flat point that is no proven minimum is watched until the clock shows so many times
#: what it showed first: plateaus end.
_PATIENCE = 1e3
#: Differences of losses below this, relative to them, are rounding.
_ROUNDING = 1e-12
#: A segment that is shorter than this, relative to the time, is lost on the clock.
_CLOCK = 4 * float(np.finfo(float).eps)


class Outcome(NamedTuple):
    """How a flow without end ended, and at what point, if at any.

    `distance`: how far the polish moved the weights, relative to their norm.
    """

    result: RESULTS
    verdict: StationaryKind = StationaryKind.not_reached
    view: View | None = None
    explained: int = -1
    distance: float = np.nan


class _Search(NamedTuple):
    """Where a stationary point is looked for, and what the flow can resolve there."""

    landscape: Landscape
    size_at_start: float
    resolution: float
    separation_loss: float
    keep: Keep


def flow_to_rest(
    task: Task, settings: Settings, *, report: Callable[[Segment], None]
) -> Trajectory:
    """The flow until it comes to a stationary point, and that point.

    It looks for one between segments, wherever the loss has become slow. There and at the
    end the laws of `settings` are restored. `report` is called for every segment.
    """
    problem, ts = task.problem, task.ts
    settings = _at_one_resolution(problem, settings)
    keep = keeping(problem, settings.restored_laws)
    pace = Pace(task, settings, keep)
    more = segments(problem, pace, ts=ts, max_steps=task.max_steps)
    search = _search(task, settings, keep)
    parts: list[Segment] = []

    def ended(recorded: list[Segment], outcome: Outcome) -> Trajectory:
        if outcome.view is None:
            model = parts[-1].trajectory.model
        else:
            model = with_weights(problem, outcome.view.weights)
        return joined(recorded, parts, model, outcome.result, _numbers(outcome))

    try:
        outcome = _outcome(more, parts, search, task.max_steps, report)
        recorded = with_closer_looks(parts, pace) if ts is None else parts[:1]
    except KeyboardInterrupt as interrupt:
        if not parts:
            raise
        partial = ended(parts, Outcome(RESULTS.interrupted))
        raise TrajectoryInterrupt(partial) from interrupt
    return ended(recorded, outcome)


def _at_one_resolution(problem: Problem, method: Settings) -> Settings:
    """With the absolute tolerance of the start all along, not that of each segment."""
    if method.rtol is None or method.atol is not None:
        return method
    weights = raveled(problem, problem.model)
    scale = float(np.sqrt(np.mean(weights**2))) or 1.0
    return dataclasses.replace(method, atol=method.rtol * scale)


def _search(task: Task, method: Settings, keep: Keep) -> _Search:
    problem, dynamics = task.problem, task.dynamics
    assert isinstance(dynamics, GradientFlow)
    weight_decay = dynamics.weight_decay
    size = float(np.linalg.norm(raveled(problem, problem.model)))
    resolution = np.finfo(float).eps * size
    if method.atol is not None:
        resolution = _UNRESOLVED * float(method.atol)
    limit = separation_loss(problem) if weight_decay is None else None
    return _Search(
        Landscape(problem, weight_decay, task.recorder.laws),
        size,
        resolution,
        -np.inf if limit is None else limit,
        keep,
    )


def _outcome(
    more: Iterable[Segment],
    parts: list[Segment],
    search: _Search,
    max_steps: int,
    report: Callable[[Segment], None],
) -> Outcome:
    """Follows the flow to its end; `parts` collects the segments."""
    steps, next_look, flat_since = 0, 0.0, np.inf
    undecided = Outcome(RESULTS.end_not_reached)
    for segment in more:
        parts.append(segment)
        report(segment)
        flow = segment.trajectory
        if not segment.is_complete and flow.result != RESULTS.max_steps_reached:
            return Outcome(flow.result)
        if segment.end - segment.start <= _CLOCK * segment.end:
            return Outcome(RESULTS.step_size_too_small)
        if flow.losses[-1] < search.separation_loss:
            return Outcome(RESULTS.no_stationary_point, StationaryKind.diverges)
        if segment.end >= next_look and _is_slow(parts, search):
            sight = _look_around(parts, search)
            next_look = segment.end + min(sight.wait, segment.end)
            found = sight.outcome
            if found.verdict in (StationaryKind.minimum, StationaryKind.strict_saddle):
                return found
            if found.verdict != StationaryKind.not_reached:
                flat_since = min(flat_since, segment.end)
                if segment.end >= _PATIENCE * flat_since:
                    return found
            if found.verdict == StationaryKind.undecided:
                undecided = found
        steps += segment.steps
        if steps >= max_steps:
            break
    return undecided


def _is_slow(parts: list[Segment], search: _Search) -> bool:
    """Whether in as much time as it took so far the loss would hardly fall further."""
    last = parts[-1]
    if not last.is_complete or sum(part.is_complete for part in parts) < _FEWEST:
        return False
    highest, before, here = (
        search.landscape.recorded_height(part.trajectory, i)
        for part, i in ((parts[0], 0), (last, 0), (last, -1))
    )
    rate = (before - here) / (last.end - last.start)
    return rate * last.end <= _SLOW * (highest - here) + _ROUNDING * abs(here)


class _Sight(NamedTuple):
    """What is there, and how long it takes until it may be worth to look again."""

    outcome: Outcome
    wait: float = 0.0


def _look_around(parts: list[Segment], search: _Search) -> _Sight:
    """The stationary point next to the flow, unless the flow is about to leave it."""
    landscape, nothing = search.landscape, Outcome(RESULTS.end_not_reached)
    weights = raveled(landscape.problem, parts[-1].trajectory.model)
    size = max(search.size_at_start, float(np.linalg.norm(weights))) or 1.0
    is_small = weights.size <= MAX_WEIGHTS
    look = (dense_look if is_small else krylov_look)(landscape, size)
    try:
        view = look(weights)
        if view.unstable > search.resolution:
            return _Sight(nothing, 1 / abs(view.lowest))
        if np.linalg.norm(view.step) > _NEAR * size:
            return _Sight(nothing)
        rest = polished(look, view, _REACH * _NEAR * size)
        on_laws = look(search.keep(rest.weights))
    except FloatingPointError:
        return _Sight(nothing)
    if on_laws.is_stationary:
        rest = on_laws
    highest = landscape.recorded_height(parts[0].trajectory, 0)
    verdict, explained = judged(landscape, rest, highest)
    if verdict == StationaryKind.strict_saddle:
        away = rest.unstable_part(rest.weights + rest.step - weights)
        if away > search.resolution:
            return _Sight(nothing, 1 / abs(rest.lowest))
    distance = float(np.linalg.norm(rest.weights - weights)) / size
    return _Sight(Outcome(RESULTS.successful, verdict, rest, explained, distance))


def _numbers(outcome: Outcome) -> dict[str, Any]:
    """What `stats` says of the point; NaN and −1 where there is none."""
    view = outcome.view
    nan = float("nan")

    def of_view(name: str) -> Array:
        return jnp.asarray(nan if view is None else getattr(view, name))

    zeros = -1 if view is None or view.zeros is None else view.zeros
    return {
        "stationary_kind": outcome.verdict,
        "stationary_loss": of_view("loss"),
        "gradient_norm": of_view("grad_norm"),
        "smallest_eigenvalue": of_view("lowest"),
        "largest_eigenvalue": of_view("largest"),
        "eigenvalue_threshold": of_view("zero"),
        "zero_eigenvalues": jnp.asarray(zeros),
        "symmetry_zero_eigenvalues": jnp.asarray(outcome.explained),
        "polish_distance": jnp.asarray(outcome.distance),
    }
