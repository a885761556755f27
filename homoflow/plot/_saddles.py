"""Saddles as plateaus of the loss."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from .._results._saddle import Saddle
from .._results._trajectory import Trajectory
from ._axes import COLOURS, axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def saddles(
    run: Trajectory, found: Sequence[Saddle], *, ax: "Axes | None" = None
) -> "Axes":
    """The loss over time, with a line for each saddle from its arrival to its departure.

    The label says its rank (the least over its matrices), or how many weights are active
    where there are no matrices, and its smallest eigenvalue λ.

    **Arguments:** a run, and `found` as `homoflow.saddles(run, data)` returns it.

    ```python
    hf.plot.saddles(run, hf.saddles(run, data))
    ```
    """
    ax = axes_or_new(ax)
    ts, losses = np.asarray(run.ts), np.asarray(run.losses)
    ax.plot(ts, losses, color=COLOURS[0])
    height = float(np.nanmax(losses) - np.nanmin(losses))
    for saddle in found:
        left = saddle.departure if np.isfinite(saddle.departure) else float(ts[-1])
        ax.plot(
            [saddle.arrival, left], [saddle.loss] * 2, color=COLOURS[1], linewidth=3
        )
        ax.axvline(left, color="0.8", linewidth=0.8, zorder=0)
        ax.text(
            left + 0.01 * float(ts[-1] - ts[0]),
            saddle.loss + 0.01 * height,
            _label(saddle),
            fontsize="small",
            va="bottom",
        )
    ax.set(xlabel="time t", ylabel="loss L(w)")
    ax.set_ylim(top=float(np.nanmax(losses)) + 0.12 * height)
    return ax


def _label(saddle: Saddle) -> str:
    curvature = f"λ = {saddle.smallest_eigenvalue:.2g}".replace("-", "−")
    if saddle.ranks:
        return f"rank {min(saddle.ranks.values())}, {curvature}"
    active = sum(int(np.sum(leaf)) for leaf in jax.tree.leaves(saddle.active))
    return f"{active} active, {curvature}"
