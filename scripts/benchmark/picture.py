"""Work–precision diagrams, drawn from the runs alone."""

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from workprecision.report import Run, by_method, is_usable

from .report import ERRORS, TIME, described

_COLUMNS = 3
#: Of a shorter axis every tick is labelled, one over the other.
_LEAST_DECADES = 2
#: One colour and line a library, one marker a method.
_LIBRARIES: dict[str, tuple[str, Any, float]] = {
    "homoflow": ("black", "-", 3.5),
    "Diffrax": ("#0072b2", "-", 1.8),
    "CVODE": ("#cc79a7", "-", 2.4),
    "SciPy": ("#d55e00", "--", 1.5),
    "torchdiffeq": ("#009e73", "-.", 1.5),
    "torchode": ("#e69f00", "-.", 1.5),
    "gradient": ("#7f7f7f", ":", 1.8),
}
_MARKERS = {
    "Tsit5": "o", "Dopri8": "s", "Kvaerno5": "D", "dense": "P", "gmres": "X",
    "RK45": "o", "DOP853": "s", "LSODA": "^", "BDF": "P", "Radau": "D",
    "dopri5": "o", "dopri8": "s", "Dopri5": "o",
}  # fmt: skip


def draw(study: dict[str, Any], path: Path) -> Path:
    """Write one panel a problem as a PNG; its path."""
    problems = [p for p in study["problems"].values() if p["runs"]]
    columns = min(max(len(problems), 1), _COLUMNS)
    rows = max(-(-len(problems) // columns), 1)
    with mpl.rc_context({"font.size": 13, "axes.titlesize": 13}):
        size = 6.4 * columns + 0.4, 5.4 * rows + 2.2
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, problem in zip(panels, problems, strict=False):
            _panel(axes, problem)
        for axes in panels[len(problems) :]:
            axes.set_axis_off()
        methods = by_method(run for p in problems for run in p["runs"])
        handles = [Line2D([], [], label=name, **_style(name)) for name in methods]
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=2 * columns,
            frameon=False,
        )
        figure.savefig(path, dpi=90)
    return path


def _panel(axes: Axes, problem: dict[str, Any]) -> None:
    axes.set(xscale="log", yscale="log", ylim=(1e-13, 3))
    axes.grid(which="major", color="#dddddd", linewidth=0.8)
    for error in ERRORS:
        axes.axhline(error, color="#aaaaaa", linewidth=0.8)
    for name, runs in by_method(problem["runs"]).items():
        _curve(axes, name, runs)
    low, high = axes.get_xlim()
    spread = max(1, math.sqrt(10.0**_LEAST_DECADES * low / high))
    axes.set_xlim(low / spread, high * spread)
    axes.set_title(described(problem).replace("; ", "\n"))
    seeds = problem["seeds"]
    axes.set_xlabel("seconds of CPU time" + (" a seed" if seeds > 1 else ""))
    axes.set_ylabel("relative error of the final weights")


def _curve(axes: Axes, name: str, runs: list[Run]) -> None:
    done = [run for run in runs if is_usable(run) and run["error"] < 3]
    if done:
        axes.plot([r[TIME] for r in done], [r["error"] for r in done], **_style(name))


def _style(name: str) -> dict[str, Any]:
    library, _, method = name.partition(" ")
    if library.endswith("*"):
        like = _style(f"{library.removesuffix('*')} {method}")
        return like | {"linestyle": ":", "markerfacecolor": "white"}
    color, line, width = _LIBRARIES[library]
    if library == "homoflow":
        line = "--" if method else line
        return {"color": color, "linestyle": line, "linewidth": width,
                "marker": "*", "markersize": 15, "zorder": 5}  # fmt: skip
    return {"color": color, "linestyle": line, "linewidth": width,
            "marker": _MARKERS.get(method, "d"), "markersize": 7}  # fmt: skip
