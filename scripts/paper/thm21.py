"""Theorem 2.1: at every neuron, ‖incoming‖² − ‖outgoing‖² is constant."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from homoflow import descend
from homoflow.plot import COLOURS

from ._conservation import (
    ACTIVATIONS,
    ALLOWANCE,
    LOSSES,
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
from ._report import Claim, Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Doubling a small step size doubles what descent adds to a law, to within this.
DOUBLING = 0.1


@dataclasses.dataclass(frozen=True)
class Config:
    """Networks by the activations of their hidden layers, of the given widths."""

    networks: tuple[tuple[str, ...], ...] = (
        ("relu", "relu", "relu"),
        ("leaky_relu", "leaky_relu", "leaky_relu"),
        ("linear", "linear", "linear"),
        ("relu", "leaky_relu", "linear"),
        ("tanh", "relu", "tanh"),
    )
    losses: tuple[str, ...] = ("squared", "logistic")
    inputs: int = 4
    hidden: tuple[int, ...] = (6, 5, 4, 4)
    outputs: int = 2
    samples: int = 12
    t1: float = 3.0
    rtol: float = 1e-10
    # Each is half of the one before.
    learning_rates: tuple[float, ...] = (
        0.2,
        0.1,
        0.05,
        0.025,
        0.0125,
        0.00625,
        0.003125,
    )
    descent_time: float = 2.0
    seeds: int = 12


QUICK = Config(
    networks=(("relu", "leaky_relu", "linear", "tanh"),),
    losses=("squared",),
    rtol=1e-8,
    learning_rates=(0.2, 0.1, 0.0125, 0.00625),
    seeds=4,
)


def run(config: Config = Config(), *, progress: Progress = False) -> Report:
    """The exact flow of every network from every seed; descent at every step size."""
    flows = measure_flows(config, progress=progress)
    changes = {
        activation: flows["change"][flows["activation"] == activation]
        for activation in ACTIVATIONS
    }
    losses = " and ".join(config.losses)
    claims = [
        conservation_claim(
            f"{ACTIVATIONS[activation]} neurons, {losses} loss: ‖in‖² − ‖out‖² is "
            "constant along the flow",
            of_runs,
            config.rtol,
            seeds=config.seeds,
        )
        for activation, of_runs in changes.items()
        if of_runs.size
    ]
    # The last one is tanh: not homogeneous, and the theorem does not speak of it.
    controls = [claims.pop()] if changes["tanh"].size else []
    descents = measure_descents(config, progress=progress)
    rates = config.learning_rates
    return Report(
        "thm21",
        "Theorem 2.1: every neuron balances what comes in and what goes out",
        "Along gradient flow ‖W_h[i,:]‖² − ‖W_{h+1}[:,i]‖² is constant for every neuron i "
        "of every hidden layer h whose activation is homogeneous (linear, ReLU, "
        "LeakyReLU), for any differentiable loss.",
        (*claims, _doubling_claim(descents, rates[-1])),
        (*controls, _doubling_claim(descents, rates[1])),
        {"flows": flows, "descents": descents, "limit": limit_table(config.rtol)},
        _choices(config),
    )


def measure_flows(config: Config, *, progress: Any = False) -> Table:
    """A row for each hidden layer of each run, with the largest change of its laws."""
    rows: list[tuple[str, str, int, int, float]] = []
    for activations in config.networks:
        for loss in config.losses:
            setting = _setting(config, activations, loss)
            for seed in seeds_of(
                config.seeds, "-".join(activations), progress=progress
            ):
                model, data = setting.draw(seed)
                run = exact_flow_of(
                    model, data, config.t1, config.rtol, candidates(model), loss
                )
                for h, activation in enumerate(activations, 1):
                    change = float(relative_change(run, f"neurons[{h}]").max())
                    rows.append((activation, loss, seed, h, change))
    names = ("activation", "loss", "seed", "layer", "change")
    return {n: np.array(c) for n, c in zip(names, zip(*rows, strict=True), strict=True)}


def measure_descents(config: Config, *, progress: Any = False) -> Table:
    """Each seed's change of the first hidden layer's laws, at each step size."""
    setting = _setting(config, config.networks[0], config.losses[0])
    rows: list[tuple[float, int, float]] = []
    for rate in config.learning_rates:
        steps = math.ceil(config.descent_time / rate - 1e-9)
        for seed in seeds_of(config.seeds, f"η = {rate:g}", progress=progress):
            model, data = setting.draw(seed)
            gd = descend(
                model,
                data,
                steps,
                learning_rate=rate,
                loss=LOSSES[setting.loss],
                laws=[candidates(model)["neurons[1]"]],
                throw=False,
            )
            rows.append((rate, seed, float(relative_change(gd, "neurons[1]").max())))
    names = ("learning rate", "seed", "change")
    return {n: np.array(c) for n, c in zip(names, zip(*rows, strict=True), strict=True)}


def _doubling_claim(descents: Table, rate: float) -> Claim:
    """That the change is proportional to η around `rate`: for small and for large."""
    ratios = _at(descents, 2 * rate) / _at(descents, rate)
    ratio = float(np.median(ratios)) if np.isfinite(ratios).all() else math.nan
    return Claim(
        f"GD changes it in proportion to η: twice as much at η = {2 * rate:g} as at "
        f"{rate:g}",
        f"median {ratio:.2f} times as much"
        + ("" if math.isfinite(ratio) else " (runs diverge)"),
        abs(ratio / 2 - 1) <= DOUBLING,
        printed="η → 0",
        seeds=ratios.size,
    )


def _at(descents: Table, rate: float) -> Float[np.ndarray, " seeds"]:
    return descents["change"][np.isclose(descents["learning rate"], rate)]


def _setting(config: Config, activations: tuple[str, ...], loss: str) -> Setting:
    hidden = config.hidden[: len(activations)]
    return Setting(
        (config.inputs, *hidden, config.outputs), activations, config.samples, loss
    )


def _choices(config: Config) -> tuple[str, ...]:
    networks = "; ".join(
        ", ".join(ACTIVATIONS[a] for a in network) for network in config.networks
    )
    return (
        f"Hidden layers of {networks}, of widths {config.hidden}, {config.inputs} inputs "
        f"and {config.outputs} outputs; Kaiming's start, {config.samples} random samples, "
        f"time {config.t1:g}.",
        "The flow is the differential inclusion (5) itself, with sliding along kinks. "
        f"Conserved means: moved by at most {ALLOWANCE:g} times the relative tolerance, "
        "of ‖w‖².",
        f"Gradient descent is on the first of the networks, to time "
        f"{config.descent_time:g}.",
    )


def draw(report: Report) -> "Figure":
    """Left: every run of the flow. Right: descent against its step size."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.6), layout="constrained", sharey=True
    )
    flows, descents = report.tables["flows"], report.tables["descents"]
    present = [a for a in ACTIVATIONS if (flows["activation"] == a).any()]
    rng = np.random.default_rng(0)
    for place, (activation, colour) in enumerate(zip(present, COLOURS, strict=False)):
        changes = flows["change"][flows["activation"] == activation]
        x = place + rng.uniform(-0.25, 0.25, changes.size)
        left.plot(x, changes, "o", ms=6, alpha=0.7, color=colour, mew=0)
    draw_limit(left, report.tables["limit"])
    left.set_xticks(range(len(present)), [ACTIVATIONS[a] for a in present])
    left.set(yscale="log", xlabel="activation of the neuron")
    left.set_ylabel("largest change of ‖in‖² − ‖out‖², over ‖w‖²")
    left.set_title("Flow: conserved if the activation is homogeneous")
    rates = np.unique(descents["learning rate"])
    for seed in np.unique(descents["seed"]):
        of_seed = descents["seed"] == seed
        right.plot(
            descents["learning rate"][of_seed], descents["change"][of_seed],
            "o-", color=COLOURS[4], lw=0.8, ms=3, alpha=0.7,
        )  # fmt: skip
    medians = np.array([np.median(_at(descents, rate)) for rate in rates])
    right.plot(rates, medians, "o-", color=COLOURS[0], lw=2.5, label="median of seeds")
    guide = medians[0] * rates / rates[0]
    right.plot(rates, guide, ":", color="0.3", lw=2, label="in proportion to η")
    right.set(xscale="log", xlabel="step size η (time units)")
    right.set_title("GD: what steps add vanishes with η")
    right.legend(frameon=False, loc="center left")
    return figure
