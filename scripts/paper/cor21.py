"""Corollary 2.1: layers keep the differences of their norms, so small starts balance."""

import dataclasses
from typing import TYPE_CHECKING, Any

import equinox as eqx
import numpy as np
from jaxtyping import Float

from homoflow import MLP, Trajectory
from homoflow.plot import COLOURS

from ._conservation import (
    ACTIVATIONS,
    Data,
    Setting,
    candidates,
    conservation_claim,
    exact_flow_of,
    relative_change,
    seeds_of,
)
from ._labels import NORM, plain_ticks
from ._progress import Progress
from ._report import Claim, Report, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Layers count as balanced if the largest squared norm exceeds the smallest by a quarter.
BALANCED = 1.25


@dataclasses.dataclass(frozen=True)
class Config:
    """Starts N(0, std²) in every layer, from small to large; a tanh network as control."""

    sizes: tuple[int, ...] = (4, 6, 5, 2)
    activations: tuple[str, ...] = ("relu", "linear")
    control: tuple[str, ...] = ("tanh", "tanh")
    samples: int = 12
    label_std: float = 10.0
    # In increasing order: the first has to balance, the last must not.
    stds: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8, 1.6)
    t1: float = 4.0
    rtol: float = 1e-8
    seeds: int = 10


# The network and recorded laws of Theorem 2.2's quick run: compiled once for both.
QUICK = Config(stds=(0.1, 1.6), t1=3.0, seeds=4)


def run(config: Config = Config(), *, progress: Progress = False) -> Report:
    """The exact flow from starts of every size, and a tanh network's from the smallest."""
    runs, over_time = measure(
        config, config.activations, config.stds, progress=progress
    )
    tanh, _ = measure(config, config.control, config.stds[-1:], progress=progress)
    formula = "‖W_h‖_F² − ‖W_{h+1}‖_F²"
    claim, control = (
        conservation_claim(
            f"{' and '.join(dict.fromkeys(ACTIVATIONS[a] for a in activations))} layers: "
            f"{formula} is constant along the flow",
            table["change"],
            config.rtol,
            seeds=config.seeds,
        )
        for activations, table in ((config.activations, runs), (config.control, tanh))
    )
    return Report(
        "cor21",
        "Corollary 2.1: layers that start small become balanced",
        f"{formula} is constant along gradient flow. From a small start the differences "
        "stay small while the norms grow, so that all layers end with similar norms.",
        (claim, _balance_claim(runs, config.stds[0])),
        (control, _balance_claim(runs, config.stds[-1])),
        {"runs": runs, "over time": over_time},
        (
            f"Sizes {'-'.join(map(str, config.sizes))}, {config.samples} random samples, "
            f"targets N(0, {config.label_std:g}²), squared loss, time {config.t1:g}; "
            "entries of all layers start with the same variance, so that their norms "
            "differ.",
            "Only one layer is ReLU: after a small start samples of a network with several "
            "often meet their kinks at one time, where the flow may have a choice.",
            f"Balanced means: the largest ‖W_h‖_F² is at most {BALANCED:g} times the "
            "smallest.",
        ),
    )


def problem(
    config: Config, activations: tuple[str, ...], std: float, seed: int
) -> tuple[MLP, Data]:
    """A network with entries N(0, std²), and data."""
    model, (x, y) = Setting(config.sizes, activations, config.samples).draw(seed)

    def rescaled(model: MLP):
        # Kaiming's start has variance 2 / fan_in.
        return [
            layer.weight * std * (layer.weight.shape[1] / 2) ** 0.5
            for layer in model.layers
        ]

    model = eqx.tree_at(
        lambda m: [layer.weight for layer in m.layers], model, rescaled(model)
    )
    return model, (x, config.label_std * y)


