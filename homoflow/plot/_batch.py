"""Runs as pictures take them: one, or many that were vmapped."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .._jax._arguments import check_instance
from .._jax._enumerations import member_indices
from .._results._trajectory import Trajectory

Runs = Mapping[str, Trajectory]

#: Between these quantiles over the runs of a batch lies its band.
_QUANTILES = (0.1, 0.9)
_TRAJECTORY = "a trajectory, which `homoflow.flow` and `homoflow.descend` return"


class Series(NamedTuple):
    """A quantity over time: of one run, or the median and a band of many."""

    ts: np.ndarray
    values: np.ndarray
    band: tuple[np.ndarray, np.ndarray] | None


def named_runs(runs: Any) -> Runs:
    """Trajectories by their labels, or an error that says what to write."""
    if not isinstance(runs, Mapping):
        raise TypeError(
            'Pass trajectories by their labels, such as `{"flow": run}`; got '
            f"{type(runs).__name__}."
        )
    for label, run in runs.items():
        check_instance(f"runs[{label!r}]", run, Trajectory, _TRAJECTORY)
    return runs


def refuse_batch(trajectory: Trajectory) -> None:
    """`ValueError` for many runs where a picture shows one."""
    check_instance("trajectory", trajectory, Trajectory, _TRAJECTORY)
    if np.ndim(trajectory.ts) != 1:
        raise ValueError(
            "This is a batch of runs: take one out of it first, "
            "`jax.tree.map(lambda a: a[0] if eqx.is_array(a) else a, sweep)`."
        )


def note_of(run: Trajectory) -> str | None:
    """What is drawn of a batch, and of how many runs; `None` for a single run."""
    results = member_indices(run.result)
    if not results.ndim:
        return None
    low, high = (round(100 * q) for q in _QUANTILES)
    unfinished = int(np.sum(results != 0))
    left = f" ({unfinished} unfinished)" if unfinished else ""
    return f"median, {low}–{high} % of {results.size} runs{left}"


def label_of(label: str, run: Trajectory) -> str:
    """The label; that of a batch has a second line, with what is drawn of it."""
    note = note_of(run)
    return label if note is None else f"{label}\n{note}"


def series_of(run: Trajectory, values: Any) -> Series:
    """What is drawn of one number over time, of all runs of a batch."""
    ts, values = np.asarray(run.ts), np.asarray(values)
    if ts.ndim == 1:
        return Series(ts, values, None)
    ts, values = (array.reshape(-1, array.shape[-1]) for array in (ts, values))
    known = ts[np.all(np.isfinite(ts), axis=1)]
    if not len(known) or np.any(np.abs(known - known[0]) > 1e-6 * np.abs(known[0])):
        raise ValueError(
            "The runs of this batch were recorded at different times: a median at one "
            "time needs the same `ts` for all. Draw them one by one, "
            "`jax.tree.map(lambda a: a[i] if eqx.is_array(a) else a, sweep)`."
        )
    low, middle, high = _quantiles(values, (_QUANTILES[0], 0.5, _QUANTILES[1]))
    return Series(known[0], middle, (low, high))


def _quantiles(values: np.ndarray, at: tuple[float, ...]) -> np.ndarray:
    """Quantiles at each time over the runs that have a finite value there."""
    quantiles = np.full((len(at), values.shape[1]), np.nan)
    for i, column in enumerate(values.T):
        known = column[np.isfinite(column)]
        if known.size:
            quantiles[:, i] = np.quantile(known, at)
    return quantiles
