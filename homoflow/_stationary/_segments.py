"""A flow without end, in segments that double in length."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._diffrax_flow import diffrax_flow
from .._dynamics import GradientFlow
from .._method import Method
from .._problem import Problem
from .._span import Span
from .._trajectory import RESULTS, Trajectory

#: Steps after which a segment ends before its time, so that records are as dense as
#: steps are, and an interruption need not wait; and how many times it records.
_MOST_STEPS, _RECORDS = 64, 32
_GROWTH = 2.0


class Segment(NamedTuple):
    """A part of a flow, from `start` to `end`; its trajectory's clock starts at 0.

    `is_complete`: it ended at its time, not because of its number of steps.
    """

    start: float
    end: float
    is_complete: bool
    trajectory: Trajectory

    @property
    def steps(self) -> int:
        """All of them, rejected ones too."""
        stats = self.trajectory.stats
        return int(stats["steps"] + stats["rejected_steps"])


def segments(
    problem: Problem,
    method: Method,
    dynamics: GradientFlow,
    *,
    ts: Float[Array, " times"] | None,
    max_steps: int,
    save_models: bool,
) -> Iterator[Segment]:
    """The flow from t = 0 on, without end; with `ts`, the first segment records these."""

    def run(length: float, times: Array, most_steps: int) -> Trajectory:
        return diffrax_flow(
            problem,
            Span(jnp.asarray(length, problem.dtype), times),
            method,
            dynamics=dynamics,
            max_steps=most_steps,
            save_models=save_models,
            adjoint=None,
            estimate_error=False,
            progress=False,
        ).trajectory

    start, length, step = 0.0, 1.0, 1 / _RECORDS
    if ts is not None:
        length = float(ts[-1])
        flow = run(length, ts, max_steps)
        yield (segment := _segment(start, length, flow))
        problem, start = _moved(problem, flow), segment.end
    fractions = jnp.linspace(0, 1, _RECORDS, dtype=problem.dtype)
    while np.isfinite(length):
        if method.controller is None:
            method = dataclasses.replace(method, dt0=jnp.asarray(step, problem.dtype))
        flow = run(length, length * fractions, _MOST_STEPS)
        yield (segment := _segment(start, length, flow))
        problem, start = _moved(problem, flow), segment.end
        reached = length if segment.is_complete else float(flow.stats["time_reached"])
        step = reached / max(1, int(flow.stats["steps"]))
        length = reached * (_GROWTH if segment.is_complete else 1 / _GROWTH)


def _segment(start: float, length: float, flow: Trajectory) -> Segment:
    end = start + float(flow.stats["time_reached"])
    return Segment(start, end, bool(flow.result == RESULTS.successful), flow)


def _moved(problem: Problem, flow: Trajectory) -> Problem:
    return eqx.tree_at(lambda p: p.model, problem, flow.model)
