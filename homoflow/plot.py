"""Pictures of trajectories. Needs matplotlib: `pip install homoflow[plot]`.

Functions draw into `ax` (a new figure's by default) and return it. Colours are those of
Okabe & Ito or viridis, which colour-blind readers can tell apart.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ._results._events import Events, Slide
from ._results._ledger import PARTS, Account
from ._results._trajectory import Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap

#: Okabe & Ito's palette, without the yellow that vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
#: Points of height that a small label needs.
_READABLE = 6.5
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
    ax = _axes(ax)
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


def sliding(
    trajectory: Trajectory,
    *,
    layer: int | None = None,
    axes: "tuple[Axes, Axes] | None" = None,
) -> "tuple[Axes, Axes]":
    """Which samples pin which units, when: a bar for every stretch of sliding.

    Above, a row for each pair of a sample and a unit that ever slides, grouped by unit
    and coloured by sample; rows are labelled with the sample where they are tall enough
    to be, so a taller figure tells more. Below, how many pairs slide. Needs a run with
    `solver=hf.Filippov(events=…)`.

    **Arguments:**

    - `layer`: the number of the only layer to show (all).
    - `axes`: the two axes to draw into, from top to bottom.

    Returns both axes. If events were dropped the picture ends where they are no longer
    complete. Raises `ValueError` for a run without events, or for a batch of runs.

    ```python
    hf.plot.sliding(exact)
    ```
    """
    events = _events_of(trajectory)
    slides = [
        s
        for s in events.slides()
        if layer is None or events.layer_of(s.kink)[0].number == layer
    ]
    rows = len({(s.kink, s.sample) for s in slides})
    raster, size = _stacked(rows) if axes is None else axes
    _draw_raster(raster, events, slides)
    _draw_size(size, events, slides)
    raster.tick_params(labelbottom=False)
    return raster, size


def sliding_time(trajectory: Trajectory, *, ax: "Axes | None" = None) -> "Axes":
    """For how long each sample pins each unit: units × samples, in the flow's time.

    Only units that ever slide have a row; white is no time at all. Needs a run with
    `solver=hf.Filippov(events=…)`, as `sliding` does.

    ```python
    hf.plot.sliding_time(exact)
    ```
    """
    from matplotlib.ticker import MaxNLocator

    events = _events_of(trajectory)
    total = events.sliding_time()
    kinks = np.flatnonzero(total.sum(0))
    if ax is None:
        ax = _axes(None, height=float(np.clip(1.5 + 0.14 * len(kinks), 2.5, 11)))
    shown = np.where(total > 0, total, np.nan)[:, kinks].T
    colours = _dark_viridis().reversed()
    image = ax.imshow(
        shown, cmap=colours, vmin=0, aspect="auto", interpolation="nearest"
    )
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, aspect=50)
    bar.set_label(f"time spent sliding, of {float(events.complete_until):.4g}")
    ax.set(xlabel="sample")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label_units(ax, events, [int(k) for k in kinks])
    return ax


def _account_of(trajectory: Trajectory, law: str) -> Account:
    if trajectory.ledger is None:
        raise ValueError(
            "This run kept no ledger: ask for it with `homoflow.descend(..., "
            "ledger=True)`."
        )
    if np.ndim(trajectory.ts) != 1:
        raise ValueError(
            "This is a batch of runs: take one out of it first, "
            "`jax.tree.map(lambda a: a[0] if eqx.is_array(a) else a, sweep)`."
        )
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


def _events_of(trajectory: Trajectory) -> Events:
    if trajectory.events is None:
        raise ValueError(
            "This run kept no events: ask for them with "
            "`solver=homoflow.Filippov(events=…)`."
        )
    return trajectory.events


def _stacked(rows: int) -> "tuple[Axes, Axes]":
    import matplotlib.pyplot as plt

    height = float(np.clip(0.16 * rows, 1.5, 9))
    _, axes = plt.subplots(
        2,
        figsize=(7.5, height + 1.8),
        sharex=True,
        layout="constrained",
        height_ratios=(height, 1.2),
    )
    return axes[0], axes[1]


def _draw_raster(ax: "Axes", events: Events, slides: list[Slide]) -> None:
    from matplotlib.collections import LineCollection

    pairs = sorted({(s.kink, s.sample) for s in slides})
    row = {pair: i for i, pair in enumerate(pairs)}
    rows = [row[s.kink, s.sample] for s in slides]
    colours = _sample_colours(events.sample_count)
    of_slides = colours.to_rgba(np.array([s.sample for s in slides]))
    ends = [[(s.start, i), (s.end, i)] for s, i in zip(slides, rows, strict=True)]
    # Also a tick where each begins: the shortest bars are less than a pixel.
    pitch = _points_per_row(ax, len(pairs))
    width = float(np.clip(0.7 * pitch, 0.8, 6))
    bars = LineCollection(ends, colors=of_slides, linewidths=width, capstyle="butt")
    ax.add_collection(bars)
    starts = [s.start for s in slides]
    ax.scatter(starts, rows, s=width**2, c=of_slides, marker="|", linewidths=0.8)
    ax.set_ylim(max(len(pairs), 1) - 0.5, -0.5)
    _label_units(ax, events, [kink for kink, _ in pairs])
    if pitch >= _READABLE:
        right = ax.secondary_yaxis("right")
        samples = [str(sample) for _, sample in pairs]
        right.set_yticks(range(len(pairs)), samples, fontsize=min(8, pitch))
        right.tick_params(length=0)
        right.set_ylabel("sample")
    else:
        ax.figure.colorbar(colours, ax=ax, pad=0.02, aspect=50, label="sample")


def _draw_size(ax: "Axes", events: Events, slides: list[Slide]) -> None:
    """The number of these stretches that go on at each time."""
    from matplotlib.ticker import MaxNLocator

    end = float(events.complete_until)
    changes = [(s.start, 1) for s in slides]
    changes += [(s.end, -1) for s in slides if s.end < end]
    times, size = np.array(sorted([(0.0, 0), *changes, (end, 0)])).T
    steps = times, np.cumsum(size)
    ax.step(*steps, where="post", color=COLOURS[0], linewidth=1.2)
    ax.fill_between(*steps, step="post", color=COLOURS[0], alpha=0.15, linewidth=0)
    dropped = int(events.dropped)
    note = f" ({dropped} later events were dropped)" if dropped else ""
    ax.set(xlabel=f"time t{note}", ylabel="pairs sliding")
    if end > 0:
        ax.set_xlim(0, end)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def _label_units(ax: "Axes", events: Events, kinks: list[int]) -> None:
    """Bands and ticks for the units of consecutive rows, and names for their layers."""
    pitch = _points_per_row(ax, len(kinks))
    ticks: dict[float, str] = {}
    layers: dict[str, list[int]] = {}
    drawn = -np.inf
    for i, kink in enumerate(dict.fromkeys(kinks)):
        rows = [row for row, k in enumerate(kinks) if k == kink]
        layer, unit = events.layer_of(kink)
        layers.setdefault(layer.label, []).extend(rows)
        if i % 2:
            band = rows[0] - 0.5, rows[-1] + 0.5
            ax.axhspan(*band, color="0.93", linewidth=0, zorder=-1)
        middle = (rows[0] + rows[-1]) / 2
        if pitch * (middle - drawn) >= _READABLE:
            ticks[middle] = ", ".join(map(str, unit))
            drawn = middle
    ax.set_yticks(list(ticks), list(ticks.values()), fontsize=7)
    for label, rows in layers.items():
        ax.axhline(rows[0] - 0.5, color="black", linewidth=0.8)
        name = f"{label}, unit"
        fits = pitch * len(rows) > 6 * len(name)
        ax.annotate(
            name,
            (0, (rows[0] + rows[-1]) / 2),
            xycoords=("axes fraction", "data"),
            xytext=(-10 - 4 * max(map(len, ticks.values())), 0),
            textcoords="offset points",
            rotation=90 if fits else 0,
            ha="right",
            va="center",
        )


def _points_per_row(ax: "Axes", rows: int) -> float:
    pixels = ax.get_window_extent().height / max(rows, 1)
    return 72 * pixels / ax.figure.dpi


def _dark_viridis() -> "Colormap":
    """Viridis without the yellow that vanishes on white."""
    import matplotlib as mpl
    from matplotlib.colors import ListedColormap

    return ListedColormap(mpl.colormaps["viridis"](np.linspace(0, 0.9, 256)))


def _sample_colours(count: int) -> "ScalarMappable":
    """A colour for each sample: Okabe & Ito's for a few, viridis for many."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    few = count <= len(COLOURS)
    colours = ListedColormap(COLOURS[:count]) if few else _dark_viridis()
    return ScalarMappable(Normalize(-0.5, count - 0.5), colours)


def _axes(ax: "Axes | None", *, height: float = 4) -> "Axes":
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6, height), layout="constrained")[1]


def _line(colour: int, style: int) -> dict[str, Any]:
    return {
        "color": COLOURS[colour % len(COLOURS)],
        "linestyle": STYLES[style % len(STYLES)],
    }
