"""One trajectory from the segments of a flow."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from ..._observe._time_grid import DEFAULT_TIMES
from ..._results._stats import Stats
from ..._results._status import RESULTS
from ..._results._totals import totals
from ..._results._trajectory import Trajectory
from ._segments import RECORDS, Segment, SegmentSolver

#: The change of the loss between two records, relative to its range, for which to look
#: again, and how often.
_CHANGE, _MAX_REFINEMENTS = 0.05, 2
#: The loss above its last value that is rounding, relative to the largest.
_ROUNDING = 1e-12


def merge_segments(
    recorded: Sequence[Segment],
    parts: Sequence[Segment],
    model: PyTree,
    result: RESULTS,
    numbers: dict[str, Any],
) -> Trajectory:
    """The trajectory that ends with `model`, with `numbers` beside those of its `parts`.

    Of what was `recorded` it keeps times between which much the same happens.
    """
    times, series = _in_order(recorded)
    chosen = _spread(times, series[0])
    losses, laws, grad_norms, squared_norms, observed, trained = jax.tree.map(
        lambda values: jnp.asarray(values[chosen]), series
    )
    frozen = recorded[0].problem.frozen
    return Trajectory(
        ts=jnp.asarray(times[chosen]),
        losses=losses,
        laws=laws,
        grad_norms=grad_norms,
        squared_norms=squared_norms,
        observed=observed,
        model=model,
        models=None if trained is None else eqx.combine(trained, frozen),
        result=result,
        stats=Stats(
            {
                **totals([part.trajectory for part in parts]),
                "time_reached": jnp.asarray(parts[-1].end),
                **numbers,
            },
            parts[-1].trajectory.stats.facts,
        ),
    )


def with_refined_records(
    parts: Sequence[Segment], segment_solver: SegmentSolver
) -> list[Segment]:
    """The segments, and more records where the loss has changed from one to the next.

    In segments they are evenly spaced, and leaving a saddle takes little of the time.
    """
    recorded = list(parts)
    for _ in range(_MAX_REFINEMENTS):
        times, series = _in_order(recorded)
        losses = series[0]
        steep = np.abs(np.diff(losses)) > _CHANGE * np.ptp(losses)
        for before, after in zip(times[:-1][steep], times[1:][steep], strict=True):
            part = max((p for p in parts if p.start <= before), key=lambda p: p.start)
            closer = np.linspace(before, after, RECORDS) - part.start
            recorded.append(
                segment_solver.solve(part.problem, part.start, closer, part.step)
            )
    return recorded


def _in_order(
    recorded: Sequence[Segment],
) -> tuple[Float[np.ndarray, " records"], PyTree]:
    """All known records: their times, and what there is at these."""
    runs = [part.trajectory for part in recorded]
    mask = recorded[0].problem.mask

    def trained(run: Trajectory) -> PyTree:
        """Of the models what is there at every time."""
        return None if run.models is None else eqx.filter(run.models, mask)

    times = np.concatenate([p.start + np.asarray(p.trajectory.ts) for p in recorded])
    series = jax.tree.map(
        lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]),
        *[
            (r.losses, r.laws, r.grad_norms, r.squared_norms, r.observed, trained(r))
            for r in runs
        ],
    )
    # Where a segment took too many steps, the rest is NaN; each begins where the last one
    # ended; and the clock cannot tell very short ones from that.
    known = np.flatnonzero(np.isfinite(series[0]))
    known = known[np.argsort(times[known], kind="stable")]
    known = known[np.diff(times[known], prepend=-1.0) > 0]
    return times[known], jax.tree.map(lambda values: values[known], series)


def _spread(
    times: Float[np.ndarray, " records"], losses: Float[np.ndarray, " records"]
) -> Int[np.ndarray, " times"]:
    """Indices of some times, the first and the last among them.

    What lies between two of them is an equal share, in the mean, of the time, of the
    loss, and of the logarithms of the time and of the loss above its last value.
    """
    count, most = len(times), DEFAULT_TIMES
    if count <= most:
        return np.arange(count)
    progress = np.zeros(count)
    logarithm = np.log(np.maximum(times, times[1]))
    excess = np.abs(losses - losses[-1])
    decades = np.log(excess + _ROUNDING * np.max(excess) + np.finfo(float).tiny)
    for measure in (times, logarithm, losses, decades):
        passed = np.append(0.0, np.cumsum(np.abs(np.diff(measure))))
        progress += passed / max(passed[-1], np.finfo(float).tiny)
    wanted = np.searchsorted(progress, np.linspace(0, progress[-1], most))
    # Each once: no earlier than the one before allows, no later than those after need.
    chosen = np.minimum(wanted, count - most + np.arange(most))
    for i in range(1, most):
        chosen[i] = max(chosen[i], chosen[i - 1] + 1)
    chosen[-1] = count - 1
    return chosen
