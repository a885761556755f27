"""Pictures of trajectories. Needs matplotlib: `pip install homoflow[plot]`.

Every function takes named trajectories, draws into `ax` (a new figure's by default) and
returns it. Colours are those of Okabe & Ito, which colour-blind readers can tell apart.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ._trajectory import Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Okabe & Ito's palette, without the yellow that vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
#: One line style for each run, so that runs differ in print too.
STYLES = ("-", "--", ":", "-.")

Runs = Mapping[str, Trajectory]


def losses(runs: Runs, *, ax: "Axes | None" = None) -> "Axes":
    """The loss of each run over the flow's time, on a logarithmic axis.

    ```python
    hf.plot.losses({"flow": flow, "gradient descent": gd})
    ```
    """
    ax = _axes(ax)
    for i, (label, run) in enumerate(runs.items()):
        ax.plot(run.ts, run.losses, label=label, **_line(i, i))
    ax.set_yscale("log")
    ax.set(xlabel="time t", ylabel="loss L(w)")
    ax.legend(frameon=False)
    return ax


def law_drift(runs: Runs, name: str, *, ax: "Axes | None" = None) -> "Axes":
    """max |h(t) − h(0)| over the components of one law, on a logarithmic axis.

    Zero (at t = 0, say) cannot be shown on it and is left out. Raises `KeyError` if a run
    did not record the law.

    ```python
    hf.plot.law_drift({"flow": flow, "gradient descent": gd}, "neurons[1]")
    ```
    """
    ax = _axes(ax)
    for i, (label, run) in enumerate(runs.items()):
        values = np.asarray(run.laws[name]).reshape(len(run.ts), -1)
        drift = np.abs(values - values[:1]).max(axis=1)
        ax.plot(run.ts, np.where(drift > 0, drift, np.nan), label=label, **_line(i, i))
    ax.set_yscale("log")
    ax.set(xlabel="time t", ylabel=f"largest change of {name}")
    ax.legend(frameon=False)
    return ax


def squared_norms(runs: Runs, *, ax: "Axes | None" = None) -> "Axes":
    """The squared Frobenius norm of every trained array over time.

    A colour for each array, a line style for each run.

    ```python
    hf.plot.squared_norms({"flow": flow})
    ```
    """
    ax = _axes(ax)
    for i, (label, run) in enumerate(runs.items()):
        for j, (path, values) in enumerate(run.squared_norms.items()):
            name = f"{path}, {label}" if len(runs) > 1 else path
            ax.plot(run.ts, values, label=name, **_line(j, i))
    ax.set(xlabel="time t", ylabel="squared norm ‖W‖²")
    ax.legend(frameon=False)
    return ax


def _axes(ax: "Axes | None") -> "Axes":
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6, 4), layout="constrained")[1]


def _line(colour: int, style: int) -> dict[str, Any]:
    return {
        "color": COLOURS[colour % len(COLOURS)],
        "linestyle": STYLES[style % len(STYLES)],
    }
