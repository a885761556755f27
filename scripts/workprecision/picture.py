"""The work–precision diagram, drawn from the runs alone."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .report import Run, best_peer, by_method, described, is_usable, work_at

#: Where the lead is drawn.
_COMPARED_AT = 1e-6
_MEASURES = {
    "gradients": "gradient evaluations",
    "cpu_seconds": "seconds of CPU time (one core)",
}
_EXACT, _FIXED = "black", "#7f7f7f"
#: The exact flow with its forward passes: without the backward one, about a third.
_WITH_FORWARD_PASSES: dict[str, Any] = {
    "color": _EXACT, "linestyle": ":", "linewidth": 1.2,
    "marker": "*", "markersize": 10, "markerfacecolor": "white",
}  # fmt: skip
#: One colour and line a library, one marker a method.
_LIBRARIES = {
    "Diffrax": ("#0072b2", "-"),
    "SciPy": ("#d55e00", "--"),
    "torchdiffeq": ("#009e73", "-."),
    "CVODE": ("#cc79a7", (0, (1, 1))),
}
_MARKERS = {
    "Bosh3": "v", "Tsit5": "o", "Dopri8": "s",
    "RK45": "o", "DOP853": "s", "LSODA": "D",
    "dopri5": "o", "dopri8": "s",
    "Adams": "^", "BDF": "P",
}  # fmt: skip


def draw(study: dict[str, Any], path: Path) -> Path:
    """Write the diagram of a study, one column a problem, as a PNG; its path."""
    problems = [p for p in study["problems"].values() if p["runs"]]
    columns = max(len(problems), 1)
    with mpl.rc_context({"font.size": 15, "axes.titlesize": 15}):
        figure = Figure(figsize=(6.2 * columns + 0.6, 12.5), layout="constrained")
        panels = figure.subplots(len(_MEASURES), columns, squeeze=False, sharey=True)
        for column, problem in enumerate(problems):
            for row, measure in enumerate(_MEASURES):
                _panel(panels[row, column], problem["runs"], measure)
                panels[row, column].set_xlabel(_MEASURES[measure])
            panels[0, column].set_title(described(problem).replace("; ", "\n"))
        for row in panels:
            row[0].set_ylabel("relative error of the final weights")
        methods = by_method(run for p in problems for run in p["runs"])
        figure.legend(
            handles=_legend(list(methods)), loc="outside lower center",
            ncols=2 * columns, frameon=False,
        )  # fmt: skip
        figure.savefig(path, dpi=110)
    return path


def _panel(axes: Axes, runs: list[Run], measure: str) -> None:
    axes.set(xscale="log", yscale="log")
    axes.grid(which="major", color="#dddddd", linewidth=0.8)
    axes.axhline(_COMPARED_AT, color="#999999", linewidth=1)
    for name, own in by_method(runs).items():
        _curve(axes, name, own, measure)
    if measure == "gradients":
        exact = [r for r in runs if r["kind"] == "exact" and is_usable(r)]
        work = [r["gradients"] + r["forward_passes"] / 3 for r in exact]
        axes.plot(work, [r["error"] for r in exact], **_WITH_FORWARD_PASSES)
    _lead(axes, runs, measure)


def _curve(axes: Axes, name: str, runs: list[Run], measure: str) -> None:
    done = [r for r in runs if is_usable(r)]
    if not done:
        return
    style = _style(name)
    work, error = [r[measure] for r in done], [r["error"] for r in done]
    axes.plot(work, error, **style)
    end = min(done, key=lambda r: r["error"])
    given_up = [r for r in runs if not r["finished"]]
    if given_up:
        x, color = given_up[0][measure], style["color"]
        axes.plot([work[-1], x], [error[-1]] * 2, ":", color=color, linewidth=1)
        axes.plot(x, error[-1], "x", color=color, markersize=9, markeredgewidth=2)
    if end["error"] > _COMPARED_AT:
        reached = work_at(runs, _COMPARED_AT, measure)
        assert reached is not None
        axes.plot(
            [end[measure], reached.amount], [end["error"], _COMPARED_AT],
            color=style["color"], linewidth=0.7, alpha=0.6,
        )  # fmt: skip
        hollow: dict[str, Any] = {**style, "linestyle": "none"}
        axes.plot(reached.amount, _COMPARED_AT, markerfacecolor="white", **hollow)


def _lead(axes: Axes, runs: list[Run], measure: str) -> None:
    """An arrow from the exact flow to the best peer, with their ratio."""
    ours = best_peer(runs, _COMPARED_AT, measure, ("exact",))
    theirs = best_peer(runs, _COMPARED_AT, measure, ("adaptive", "fixed"))
    if ours is None or theirs is None:
        return
    (_, mine), (name, other) = ours, theirs
    axes.annotate(
        "", (other.amount, _COMPARED_AT), (mine.amount, _COMPARED_AT),
        arrowprops={"arrowstyle": "<->", "linewidth": 2.5, "shrinkA": 0, "shrinkB": 0},
    )  # fmt: skip
    about = "~" if other.extrapolated else ""
    label = name.replace(", ", "\n")
    axes.annotate(
        f"{about}{_two_digits(other.amount / mine.amount)} × less than\n{label}",
        (mine.amount, _COMPARED_AT), xytext=(38, -8), textcoords="offset points",
        va="top", fontweight="bold",
    )  # fmt: skip


def _two_digits(ratio: float) -> str:
    rounded = float(f"{ratio:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:.2g}"


def _style(name: str) -> dict[str, Any]:
    library, _, method = name.partition(" ")
    if library == "homoflow":
        return {"color": _EXACT, "linestyle": "-", "linewidth": 3.5,
                "marker": "*", "markersize": 15}  # fmt: skip
    if library not in _LIBRARIES:
        return {"color": _FIXED, "linestyle": "-", "linewidth": 2,
                "marker": "d", "markersize": 6}  # fmt: skip
    color, line = _LIBRARIES[library]
    return {"color": color, "linestyle": line, "linewidth": 1.8,
            "marker": _MARKERS[method], "markersize": 7.5}  # fmt: skip


def _legend(names: list[str]) -> list[Line2D]:
    curves = [Line2D([], [], label=name, **_style(name)) for name in names]
    grey: dict[str, Any] = {"color": "#444444"}
    return [
        *curves,
        Line2D([], [], label="with forward passes, ⅓ each", **_WITH_FORWARD_PASSES),
        Line2D([], [], marker="x", linestyle=":", markeredgewidth=2, **grey,
               label="next tolerance: not finished"),
        Line2D([], [], marker="o", markerfacecolor="white", linewidth=0.7, **grey,
               label="extrapolated at order 1"),
    ]  # fmt: skip
