"""A descent at the edge of stability, and the flow around which it oscillates."""

from typing import TYPE_CHECKING, Any

import numpy as np

from .._observe._sharpness import TopEigenvalues
from .._results._trajectory import Trajectory
from ._axes import COLOURS, draw_legend
from ._batch import refuse_batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DESCENT, _FLOW = COLOURS[4], COLOURS[1]


def edge(
    central: Trajectory,
    descent: Trajectory,
    law: str,
    *,
    component: int | tuple[int, ...] = (),
) -> "tuple[Axes, Axes, Axes]":
    """Sharpness, loss and a law along a descent and its `homoflow.central_flow`.

    In three panels, one above the other: the eigenvalues of the Hessian at the central
    weights, with the threshold dotted if it is reached, and those of the descent, if it
    recorded `homoflow.observe.Sharpness`; the loss of the descent, and its predicted
    mean; the change of one law, and its predicted mean.

    **Arguments:**

    - `law`: the law's name; `component`: which entry of it, if it has more than one.

    **Raises:** `KeyError` if a run did not record the law, or `central` is not of
    `homoflow.central_flow`; `ValueError` for a batch, and for a law of which `component`
    leaves more than a number.

    ```python
    hf.plot.edge(central, gd, "neurons[1]", component=0)
    ```
    """
    import matplotlib.pyplot as plt

    for run in (central, descent):
        refuse_batch(run)
    if "oscillation" not in central.observed:
        raise KeyError("The first run must be one of `homoflow.central_flow`.")
    for run in (central, descent):
        if law not in run.laws:
            raise KeyError(
                f"There is no law {law!r} in a run: the names are {list(run.laws)}."
            )
    mean = central.observed["mean"]
    axes = plt.subplots(3, figsize=(6, 7), sharex=True, layout="constrained")[1]
    _draw_spectrum(axes[0], central, descent)
    axes[1].plot(descent.ts, descent.losses, color=_DESCENT, lw=0.8, label="descent")
    axes[1].plot(central.ts, mean.losses, color=_FLOW, label="predicted mean")
    axes[1].set(yscale="log", ylabel="loss L(w)")
    axes[2].plot(
        descent.ts,
        _change(descent.laws[law], component),
        color=_DESCENT,
        lw=0.8,
        label="descent",
    )
    axes[2].plot(
        central.ts,
        _change(mean.laws[law], component),
        color=_FLOW,
        label="predicted mean",
    )
    axes[2].set(xlabel="time t", ylabel=f"change of {law}")
    for ax in axes:
        draw_legend(ax)
    return tuple(axes)


def _draw_spectrum(ax: "Axes", central: Trajectory, descent: Trajectory) -> None:
    seen = _sharpness_of(descent)
    if seen is not None:
        every, values = seen
        ax.plot(descent.ts[::every], values, color=_DESCENT, lw=0.8, label="descent")
    spectrum = np.asarray(central.observed["spectrum"])
    for number, values in enumerate(spectrum.T):
        if np.any(np.isfinite(values)):
            label = "central flow" if number == 0 else None
            ax.plot(central.ts, values, color=_FLOW, label=label)
    at_edge = np.asarray(central.observed["critical"]) > 0
    if np.any(at_edge):  # Where no eigenvalue is there, the run does not show it.
        threshold = np.nanmax(spectrum[at_edge])
        ax.axhline(threshold, color="black", linestyle=":", lw=1, label="threshold")
    ax.set(ylabel="eigenvalues of ∇²L")


def _sharpness_of(run: Trajectory) -> tuple[int, np.ndarray] | None:
    for name, values in run.observed.items():
        if isinstance(values, TopEigenvalues):
            return dict(run.observed_every)[name], np.asarray(values.values[:, 0])
    return None


def _change(values: Any, component: int | tuple[int, ...]) -> np.ndarray:
    index = component if isinstance(component, tuple) else (component,)
    entry = np.asarray(values)[(slice(None), *index)]
    if entry.ndim != 1:
        raise ValueError(
            f"The law has values of shape {entry.shape[1:]}: say which entry to draw, as "
            "`component`."
        )
    return entry - entry[0]