def measure(
    config: Config,
    activations: tuple[str, ...],
    stds: tuple[float, ...],
    *,
    progress: Any = False,
) -> tuple[Table, Table]:
    """A row for each run; and the first seed's norms over time, from each std."""
    rows: list[tuple[float, ...]] = []
    over_time: dict[str, np.ndarray] = {}
    for std in stds:
        for seed in seeds_of(config.seeds, f"std {std:g}", progress=progress):
            model, data = problem(config, activations, std, seed)
            run = exact_flow_of(
                model, data, config.t1, config.rtol, candidates(model), "squared"
            )
            norms = squared_norms(run)
            change = max(
                relative_change(run, f"layers[{h}]").max()
                for h in range(1, len(config.sizes) - 1)
            )
            ratio = norms.max(axis=1) / norms.min(axis=1)
            growth = norms[-1].sum() / norms[0].sum()
            rows.append((std, seed, change, ratio[0], ratio[-1], growth))
            if seed == 0:
                over_time["t"] = np.asarray(run.ts)
                for h, norm in enumerate(norms.T, 1):
                    over_time[f"std {std:g}, layer {h}"] = norm
    names = ("std", "seed", "change", "ratio at start", "ratio at end", "growth")
    columns = zip(names, zip(*rows, strict=True), strict=True)
    return {name: np.array(column) for name, column in columns}, over_time


def squared_norms(run: Trajectory) -> Float[np.ndarray, "times layers"]:
    return np.stack([np.asarray(v) for v in run.squared_norms.values()], axis=1)


def _balance_claim(runs: Table, std: float) -> Claim:
    chosen = runs["std"] == std
    start, end = runs["ratio at start"][chosen], runs["ratio at end"][chosen]
    growth = float(np.median(runs["growth"][chosen]))
    count = int(np.sum(end <= BALANCED))
    return Claim(
        f"from N(0, {std:g}²) the layers end balanced",
        f"largest / smallest ‖W_h‖²: {np.median(start):.2f} → {np.median(end):.3f} in the "
        f"median (largest {end.max():.3f}); ‖w‖² grows {growth:.3g}-fold; "
        f"balanced in {count} of {chosen.sum()} runs",
        count == int(chosen.sum()),
        printed="similar magnitudes",
        seeds=int(chosen.sum()),
    )


def draw(report: Report) -> "Figure":
    """Norms over time from the smallest and the largest start; the end of every run."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 4.4), layout="constrained"
    )
    runs, table = report.tables["runs"], report.tables["over time"]
    stds = np.unique(runs["std"])
    _draw_norms(left, table, stds[0])
    left.set_title(f"start N(0, {stds[0]:g}²): they join")
    _draw_norms(middle, table, stds[-1])
    middle.set_title(f"start N(0, {stds[-1]:g}²): they stay apart")
    right.axhline(1, color="0.3", ls="--", lw=1.5)
    shift = 1.06
    for key, marker, colour, factor in (
        ("ratio at start", "s", COLOURS[5], 1 / shift),
        ("ratio at end", "o", COLOURS[0], shift),
    ):
        label = key.replace("ratio ", "")
        right.plot(
            runs["std"] * factor, runs[key], marker, color=colour, ms=6, alpha=0.7, mew=0,
            label=label,
        )  # fmt: skip
    right.set(xscale="log", yscale="log", xlabel="standard deviation of the start")
    right.set_ylabel(f"largest / smallest {NORM}")
    plain_ticks(right.yaxis)
    right.set_title("every seed")
    right.legend(frameon=False, loc="center")
    return figure


def _draw_norms(ax: "Axes", table: Table, std: float) -> None:
    lines = {k: v for k, v in table.items() if k.startswith(f"std {std:g},")}
    styles = ("-", "--", ":", "-.")
    for (name, values), colour, style in zip(
        lines.items(), COLOURS, styles, strict=False
    ):
        label = name.split(", ")[1]
        ax.plot(table["t"], values, style, color=colour, lw=2.5, label=label)
    ax.set(xlabel="time t of the flow", ylabel=f"squared norm {NORM}", ylim=(0, None))
    ax.legend(frameon=False)
