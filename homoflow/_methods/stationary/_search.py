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
from ._classify import classify
from ._critical_point import Analyzer, CriticalPoint
from ._dense_hessian import (
    MAX_WEIGHTS,
    balanced_units,
    dense_hessian,
    make_dense_analyzer,
    rounding_of_hessian,
)
from ._flat_loss import FlatLoss, ravel_weights, with_weights
from ._krylov import make_krylov_analyzer
from ._merge import merge_segments, with_refined_records
from ._polish import polish
from ._restore_laws import Restore, make_restore
from ._segments import Segment, SegmentSolver, segments
from ._separable import separation_loss

#: The share of the loss's fall so far that would fall in as much time again, below which
#: it is worth to look at the Hessian.
_MAX_RELATIVE_FALL = 1e-3
#: Complete segments before the first look, so that there is something to draw.
_MIN_SEGMENTS = 4
#: The step to a stationary point, relative to ‖w‖, at which the flow hands over, and how
#: many times as far the polish may go.
HANDOVER_STEP, MAX_POLISH = 1e-5, 10.0
#: A part along negative curvature below this, in absolute tolerances, is not resolved.
_UNRESOLVED = 1e-2
#: A flat point that is no proven minimum is watched until the clock shows so many times
#: what it showed first: plateaus end.
_PATIENCE = 1e3
#: Differences of losses below this, relative to them, are rounding.
_ROUNDING = 1e-12
#: A segment that is shorter than this, relative to the time, is lost on the clock.
_CLOCK = 4 * float(np.finfo(float).eps)


#: What `stats` says of a limit of directions.
_OF_DIRECTION = (
    "log_time_reached", "normalized_margin", "kkt_residual", "direction_distance",
)  # fmt: skip


class Outcome(NamedTuple):
    """How a flow without end ended, and at what point, if at any.

    `distance`: how far the polish moved the weights, relative to their norm.
    """

    result: RESULTS
    verdict: StationaryKind = StationaryKind.not_reached
    point: CriticalPoint | None = None
    explained: int = -1
    distance: float = np.nan


class _Search(NamedTuple):
    """Where a stationary point is looked for, and what the flow can resolve there."""

    flat_loss: FlatLoss
    size_at_start: float
    hessian_at_start: np.ndarray | None
    resolution: float
    separation_loss: float
    restore: Restore


def solve_to_stationary_point(
    task: Task, settings: Settings, *, report: Callable[[Segment], None]
) -> Trajectory:
    """The flow until it comes to a stationary point, and that point.

    It looks for one between segments, wherever the loss has become slow. There and at the
    end the laws of `settings` are restored. `report` is called for every segment.
    """
    problem, ts = task.problem, task.ts
    settings = _at_one_resolution(problem, settings)
    restore = make_restore(problem, settings.restored_laws, settings.translations)
    segment_solver = SegmentSolver(task, settings, restore)
    more = segments(problem, segment_solver, ts=ts, max_steps=task.max_steps)
    search = _search(task, settings, restore)
    parts: list[Segment] = []

    def ended(recorded: list[Segment], outcome: Outcome) -> Trajectory:
        if outcome.point is None:
            model = parts[-1].trajectory.model
        else:
            model = with_weights(problem, outcome.point.weights)
        return merge_segments(
            recorded, parts, model, outcome.result, numbers_of(outcome)
        )

    try:
        outcome = _outcome(more, parts, search, task.max_steps, report)
        recorded = (
            with_refined_records(parts, segment_solver) if ts is None else parts[:1]
        )
    except KeyboardInterrupt as interrupt:
        if not parts:
            raise
        partial = ended(parts, Outcome(RESULTS.interrupted))
        raise TrajectoryInterrupt(partial) from interrupt
    return ended(recorded, outcome)


def _at_one_resolution(problem: Problem, method: Settings) -> Settings:
    """With the absolute tolerance of the start all along, not that of each segment."""
    if method.rtol is None or method.has_atol is None or bool(method.has_atol):
        return method
    weights = ravel_weights(problem, problem.model)
    scale = float(np.sqrt(np.mean(weights**2))) or 1.0
    has_atol = jnp.ones_like(method.has_atol)
    return dataclasses.replace(method, atol=method.rtol * scale, has_atol=has_atol)


