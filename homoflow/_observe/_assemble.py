"""A trajectory from what a run recorded, the same way for every kind of run."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from .._problem._problem import Problem
from .._results._events import Events
from .._results._ledger import Ledger
from .._results._stats import Facts, Stats
from .._results._status import RESULTS
from .._results._trajectory import Trajectory, masked_after
from ._observables import Observation


def recorded_trajectory(
    problem: Problem,
    ts: Float[Array, " times"],
    seen: Observation,
    valid: Bool[Array, " times"],
    *,
    final: PyTree,
    saved: PyTree | None,
    result: RESULTS,
    numbers: dict[str, Array],
    facts: Facts,
    events: Events | None = None,
    ledger: Ledger | None = None,
) -> Trajectory:
    """`seen` at `ts`, NaN where not `valid`; `final` and `saved` are trained weights.

    To `numbers` and `facts` are added what every run can say of its laws.
    """
    violation = jnp.max(jnp.where(valid, seen.law_violation, 0))
    frozen = problem.frozen
    trajectory = Trajectory(
        ts=ts,
        losses=seen.loss,
        laws=seen.laws,
        grad_norms=seen.grad_norm,
        squared_norms=seen.squared_norms,
        model=eqx.combine(final, frozen),
        models=None if saved is None else eqx.combine(saved, frozen),
        result=result,
        stats=Stats(
            {**numbers, "law_violation": violation},
            (*facts, ("laws_note", problem.laws.note)),
        ),
        events=events,
        ledger=ledger,
    )
    return masked_after(trajectory, valid)
