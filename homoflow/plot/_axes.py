"""Axes, colours and legends of all pictures."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend
    from matplotlib.path import Path

#: Okabe & Ito's palette, without the yellow that vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
#: One line style for each run, so that runs differ in print too.
STYLES = ("-", "--", ":", "-.")
#: A legend of more entries has two columns.
_MAX_ROWS = 6
#: The share of the height of axes that a legend inside may take.
_MAX_SHARE = 0.6


def axes_or_new(ax: "Axes | None", *, height: float = 4) -> "Axes":
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6, height), layout="constrained")[1]


def line_style(colour: int, style: int) -> dict[str, Any]:
    return {
        "color": COLOURS[colour % len(COLOURS)],
        "linestyle": STYLES[style % len(STYLES)],
    }


def draw_legend(ax: "Axes") -> None:
    """A legend that covers nothing: in a free corner, or above what is drawn.

    For the latter the vertical axis is extended upward; a legend too large for that stands
    beside the axes.
    """
    count = len(ax.get_legend_handles_labels()[1])
    if not count:
        return
    if not _covers(ax, _placed_legend(ax, loc="best")):
        return
    columns = 1 + (count > _MAX_ROWS)
    legend = _placed_legend(ax, loc="upper right", ncols=columns, fontsize="small")
    box, frame = legend.get_window_extent(), ax.get_window_extent()
    share = box.height / frame.height + 0.05
    if share > _MAX_SHARE or box.width > frame.width:
        _placed_legend(ax, loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
        return
    transform = ax.yaxis.get_transform()
    low, high = transform.transform(np.array(ax.get_ylim()))
    top = transform.inverted().transform(np.array([low + (high - low) / (1 - share)]))
    ax.set_ylim(top=float(top[0]))


def _placed_legend(ax: "Axes", **where: Any) -> "Legend":
    legend = ax.legend(frameon=False, **where)
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # Only then it has a place.
    return legend


def _covers(ax: "Axes", legend: "Legend") -> bool:
    box = legend.get_window_extent()
    frame = ax.get_window_extent()
    if box.width > frame.width or box.height > frame.height:
        return True
    lines = [(line.get_path(), line.get_transform(), False) for line in ax.lines]
    areas = [
        (path, area.get_transform(), True)
        for area in ax.collections
        for path in area.get_paths()
    ]
    return any(
        _on_screen(path, transform).intersects_bbox(box, filled=filled)
        for path, transform, filled in lines + areas
    )


def _on_screen(path: "Path", transform: Any) -> "Path":
    from matplotlib.path import Path

    vertices = transform.transform_path(path).vertices
    return Path(vertices[np.all(np.isfinite(vertices), axis=1)])