def _search(task: Task, method: Settings, restore: Restore) -> _Search:
    problem, dynamics = task.problem, task.dynamics
    assert isinstance(dynamics, GradientFlow)
    weight_decay = dynamics.weight_decay
    start = ravel_weights(problem, problem.model)
    size = float(np.linalg.norm(start))
    resolution = np.finfo(float).eps * size
    if method.atol is not None and bool(method.has_atol):
        resolution = _UNRESOLVED * float(method.atol)
    limit = separation_loss(problem) if weight_decay is None else None
    flat_loss = FlatLoss(problem, weight_decay, task.recorder.laws)
    is_small = start.size <= MAX_WEIGHTS
    return _Search(
        flat_loss,
        size,
        dense_hessian(flat_loss, start) if is_small else None,
        resolution,
        -np.inf if limit is None else limit,
        restore,
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
            candidate = _find_candidate(parts, search)
            next_look = segment.end + min(candidate.wait, segment.end)
            found = candidate.outcome
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
    if not last.is_complete or sum(part.is_complete for part in parts) < _MIN_SEGMENTS:
        return False
    highest, before, here = (
        search.flat_loss.recorded_value(part.trajectory, i)
        for part, i in ((parts[0], 0), (last, 0), (last, -1))
    )
    rate = (before - here) / (last.end - last.start)
    rounding = _ROUNDING * abs(here)
    return rate * last.end <= _MAX_RELATIVE_FALL * (highest - here) + rounding


class _Candidate(NamedTuple):
    """What is there, and how long it takes until it may be worth to look again."""

    outcome: Outcome
    wait: float = 0.0


def _find_candidate(parts: list[Segment], search: _Search) -> _Candidate:
    """The stationary point next to the flow, unless the flow is about to leave it."""
    nothing = Outcome(RESULTS.end_not_reached)
    weights = ravel_weights(search.flat_loss.problem, parts[-1].trajectory.model)
    size = max(search.size_at_start, float(np.linalg.norm(weights))) or 1.0
    flat_loss, scale, analyze = _make_analyzer(search, weights, size)
    resolution = search.resolution / float(np.max(scale))
    try:
        point = analyze(weights / scale)
        if point.unstable > resolution:
            return _Candidate(nothing, 1 / abs(point.lowest))
        if np.linalg.norm(scale * point.step) > HANDOVER_STEP * size:
            return _Candidate(nothing)
        polished = polish(analyze, point, MAX_POLISH * HANDOVER_STEP * size, scale)
        on_laws = analyze(search.restore(scale * polished.weights) / scale)
    except FloatingPointError:
        return _Candidate(nothing)
    if on_laws.is_stationary:
        polished = on_laws
    highest = flat_loss.recorded_value(parts[0].trajectory, 0)
    verdict, explained = classify(flat_loss, polished, highest)
    if verdict == StationaryKind.strict_saddle:
        moved = polished.weights + polished.step - weights / scale
        away = polished.unstable_length(moved)
        if away > resolution:
            return _Candidate(nothing, 1 / abs(polished.lowest))
    polished = polished.in_units_of_weights(scale)
    distance = float(np.linalg.norm(polished.weights - weights)) / size
    return _Candidate(
        Outcome(RESULTS.successful, verdict, polished, explained, distance)
    )


class _Analysis(NamedTuple):
    flat_loss: FlatLoss
    scale: np.ndarray
    analyze: Analyzer


def _make_analyzer(search: _Search, weights: np.ndarray, size: float) -> _Analysis:
    """What tells stationary points apart, in units of weights in which it sees best."""
    flat_loss, ones = search.flat_loss, np.ones_like(weights)
    before = search.hessian_at_start
    if before is None:
        return _Analysis(flat_loss, ones, make_krylov_analyzer(flat_loss, size))
    # With the curvatures at the start: those that have vanished since stay small.
    hessian = dense_hessian(flat_loss, weights)
    rounding = rounding_of_hessian(flat_loss, weights, hessian)
    scale = balanced_units(before, hessian, rounding=rounding)
    if scale is None:
        norm = float(np.linalg.norm(before))
        return _Analysis(flat_loss, ones, make_dense_analyzer(flat_loss, size, norm))
    scaled = dataclasses.replace(flat_loss, scale=jnp.asarray(scale))
    size = float(np.linalg.norm(weights / scale)) or 1.0
    return _Analysis(scaled, scale, make_dense_analyzer(scaled, size))


def numbers_of(outcome: Outcome) -> dict[str, Any]:
    """What `stats` says of the point; NaN and −1 where there is none."""
    point = outcome.point
    nan = float("nan")

    def value_of(name: str) -> Array:
        return jnp.asarray(nan if point is None else getattr(point, name))

    zeros = -1 if point is None or point.zeros is None else point.zeros
    return {
        "stationary_kind": outcome.verdict,
        "stationary_loss": value_of("loss"),
        "gradient_norm": value_of("grad_norm"),
        "smallest_eigenvalue": value_of("lowest"),
        "largest_eigenvalue": value_of("largest"),
        "eigenvalue_threshold": value_of("zero"),
        "zero_eigenvalues": jnp.asarray(zeros),
        "symmetry_zero_eigenvalues": jnp.asarray(outcome.explained),
        "polish_distance": jnp.asarray(outcome.distance),
        # Of a direction that is found beyond: `_methods/margin`.
        **dict.fromkeys(_OF_DIRECTION, jnp.asarray(nan)),
    }
