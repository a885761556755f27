"""Footnote 8: with trainable biases, b² joins the incoming weights."""

import dataclasses
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax.random as jr
import numpy as np

from homoflow import MLP, Law
from homoflow.plot import COLOURS

from ._conservation import (
    ACTIVATIONS,
    Data,
    Setting,
    candidates,
    conservation_claim,
    draw_limit,
    exact_flow_of,
    limit_table,
    relative_change,
    seeds_of,
)
from ._progress import Progress
from ._report import Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WITH, WITHOUT = "with b²", "without b²"


@dataclasses.dataclass(frozen=True)
class Config:
    """A network with biases in every layer, which start as N(0, 1) too."""

    sizes: tuple[int, ...] = (4, 6, 5, 2)
    activations: tuple[str, ...] = ("relu", "leaky_relu")
    samples: int = 12
    t1: float = 3.0
    rtol: float = 1e-10
    seeds: int = 20


QUICK = Config(rtol=1e-8, seeds=4)


def run(config: Config = Config(), *, progress: Progress = False) -> Report:
    """The exact flow from every seed, with both versions of the law recorded."""
    changes, over_time = measure(config, progress=progress)
    names = " and ".join(ACTIVATIONS[a] for a in config.activations)
    claim, control = (
        conservation_claim(
            f"{names} neurons: {formula} is constant along the flow",
            changes[version],
            config.rtol,
            seeds=config.seeds,
        )
        for version, formula in (
            (WITH, "‖W_h[i,:]‖² + b_h[i]² − ‖W_{h+1}[:,i]‖²"),
            (WITHOUT, "‖W_h[i,:]‖² − ‖W_{h+1}[:,i]‖², without the bias,"),
        )
    )
    return Report(
        "footnote8",
        "Footnote 8: a bias is one more incoming weight",
        "The results generalize to trainable biases. What is then constant is "
        "‖W_h[i,:]‖² + b_h[i]² − ‖W_{h+1}[:,i]‖²: the bias is the weight of an input that "
        "is always 1. The output layer's bias is in no law.",
        (claim,),
        (control,),
        {
            "changes": changes,
            "over time": over_time,
            "limit": limit_table(config.rtol),
        },
        (
            "Exactly which quantity is conserved is not printed: the footnote only says "
            "that the results generalize.",
            f"Sizes {'-'.join(map(str, config.sizes))}, {config.samples} random samples, "
            f"squared loss, time {config.t1:g}; weights by Kaiming's start, biases "
            "N(0, 1).",
        ),
    )


def problem(config: Config, seed: int) -> tuple[MLP, Data]:
    """A network with random biases, and data."""
    setting = Setting(config.sizes, config.activations, config.samples)
    model, data = setting.draw(seed, use_bias=True)
    keys = jr.split(jr.fold_in(jr.key(seed), 8), len(model.layers))
    biases = [
        jr.normal(key, layer.weight.shape[:1])
        for key, layer in zip(keys, model.layers, strict=True)
    ]
    return eqx.tree_at(
        lambda m: [layer.bias for layer in m.layers], model, biases
    ), data


def both_versions(config: Config, model: MLP) -> list[Law]:
    """The laws of every hidden layer's neurons, and the same as if there were no bias."""
    without, _ = Setting(config.sizes, config.activations, 1).draw(0)
    found, wrong = candidates(model), candidates(without)
    names = [f"neurons[{h}]" for h in range(1, len(config.sizes) - 1)]
    return [
        *(found[name] for name in names),
        *(dataclasses.replace(wrong[n], name=f"{n} {WITHOUT}") for n in names),
    ]


def measure(config: Config, *, progress: Any = False) -> tuple[Table, Table]:
    """The largest change in each run, and over time, for the law with b² and without."""
    series: dict[str, list[np.ndarray]] = {WITH: [], WITHOUT: []}
    times = np.array([])
    for seed in seeds_of(config.seeds, "biases", progress=progress):
        model, data = problem(config, seed)
        recorded = both_versions(config, model)
        run = exact_flow_of(model, data, config.t1, config.rtol, recorded, "squared")
        times = np.asarray(run.ts)
        for version, values in series.items():
            of_version = [r for r in run.laws if (WITHOUT in r) == (version == WITHOUT)]
            changes = [relative_change(run, name) for name in of_version]
            values.append(np.max(changes, axis=0))
    largest = {version: np.max(values, axis=1) for version, values in series.items()}
    over_time = {"t": times} | {
        f"{version}, seed {seed}": values
        for version, of_seeds in series.items()
        for seed, values in enumerate(of_seeds)
    }
    return largest, over_time


def draw(report: Report) -> "Figure":
    """The change of both versions of the law over time, a line for each seed."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 4.8), layout="constrained")
    table = report.tables["over time"]
    styles = {WITH: (COLOURS[0], "-"), WITHOUT: (COLOURS[1], "--")}
    for version, (colour, style) in styles.items():
        lines = [v for name, v in table.items() if name.startswith(f"{version},")]
        for i, values in enumerate(lines):
            label = f"law {version}, a line for each seed" if i == 0 else None
            shown = np.where(values > 0, values, np.nan)
            ax.plot(
                table["t"], shown, style, color=colour, lw=1.2, alpha=0.8, label=label
            )
    draw_limit(ax, report.tables["limit"])
    ax.set(yscale="log", xlabel="time t of the flow")
    ax.set_ylabel("largest change since t = 0, over ‖w‖²")
    ax.set_title("Only with b² is the difference conserved")
    ax.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.62))
    return figure
