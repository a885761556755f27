"""Pictures of what slides on kinks, and for how long."""

from typing import TYPE_CHECKING

import numpy as np

from .._jax._arguments import check_flag
from .._results._events import Events, Slide
from .._results._trajectory import Trajectory
from ._axes import COLOURS, axes_or_new
from ._batch import refuse_batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap

#: Points of height that a small label needs.
_READABLE = 6.5


def sliding(
    trajectory: Trajectory,
    *,
    layer: int | None = None,
    log_time: bool = False,
    axes: "tuple[Axes, Axes] | None" = None,
) -> "tuple[Axes, Axes]":
    """Which samples pin which units, when: a bar for every stretch of sliding.

    Above, a row for each pair of a sample and a unit that ever slides, grouped by unit
    and coloured by sample; rows are labelled with the sample where they are tall enough
    to be, so a taller figure tells more. Below, how many pairs slide. Needs a run with
    `solver=hf.Filippov(events=…)`.

    **Arguments:**

    - `layer`: the number of the only layer to show (all).
    - `log_time`: a logarithmic time axis, for events over many orders of magnitude. It
        begins at half the time of the first event after 0; what slides from the start on
        begins at the left edge.
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
    check_flag("log_time", log_time)
    rows = len({(s.kink, s.sample) for s in slides})
    raster, size = _stacked(rows) if axes is None else axes
    if log_time:
        slides = _from(_first_shown(events, slides), slides)
        for ax in (raster, size):
            ax.set_xscale("log")
    _draw_raster(raster, events, slides)
    _draw_size(size, events, slides)
    raster.set_xlim(size.get_xlim())
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
        ax = axes_or_new(None, height=float(np.clip(1.5 + 0.14 * len(kinks), 2.5, 11)))
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


def _events_of(trajectory: Trajectory) -> Events:
    refuse_batch(trajectory)
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


def _first_shown(events: Events, slides: list[Slide]) -> float:
    """The left end of a logarithmic time axis, before all that happens after 0."""
    end = float(events.complete_until)
    times = [t for s in slides for t in (s.start, s.end) if t > 0]
    return min(times, default=end) / 2


def _from(begin: float, slides: list[Slide]) -> list[Slide]:
    """Stretches as they look on an axis that begins there."""
    return [s._replace(start=max(s.start, begin)) for s in slides]


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
    begin = min([time for time, _ in changes], default=0.0)
    begin = begin if ax.get_xscale() == "log" else 0.0
    times, size = np.array(sorted([(begin, 0), *changes, (end, 0)])).T
    steps = times, np.cumsum(size)
    ax.step(*steps, where="post", color=COLOURS[0], linewidth=1.2)
    ax.fill_between(*steps, step="post", color=COLOURS[0], alpha=0.15, linewidth=0)
    dropped = int(events.dropped)
    note = f" ({dropped} later events were dropped)" if dropped else ""
    ax.set(xlabel=f"time t{note}", ylabel="pairs sliding")
    if end > begin:
        ax.set_xlim(begin, end)
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
