"""Plateaus of a recorded flow, and the saddles behind them."""

import itertools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..._laws import Laws
from ..._problem._problem import Problem
from ..._results._saddle import Saddle
from ..._results._stationary_kind import StationaryKind
from ..._results._trajectory import Trajectory
from ._critical_point import CriticalPoint
from ._dense_hessian import MAX_WEIGHTS, dense_hessian, make_dense_analyzer
from ._flat_loss import FlatLoss, with_weights
from ._polish import polish

#: On a plateau ‖∇L‖ is below this share of what it is before or after.
_SLOW = 0.3
#: A fall of the loss from one record to the next, relative to its range, that is one to
#: another plateau where it is also so many times what dL/dt = −‖∇L‖² at both says.
_JUMP, _HIDDEN = 0.02, 10.0
#: How far the flow may be from a saddle, relative to the largest ‖w‖, and by how much of
#: the range of losses its loss may differ.
_MAX_DISTANCE, _MAX_CHANGE = 0.2, 0.05
#: ‖∇L‖ at a saddle, relative to the largest on the way.
_MAX_SLOPE = 1e-3
#: The share of the loss's fall to the next plateau at which the way out is looked at.
_SEEN = 1e-3
#: Away from a saddle curvatures count as zero that are below 100·‖∇L‖/‖w‖: here they are
#: looked at from so many times closer, as plateaus of not so small starts are.
_RESOLVED = 30.0
#: Curvatures are negative from this share of ‖∇²L‖ at the end on: where they vanish,
#: Newton's method converges slowly, and leaves some.
_NEGATIVE = 1e-6
#: Saddles of losses as close as this, relative to their range, are one.
_SAME = 1e-4


class _Plateau(NamedTuple):
    """A record where the flow is slowest, and the stationary point next to it."""

    record: int
    point: CriticalPoint
    distance: float
    norm_at_end: float

    @property
    def negative(self) -> np.ndarray:
        """Which eigenvalues are below 0, by more than Newton's method leaves."""
        limit = max(self.point.zero, _NEGATIVE * self.norm_at_end)
        return self.point.values < -limit


def why_no_saddles(problem: Problem, trajectory: Trajectory) -> str | None:
    """Why the saddles of a run cannot be found; `None` if they can."""
    if trajectory.models is None:
        return "they are looked for at the recorded models: pass `save_models=True`"
    if problem.num_weights > MAX_WEIGHTS:
        return f"Hessians of more than {MAX_WEIGHTS:,} weights take too long"
    if np.ndim(trajectory.ts) != 1:
        return "they are those of one run, not of a batch"
    if len(trajectory.ts) < 3:
        return "a plateau takes three recorded times or more"
    return None


def find_saddles(
    problem: Problem, trajectory: Trajectory, tolerance: float
) -> list[Saddle]:
    """The saddles of a run with all its models, in order."""
    known = np.flatnonzero(np.isfinite(np.asarray(trajectory.losses)))
    losses = np.asarray(trajectory.losses)[known]
    ts = np.asarray(trajectory.ts)[known]
    slopes = np.asarray(trajectory.grad_norms)[known]
    states = _states(problem, trajectory)[known]
    plateaus = _plateaus(problem, ts, losses, slopes, states)
    found: list[Saddle] = []
    arrival = float(ts[0])
    for now, after in itertools.zip_longest(plateaus, plateaus[1:]):
        left = _left(ts, losses, now, after)
        if left is not None or now.negative.any():
            found.append(_saddle(problem, states, now, arrival, left, tolerance))
        if left is not None:
            arrival = left.time
    return found


def _states(problem: Problem, trajectory: Trajectory) -> np.ndarray:
    """The trained weights at all times, in rows."""
    leaves = jax.tree.leaves(eqx.filter(trajectory.models, problem.mask))
    count = len(trajectory.ts)
    return np.concatenate([np.reshape(leaf, (count, -1)) for leaf in leaves], axis=1)


def _plateaus(
    problem: Problem,
    ts: np.ndarray,
    losses: np.ndarray,
    slopes: np.ndarray,
    states: np.ndarray,
) -> list[_Plateau]:
    flat_loss = FlatLoss(problem, None, Laws(()))
    size = float(np.max(np.linalg.norm(states, axis=1))) or 1.0
    at_end = float(np.linalg.norm(dense_hessian(flat_loss, states[-1])))
    analyze = make_dense_analyzer(flat_loss, _RESOLVED * size, at_end)
    span, ones = float(np.ptp(losses)) or 1.0, np.ones(states.shape[1])
    found: list[_Plateau] = []
    for index in _slow_records(ts, losses, slopes):
        start = analyze(states[index])
        point = polish(analyze, start, _MAX_DISTANCE * size, ones)
        distance = float(np.linalg.norm(point.weights - states[index])) / size
        if point.grad_norm > _MAX_SLOPE * float(np.max(slopes)):
            continue
        if abs(point.loss - losses[index]) > _MAX_CHANGE * span:
            continue
        if found and abs(point.loss - found[-1].point.loss) <= _SAME * span:
            continue
        found.append(_Plateau(int(index), point, distance, at_end))
    return found


