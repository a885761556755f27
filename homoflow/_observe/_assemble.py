"""A trajectory from what a run recorded, the same way for every kind of run."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from .._problem._problem import Problem
from .._results._events import Events
from .._results._ledger import Ledger
from .._results._stats import Stats
from .._results._status import RESULTS
from .._results._trajectory import Trajectory, masked_after, nan_unless
from ._recorder import STANDARD, Recorder, Values


def make_trajectory(
    problem: Problem,
    recorder: Recorder,
    ts: Float[Array, " times"],
    values: Values,
    valid: Bool[Array, " times"] | None,
    *,
    final: PyTree,
    saved: PyTree | None,
    result: RESULTS,
    numbers: dict[str, Any],
    events: Events | None = None,
    ledger: Ledger | None = None,
    continuation: PyTree | None = None,
) -> Trajectory:
    """The trajectory of `values` over `ts`, NaN where not `valid`.

    `final` and `saved` are trained weights, at the end and at all times. To `numbers` is
    added what every run can say of its laws. Without `valid` all that is the caller's.
    """
    if valid is not None:
        violation = jnp.max(jnp.where(valid, values["law_violation"], 0))
        numbers = {**numbers, "law_violation": violation}
    observed = {k: v for k, v in values.items() if k not in STANDARD}
    trajectory = Trajectory(
        ts=ts,
        losses=values["losses"],
        laws=values["laws"],
        grad_norms=values["grad_norms"],
        squared_norms=values["squared_norms"],
        observed=observed,
        observed_every=tuple((name, recorder.every[name]) for name in observed),
        model=problem.model_at(final),
        # What is not trained is there once, and as good after a failure as before.
        models=None
        if saved is None or valid is None
        else eqx.combine(nan_unless(valid, saved), problem.frozen),
        result=result,
        stats=Stats(
            numbers,
            (("time_unit", "flow time"), ("laws_note", recorder.laws.note)),
        ),
        events=events,
        ledger=ledger,
        continuation=continuation,
    )
    return trajectory if valid is None else masked_after(trajectory, valid)
