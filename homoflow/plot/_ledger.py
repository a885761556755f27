"""A picture of a ledger: what changed a law, part by part."""

from typing import TYPE_CHECKING

import numpy as np

from .._results._ledger import PARTS, Account
from .._results._trajectory import Trajectory
from ._axes import COLOURS, axes_or_new, draw_legend
from ._batch import refuse_batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def ledger(
    trajectory: Trajectory,
    law: str,
    *,
    component: int | tuple[int, ...] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """What changed one law since the start: the observed change and what it is the sum of.

    A coloured line for each part of the account that the optimizer has, black for the
    observed change; that the parts add up is in the legend, as the largest rounding.
    Needs a run of `homoflow.descend` with `ledger=True`.

    **Arguments:**

    - `law`: its name, such as `"neurons[1]"`.
    - `component`: which entry of a law with several, such as `3` or `(0, 1)`; the one
        that changed most by default.

    Raises `ValueError` for a run without a ledger or for a batch of runs, `KeyError` for
    a law that it has no account of.

    ```python
    hf.plot.ledger(gd, "neurons[1]")
    ```
    """
    account = _account_of(trajectory, law)
    entry = _entry(np.asarray(account.observed), component)
    pick = (slice(None), *entry)
    ax = axes_or_new(ax)
    ax.axhline(0, color="0.7", linewidth=0.8)
    observed = np.asarray(account.observed)[pick]
    ax.plot(trajectory.ts, observed, color="black", linewidth=2.4, label="observed")
    for i, name in enumerate(PARTS):
        if name in account.parts:
            values = np.asarray(account.parts[name])[pick]
            style = "--" if name == "gradient" else "-"
            ax.plot(
                trajectory.ts, values, label=name, color=COLOURS[i], linestyle=style
            )
    rounding = np.nanmax(np.abs(np.asarray(account.rounding)[pick]))
    ax.plot([], [], " ", label=f"rounding ≤ {rounding:.1g}")
    which = f", entry {', '.join(map(str, entry))}" if entry else ""
    ax.set(xlabel="time t", ylabel=f"change of {law}{which}")
    draw_legend(ax)
    return ax


def _account_of(trajectory: Trajectory, law: str) -> Account:
    if trajectory.ledger is None:
        raise ValueError(
            "This run kept no ledger: ask for it with `homoflow.descend(..., "
            "ledger=True)`."
        )
    refuse_batch(trajectory)
    return trajectory.ledger[law]


def _entry(
    observed: np.ndarray, component: int | tuple[int, ...] | None
) -> tuple[int, ...]:
    """A law's entry by its index; of the largest change if none is given."""
    shape = observed.shape[1:]
    if component is None:
        largest = np.nanmax(np.abs(observed), axis=0)
        return tuple(int(i) for i in np.unravel_index(np.argmax(largest), shape))
    entry = component if isinstance(component, tuple) else (component,)
    if len(entry) != len(shape):
        raise ValueError(
            f"`component` must have {len(shape)} indices, one for each axis of a law of "
            f"shape {shape}; got {component}."
        )
    return entry