def _slow_records(ts: np.ndarray, losses: np.ndarray, slopes: np.ndarray) -> list[int]:
    """Where ‖∇L‖ is least between two times at which it is much larger.

    It was larger, too, between two records of which the second has a much lower loss than
    ‖∇L‖ at both would make it.
    """
    fall = -np.diff(losses)
    fastest = np.maximum(slopes[1:], slopes[:-1])
    is_jump = fall > _JUMP * (np.ptp(losses) or 1.0)
    fell = np.append(is_jump & (fall > _HIDDEN * np.diff(ts) * fastest**2), False)
    found: list[int] = []
    lowest, highest_since, is_falling = 0, 0.0, True
    for i, slope in enumerate(slopes):
        if not is_falling and slope <= _SLOW * highest_since:
            lowest, is_falling = i, True
        if is_falling and slope < slopes[lowest]:
            lowest = i
        after = np.inf if fell[i] else slope
        if is_falling and slopes[lowest] <= _SLOW * after:
            found.append(lowest)
            highest_since, is_falling = after, False
        highest_since = max(highest_since, after)
    return [*found, lowest] if is_falling else found


class _Left(NamedTuple):
    """When a plateau was left, and the record at which that could first be seen."""

    time: float
    error: float
    early: int


def _left(
    ts: np.ndarray, losses: np.ndarray, now: _Plateau, after: _Plateau | None
) -> _Left | None:
    if after is None:
        return None
    half = (now.point.loss + after.point.loss) / 2
    passed = np.flatnonzero(losses[now.record :] < half)
    if not passed.size or passed[0] == 0:
        return None
    second = now.record + int(passed[0])
    first = second - 1
    share = (losses[first] - half) / (losses[first] - losses[second])
    length = ts[second] - ts[first]
    drop = now.point.loss - after.point.loss
    seen = now.point.loss - losses[now.record :] > _SEEN * drop
    early = now.record + int(np.flatnonzero(seen)[0])
    return _Left(float(ts[first] + share * length), float(length) / 2, early)


def _saddle(
    problem: Problem,
    states: np.ndarray,
    plateau: _Plateau,
    arrival: float,
    left: _Left | None,
    tolerance: float,
) -> Saddle:
    point = plateau.point
    is_strict = bool(plateau.negative.any())
    moved = states[plateau.record if left is None else left.early] - point.weights
    way = moved
    if is_strict:
        unstable = point.vectors[:, plateau.negative]
        way = unstable @ (unstable.T @ moved)
    length = float(np.linalg.norm(way)) or 1.0
    model = with_weights(problem, point.weights)
    kinds = StationaryKind
    return Saddle(
        model=model,
        loss=point.loss,
        gradient_norm=point.grad_norm,
        distance=plateau.distance,
        arrival=arrival,
        departure=np.nan if left is None else left.time,
        time_error=np.nan if left is None else left.error,
        kind=kinds.strict_saddle if is_strict else kinds.degenerate_saddle,
        smallest_eigenvalue=point.lowest,
        negative_eigenvalues=int(np.sum(plateau.negative)),
        escape=_trained(problem, way / length),
        ranks=_ranks(problem, model, states, tolerance),
        active=jax.tree.map(
            lambda w: jnp.abs(w) > tolerance * float(np.max(np.abs(states))),
            eqx.filter(model, problem.mask),
        ),
    )


def _trained(problem: Problem, flat: np.ndarray):
    return eqx.filter(with_weights(problem, flat), problem.mask)


def _ranks(
    problem: Problem, model, states: np.ndarray, tolerance: float
) -> dict[str, int]:
    """Of every matrix, how many singular values exceed a share of the end's largest."""
    at_end = with_weights(problem, states[-1])
    trained = eqx.filter(model, problem.mask)
    last = eqx.filter(at_end, problem.mask)
    found = {}
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(trained), jax.tree.leaves(last), strict=True
    )
    for (path, leaf), end in pairs:
        if np.ndim(leaf) == 2:
            largest = np.linalg.norm(np.asarray(end), 2)
            values = np.linalg.svd(np.asarray(leaf), compute_uv=False)
            name = jax.tree_util.keystr(path).lstrip(".")
            found[name] = int(np.sum(values > tolerance * largest))
    return found
