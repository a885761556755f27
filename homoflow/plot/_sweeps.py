"""Pictures of sweeps: bands over seeds, panels over two settings, heat maps."""

from typing import TYPE_CHECKING, Any

import numpy as np

from .._sweep._statistics import quantile_band
from ._axes import COLOURS, axes_or_new, draw_legend, line_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAND = (0.1, 0.9)
#: Values that lie further apart are drawn on a logarithmic axis.
_DECADE = 30.0
#: What grows by more than this over all that it begins with has left the picture.
_DIVERGED = 1e6
#: So many values of a setting can be ticks.
_MAX_TICKS = 9
#: The side of a panel of a grid, in inches.
_PANEL = 2.6


def bands(
    values: Any, *, over: str = "seed", by: str | None = None, ax: "Axes | None" = None
) -> "Axes":
    """The median of a quantity and a band over seeds, a line for each value of a setting.

    The band lies between the quantiles of 10 and 90 %; the legend has how many settings it
    is of. The abscissa is the dimension that is left, such as `time` or a step size.
    Axes are logarithmic where values are positive and range over more than a factor 30.
    Runs that diverge leave the picture: the axis ends at a million times the largest value
    at the abscissa's start.

    **Arguments:**

    - `values`: a variable of a sweep, such as `data.losses`.
    - `over`: the dimension that the band is over.
    - `by`: the dimension that has a line for each of its values.

    **Raises:** `ValueError` unless there is one dimension left; pick the others by
    `values.sel(…)`.

    ```python
    hf.plot.bands(sweep.losses.sel(learning_rate=0.1), by="scale")
    ```
    """
    rest = _rest(values, (over,) if by is None else (over, by))
    if len(rest) != 1:
        raise ValueError(
            f"A picture has one abscissa, and {', '.join(rest) or 'no dimension'} is left "
            f"of {', '.join(values.dims)}: pick values with `.sel(…)`, or give `by`."
        )
    ax = axes_or_new(ax)
    _draw_bands(ax, values, over, by, rest[0])
    draw_legend(ax)
    return ax


