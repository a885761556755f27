"""A flow without end, in segments that double in length."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..._observe._time_grid import TimeGrid
from ..._problem._problem import Problem
from ..._results._status import RESULTS
from ..._results._trajectory import Trajectory
from .._integrate import integrate
from .._settings import Settings
from .._task import Task
from ._flat_loss import ravel_weights, with_weights
from ._restore_laws import Restore

#: Steps after which a segment ends before its time, so that records are as dense as
#: steps are, and an interruption need not wait; and how many times it records.
_MAX_STEPS, RECORDS = 64, 32
_GROWTH = 2.0


class Segment(NamedTuple):
    """A part of a flow, from `start` to `end`; its trajectory's clock starts at 0.

    `problem` has the weights at its start, `step` is about the first step that it took.
    `is_complete`: it ended at its time, not because of its number of steps.
    """

    problem: Problem
    start: float
    end: float
    step: float
    is_complete: bool
    trajectory: Trajectory

    @property
    def steps(self) -> int:
        """All of them, rejected ones too."""
        stats = self.trajectory.stats
        return int(stats["steps"] + stats["rejected_steps"])


@dataclasses.dataclass(frozen=True)
class SegmentSolver:
    """How a flow is integrated, but for where it starts and how far it goes.

    `restore` is what is done to the weights at the end of each segment.
    """

    task: Task
    settings: Settings
    restore: Restore

    def solve(
        self,
        problem: Problem,
        start: float,
        times: Float[np.ndarray, " times"],
        step: float,
        *,
        max_segment_steps: int = _MAX_STEPS,
    ) -> Segment:
        """From `problem`'s weights at time `start`, recorded at `times` after that."""
        settings, dtype = self.settings, problem.dtype
        if settings.controller is None:
            settings = dataclasses.replace(settings, dt0=jnp.asarray(step, dtype))
        zero, *ends = (jnp.asarray(t, dtype) for t in (0.0, times[-1], times))
        task = dataclasses.replace(
            self.task,
            problem=problem,
            grid=TimeGrid(zero, *ends),
            max_steps=max_segment_steps,
            estimate_error=False,
            progress=False,
        )
        flow = integrate(task, settings, adjoint=None)
        end = start + float(flow.stats["time_reached"])
        is_complete = bool(flow.result == RESULTS.successful)
        return Segment(problem, start, end, step, is_complete, flow)

    def next_problem(self, segment: Segment) -> Problem:
        """The problem with the weights from which the flow goes on after a segment."""
        problem = segment.problem
        flat = self.restore(ravel_weights(problem, segment.trajectory.model))
        weights = eqx.filter(with_weights(problem, flat), problem.mask)
        return eqx.tree_at(lambda p: p.weights, problem, weights)


def segments(
    problem: Problem,
    segment_solver: SegmentSolver,
    *,
    ts: np.ndarray | None,
    max_steps: int,
) -> Iterator[Segment]:
    """The flow from t = 0 on, without end; with `ts`, the first segment records these."""
    start, length = 0.0, 1.0 if ts is None else float(ts[-1])
    dt0 = segment_solver.settings.dt0
    step = length / RECORDS if dt0 is None else float(dt0)
    if ts is not None:
        segment = segment_solver.solve(
            problem, start, ts, step, max_segment_steps=max_steps
        )
        yield segment
        problem, start = segment_solver.next_problem(segment), segment.end
        task = dataclasses.replace(segment_solver.task, save_models=False)
        segment_solver = dataclasses.replace(segment_solver, task=task)
    while np.isfinite(length):
        times = np.linspace(0, length, RECORDS)
        segment = segment_solver.solve(problem, start, times, step)
        yield segment
        problem, start = segment_solver.next_problem(segment), segment.end
        stats = segment.trajectory.stats
        reached = length if segment.is_complete else float(stats["time_reached"])
        step = reached / max(1, int(stats["steps"]))
        length = reached * (_GROWTH if segment.is_complete else 1 / _GROWTH)
