"""Theorem 2.2: where the activation is linear, a whole matrix is constant."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from homoflow import Trajectory
from homoflow.plot import COLOURS

from ._conservation import (
    ACTIVATIONS,
    Setting,
    candidates,
    conservation_claim,
    draw_limit,
    exact_flow_of,
    limit_table,
    relative_change_of,
    seeds_of,
    squared_size,
)
from ._progress import Progress
from ._report import Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIAGONAL, OFF_DIAGONAL = "diagonal", "off the diagonal"


@dataclasses.dataclass(frozen=True)
class Config:
    """One linear hidden layer among others that are ReLU."""

    sizes: tuple[int, ...] = (4, 6, 5, 4, 2)
    activations: tuple[str, ...] = ("relu", "linear", "relu")
    samples: int = 12
    t1: float = 3.0
    rtol: float = 1e-10
    seeds: int = 20


# The network and recorded laws of Corollary 2.1's quick run: compiled once for both.
QUICK = Config(sizes=(4, 6, 5, 2), activations=("relu", "linear"), rtol=1e-8, seeds=4)


def run(config: Config = Config(), *, progress: Progress = False) -> Report:
    """The exact flow from every seed, with the matrix of every hidden layer recorded."""
    changes, matrices = measure(config, progress=progress)

    def claim(activation: str, part: str, text: str):
        of_runs = changes["change"][
            (changes["activation"] == activation) & (changes["part"] == part)
        ]
        formula = "W_h W_hᵀ − W_{h+1}ᵀ W_{h+1}"
        return conservation_claim(
            f"{ACTIVATIONS[activation]} φ_h: {formula} is constant, {text}",
            of_runs,
            config.rtol,
            seeds=config.seeds,
        )

    return Report(
        "thm22",
        "Theorem 2.2: a linear layer conserves a whole matrix",
        "If φ_h is the identity, W_h W_hᵀ − W_{h+1}ᵀ W_{h+1} is constant along gradient "
        "flow, whatever the other activations are. Theorem 2.1 is its diagonal.",
        (
            claim("linear", DIAGONAL, "on the diagonal"),
            claim("linear", OFF_DIAGONAL, "off the diagonal"),
            claim("relu", DIAGONAL, "on the diagonal (Theorem 2.1)"),
        ),
        (claim("relu", OFF_DIAGONAL, "off the diagonal"),),
        {
            "changes": changes,
            "limit": limit_table(config.rtol),
            **matrices,
        },
        (
            f"Sizes {'-'.join(map(str, config.sizes))} with "
            f"{', '.join(ACTIVATIONS[a] for a in config.activations)} hidden layers, "
            f"{config.samples} random samples, squared loss, Kaiming's start, time "
            f"{config.t1:g}.",
            "The matrices shown are of the first seed, at the end of its run.",
        ),
    )


def measure(config: Config, *, progress: Any = False) -> tuple[Table, dict[str, Table]]:
    """Each run's largest changes of entries, and the changes of the first seed's matrices.

    Of each kind of activation, the first layer that has it.
    """
    setting = Setting(config.sizes, config.activations, config.samples)
    layers = {a: config.activations.index(a) + 1 for a in ("linear", "relu")}
    rows: list[tuple[str, str, int, float]] = []
    matrices: dict[str, Table] = {}
    for seed in seeds_of(config.seeds, "matrices", progress=progress):
        model, data = setting.draw(seed)
        run = exact_flow_of(
            model, data, config.t1, config.rtol, candidates(model), "squared"
        )
        for activation, h in layers.items():
            for part, change in _changes(run, h).items():
                rows.append((activation, part, seed, change))
            if seed == 0:
                values = np.asarray(run.laws[f"matrix[{h}]"])
                change = np.abs(values[-1] - values[0]) / squared_size(run)
                matrices[activation] = {str(i): row for i, row in enumerate(change)}
    names = ("activation", "part", "seed", "change")
    columns = zip(names, zip(*rows, strict=True), strict=True)
    return {name: np.array(column) for name, column in columns}, matrices


def _changes(run: Trajectory, h: int) -> dict[str, float]:
    values: Float[np.ndarray, "times n n"] = np.asarray(run.laws[f"matrix[{h}]"])
    diagonal = np.eye(values.shape[1], dtype=bool)
    size = squared_size(run)
    return {
        DIAGONAL: float(relative_change_of(values[:, diagonal], size).max()),
        OFF_DIAGONAL: float(relative_change_of(values[:, ~diagonal], size).max()),
    }


def draw(report: Report) -> "Figure":
    """The change of every entry of both matrices, in colour, and of all seeds."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    figure, axes = plt.subplots(
        1, 3, figsize=(13, 4.4), layout="constrained", width_ratios=(1, 1, 1.5)
    )
    figure.get_layout_engine().set(w_pad=0.15)  # pyright: ignore
    norm = LogNorm(1e-14, 1)
    image = None
    for ax, activation in zip(axes, ("linear", "relu"), strict=False):
        matrix = np.array(list(report.tables[activation].values()))
        shown = np.clip(matrix, norm.vmin, None)
        image = ax.imshow(shown, norm=norm, cmap="viridis")
        ax.set_title(f"{ACTIVATIONS[activation]} layer")
        ax.set(xlabel="neuron j", ylabel="neuron i")
        ax.set_xticks(range(len(matrix)))
        ax.set_yticks(range(len(matrix)))
    assert image is not None
    bar = figure.colorbar(image, ax=list(axes[:2]), shrink=0.85)
    bar.set_label("change of entry (i, j), over ‖w‖²")
    _draw_seeds(axes[2], report)
    return figure


def _draw_seeds(ax: Any, report: Report) -> None:
    table = report.tables["changes"]
    groups = [
        (a, part) for a in ("linear", "relu") for part in (DIAGONAL, OFF_DIAGONAL)
    ]
    rng = np.random.default_rng(0)
    for place, (activation, part) in enumerate(groups):
        chosen = (table["activation"] == activation) & (table["part"] == part)
        x = place + rng.uniform(-0.2, 0.2, chosen.sum())
        marker, colour = ("o", COLOURS[0]) if part == DIAGONAL else ("s", COLOURS[1])
        ax.plot(
            x, table["change"][chosen], marker, ms=6, alpha=0.7, color=colour, mew=0
        )
    draw_limit(ax, report.tables["limit"])
    labels = [f"{ACTIVATIONS[a]},\n{part}" for a, part in groups]
    ax.set_xticks(range(len(groups)), labels, fontsize="small")
    ax.set(yscale="log", xlabel="layer and entries")
    ax.set_ylabel("largest change in a run, over ‖w‖²")
    ax.set_title("every seed")
