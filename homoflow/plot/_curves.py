"""Losses, drifts of laws and norms over time, of runs and of batches of runs."""

from typing import TYPE_CHECKING

import numpy as np

from .._results._trajectory import Trajectory
from ._axes import axes_or_new, draw_legend, line_style
from ._batch import Runs, Series, label_of, named_runs, note_of, series_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def losses(runs: Runs, *, ax: "Axes | None" = None) -> "Axes":
    """The loss of each run over the flow's time, on a logarithmic axis.

    Of a batch of runs (vmap over seeds, say) the median over them at each time, and a band
    between the quantiles of 10 and 90 %; the legend has their number.

    **Raises:** `ValueError` if the runs of a batch were recorded at different times.

    ```python
    hf.plot.losses({"flow": flow, "gradient descent": gd})
    ```
    """
    runs = named_runs(runs)
    drawn = [series_of(run, run.losses) for run in runs.values()]
    ax = axes_or_new(ax)
    for i, (label, run) in enumerate(runs.items()):
        _draw(ax, drawn[i], label_of(label, run), i, i)
    ax.set_yscale("log")
    ax.set(xlabel="time t", ylabel="loss L(w)")
    draw_legend(ax)
    return ax


def law_drift(runs: Runs, name: str, *, ax: "Axes | None" = None) -> "Axes":
    """max |h(t) − h(0)| over the components of one law, on a logarithmic axis.

    Zero (at t = 0, say) cannot be shown on it and is left out. Batches are drawn as by
    `losses`. Raises `KeyError` if a run did not record the law.

    ```python
    hf.plot.law_drift({"flow": flow, "gradient descent": gd}, "neurons[1]")
    ```
    """
    runs = named_runs(runs)
    for label, run in runs.items():
        if name not in run.laws:
            raise KeyError(
                f"{label!r} has no law {name!r}: the names are {list(run.laws)}."
            )
    drawn = [series_of(run, _drift(run, name)) for run in runs.values()]
    ax = axes_or_new(ax)
    for i, (label, run) in enumerate(runs.items()):
        _draw(ax, _without_zeros(drawn[i]), label_of(label, run), i, i)
    ax.set_yscale("log")
    ax.set(xlabel="time t", ylabel=f"largest change of {name}")
    draw_legend(ax)
    return ax


def squared_norms(runs: Runs, *, ax: "Axes | None" = None) -> "Axes":
    """The squared Frobenius norm of every trained array over time.

    A colour for each array, a line style for each run. Batches are drawn as by `losses`.

    ```python
    hf.plot.squared_norms({"flow": flow})
    ```
    """
    runs = named_runs(runs)
    drawn = {
        (label, path): series_of(run, values)
        for label, run in runs.items()
        for path, values in run.squared_norms.items()
    }
    ax = axes_or_new(ax)
    for i, (label, run) in enumerate(runs.items()):
        for j, path in enumerate(run.squared_norms):
            name = path if len(runs) == 1 else f"{path}, {label}"
            _draw(ax, drawn[label, path], name, j, i)
        note = note_of(run)
        if note is not None:
            ax.plot([], [], " ", label=f"{label}:\n{note}")
    ax.set(xlabel="time t", ylabel="squared norm ‖W‖²")
    draw_legend(ax)
    return ax


def _drift(run: Trajectory, name: str) -> np.ndarray:
    """The largest change of a law's components since the first time, of every run."""
    values, shape = np.asarray(run.laws[name]), np.shape(run.ts)
    values = values.reshape(*shape, -1)
    return np.abs(values - values[..., :1, :]).max(axis=-1)


def _without_zeros(series: Series) -> Series:
    def masked(values: np.ndarray) -> np.ndarray:
        return np.where(values > 0, values, np.nan)

    band = series.band
    shown = None if band is None else (masked(band[0]), masked(band[1]))
    return Series(series.ts, masked(series.values), shown)


def _draw(ax: "Axes", series: Series, label: str, colour: int, style: int) -> None:
    look = line_style(colour, style)
    ax.plot(series.ts, series.values, label=label, **look)
    if series.band is not None:
        ax.fill_between(
            series.ts, *series.band, color=look["color"], alpha=0.2, linewidth=0
        )