def panels(
    values: Any, rows: str, columns: str, *, over: str = "seed", by: str | None = None
) -> "np.ndarray":
    """A grid of pictures as of `bands`: a row and a column for each value of two settings.

    All have the same axes. Returns an array of matplotlib's axes.

    ```python
    hf.plot.panels(sweep.losses, "scale", "learning_rate")
    ```
    """
    import matplotlib.pyplot as plt

    taken = (over, rows, columns) if by is None else (over, rows, columns, by)
    rest = _rest(values, taken)
    if len(rest) != 1:
        raise ValueError(
            f"A panel has one abscissa, and {', '.join(rest) or 'no dimension'} is left: "
            "pick values with `.sel(…)`, or give `by`."
        )
    shape = (values.sizes[rows], values.sizes[columns])
    axes: Any
    figure, axes = plt.subplots(
        *shape,
        figsize=(_PANEL * shape[1] + 0.6, 0.8 * _PANEL * shape[0] + 0.6),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for i, j in np.ndindex(shape):
        own = values.isel({rows: i, columns: j})
        _draw_bands(axes[i, j], own, over, by, rest[0], scale_of=values)
        axes[i, j].set(xlabel="", ylabel="")
        if i == 0:
            axes[i, j].set_title(
                f"{columns} = {_text(own, columns)}", fontsize="medium"
            )
        if j == 0:
            axes[i, j].set_ylabel(f"{rows} = {_text(own, rows)}")
    figure.supxlabel(_abscissa(rest[0]), fontsize="medium")
    figure.supylabel(str(values.name or "value"), fontsize="medium")
    if by is not None:
        axes[0, -1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return axes


def heat_map(values: Any, x: str, y: str, *, ax: "Axes | None" = None) -> "Axes":
    """A number for each value of two settings, as colours, with a scale beside them.

    Colours are logarithmic where values are positive and range over more than a factor
    30. Settings without a number are left white. Take the mean or a fraction over other
    dimensions before.

    ```python
    hf.plot.heat_map(sweep.losses.isel(time=-1).median("seed"), "scale", "learning_rate")
    ```
    """
    from matplotlib.colors import LogNorm, Normalize

    rest = _rest(values, (x, y))
    if rest:
        raise ValueError(
            f"A heat map has two dimensions, and {', '.join(rest)} is left: take a mean, a "
            "median or a fraction over it, or pick a value with `.sel(…)`."
        )
    ax = axes_or_new(ax)
    shown = np.asarray(values.transpose(y, x), float)
    known = shown[np.isfinite(shown)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    norm = LogNorm(low, high) if _is_wide(known) else Normalize(low, high)
    mesh = ax.pcolormesh(np.ma.masked_invalid(shown), norm=norm, cmap="viridis")
    for axis, dim in ((ax.xaxis, x), (ax.yaxis, y)):
        labels = [_text(values.isel({dim: i}), dim) for i in range(values.sizes[dim])]
        axis.set_ticks(np.arange(len(labels)) + 0.5, labels)
    ax.set(xlabel=x, ylabel=y)
    ax.figure.colorbar(mesh, ax=ax, label=str(values.name or "value"))
    return ax


def _rest(values: Any, taken: tuple[str, ...]) -> tuple[str, ...]:
    """The dimensions that are left; an error for those that there are not."""
    dims = getattr(values, "dims", None)
    if dims is None or not hasattr(values, "isel") or hasattr(values, "data_vars"):
        raise TypeError(
            "Pass a variable of a sweep's data set, such as `data.losses`; got "
            f"{type(values).__name__}."
        )
    for dim in taken:
        if dim not in dims:
            raise ValueError(
                f"There is no dimension {dim!r}: there are {', '.join(dims)}."
            )
    return tuple(dim for dim in dims if dim not in taken)


def _draw_bands(
    ax: "Axes",
    values: Any,
    over: str,
    by: str | None,
    abscissa: str,
    scale_of: Any = None,
) -> None:
    band = quantile_band(values, over, quantiles=_BAND)
    lines = [None] if by is None else list(range(values.sizes[by]))
    for i, place in enumerate(lines):
        own = band if place is None else band.isel({by: place})
        look = line_style(i, i // len(COLOURS))
        count = int(own["count"].max())
        least = int(own["count"].min())
        note = f"{count} {over}s" if least == count else f"{least} to {count} {over}s"
        label = note if by is None else f"{by} = {_text(own, by)}, {note}"
        x = _places(values if place is None else values.isel({by: place}), abscissa)
        ax.plot(x, own.estimate, label=label, **look)
        ax.fill_between(
            x, own.low, own.high, color=look["color"], alpha=0.2, linewidth=0
        )
    every = values if scale_of is None else scale_of
    if _is_wide(np.asarray(every)):
        ax.set_yscale("log")
    _cut_diverged(ax, every, abscissa)
    if abscissa in every.coords and _is_wide(np.asarray(every[abscissa])):
        ax.set_xscale("log")
        _label_places(ax, np.asarray(every[abscissa]))
    ax.set(xlabel=_abscissa(abscissa), ylabel=str(values.name or "value"))


def _cut_diverged(ax: "Axes", values: Any, abscissa: str) -> None:
    """Ends the axis where values are out of proportion to those that they begin with."""
    start = np.abs(np.asarray(values.isel({abscissa: 0}), float))
    every = np.asarray(values, float)
    limit = _DIVERGED * np.max(start, initial=0.0, where=np.isfinite(start))
    if limit <= 0:
        return
    if np.max(every, initial=0.0, where=np.isfinite(every)) > limit:
        ax.set_ylim(top=limit)
    if np.min(every, initial=0.0, where=np.isfinite(every)) < -limit:
        ax.set_ylim(bottom=-limit)


def _places(values: Any, abscissa: str) -> np.ndarray:
    """The numbers of the abscissa; times that differ between settings are in `t`."""
    if abscissa in values.coords:
        return np.asarray(values[abscissa])
    times = f"t{abscissa.removeprefix('time')}"  # `t of sharpness` of its own times
    if times not in values.coords:
        raise ValueError(
            f"`{abscissa}` has no numbers to draw over: give it coordinates, such as "
            f"`values.assign_coords({{{abscissa!r}: …}})`."
        )
    ts = np.asarray(values[times].transpose(..., abscissa))
    ts = ts.reshape(-1, ts.shape[-1])
    known = ts[np.isfinite(ts).any(axis=1)]
    if not len(known) or not np.allclose(known, known[0], 1e-6, 0, equal_nan=True):
        raise ValueError(
            "These settings were recorded at different times: a median at one time needs "
            "the same for all. Pick one of them by `.sel(…)`, or give the one that decides "
            "as `by`."
        )
    return known[0]


def _label_places(ax: "Axes", places: np.ndarray) -> None:
    """Ticks at a few values of a logarithmic axis, in place of powers of ten."""
    if len(places) <= _MAX_TICKS:
        ax.set_xticks(places, [f"{place:.3g}" for place in places])
        ax.set_xticks([], minor=True)


def _abscissa(dim: str) -> str:
    return "time t" if dim == "time" else dim


def _text(values: Any, dim: str) -> str:
    if dim not in values.coords:
        return "?"
    label = values[dim].item()
    return f"{label:.3g}" if isinstance(label, float) else str(label)


def _is_wide(values: np.ndarray) -> bool:
    known = values[np.isfinite(values)]
    return bool(known.size and known.min() > 0 and known.max() > _DECADE * known.min())
