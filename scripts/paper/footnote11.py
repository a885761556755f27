"""Footnote 11: step sizes ∝ t^{−(½+δ)} converge, for every δ in (0, ½]."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from homoflow import descend, factorization_objective, flow
from homoflow.plot import COLOURS

from ._binomial import fraction
from ._factorizations import (
    distance,
    first_time,
    imbalance,
    small_std,
    starts,
    step_sizes,
    target,
)
from ._labels import DISTANCE, IMBALANCE
from ._progress import Progress
from ._report import Claim, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Iterations are recorded this often, as a share of how many the flow predicts.
RECORDED = 500
#: Descent may take so much more time than the flow.
PATIENCE = 1.3


@dataclasses.dataclass(frozen=True)
class Config:
    """As in Lemma 3.1, with η_t = `constant`·(t+1)^{−(½+δ)}, near the stability limit."""

    d1: int = 20
    d2: int = 15
    rank: int = 2
    epsilon: float = 0.1
    constant: float = 1.2
    deltas: tuple[float, ...] = (0.01, 0.1, 0.25, 0.4, 0.5)
    control_delta: float = 1.0
    control_steps: int = 100_000
    most_steps: int = 600_000
    t1: float = 60.0
    seeds: int = 20
    seed: int = 0


QUICK = Config(deltas=(0.01, 0.25), control_steps=10_000, seeds=10)


def run(config: Config = Config(), *, progress: Progress = False) -> Report:
    """The flow says how much time each seed needs; descent is run for it, for each δ."""
    del progress  # A minute.
    std = small_std(config.d1, config.d2, config.epsilon)
    models = starts(config.d1, config.d2, config.rank, std, config.seeds, config.seed)
    matrix = target(config.d1, config.d2, config.rank, config.seed)
    needed = time_to_epsilon(config, models, matrix)
    results = {
        delta: descents(
            config, models, matrix, delta, _steps(config, delta, needed.max())
        )
        for delta in config.deltas
    }
    control = descents(
        config, models, matrix, config.control_delta, config.control_steps
    )
    return Report(
        "footnote11",
        "Footnote 11: slower schedules",
        "Theorem 3.1 holds for any step sizes η_t = Θ(t^{−(½+δ)}) with a constant δ in "
        "(0, ½].",
        (
            *(_convergence(config, r, delta) for delta, r in results.items()),
            _balance_claim(config, results),
            _clock_claim(config, results, needed),
        ),
        (_convergence(config, control, config.control_delta),),
        {
            "needed": {"t": needed},
            **{f"δ = {d:g}": _curves(r) for d, r in results.items()},
            f"δ = {config.control_delta:g} (control)": _curves(control),
            "epsilon": {"epsilon": np.array([config.epsilon])},
        },
        (
            f"U is {config.d1}×{config.rank}, V is {config.d2}×{config.rank}, ‖M*‖_F = "
            f"1, start as in Lemma 3.1; the constant is {config.constant:g}, near the "
            "stability limit (with the theorem's √(ε/r)/100 the number of iterations is "
            "e^{thousands}: see Theorem 3.1).",
            f"As many iterations as take {PATIENCE:g} times the time that the slowest "
            f"seed's flow needs, {config.most_steps:,} at most.",
        ),
    )


def time_to_epsilon(config: Config, models: Any, matrix: jax.Array) -> np.ndarray:
    """When the flow of each seed comes within ε of M*."""

    def one(model):
        ts = jnp.linspace(0.0, config.t1, 1201)
        run = flow(
            model,
            matrix,
            config.t1,
            ts=ts,
            objective=factorization_objective,
            rtol=1e-8,
            laws=(),
            throw=False,
        )
        return ts, distance(run)

    ts, far = map(np.asarray, jax.jit(jax.vmap(one))(models))
    return first_time(far <= config.epsilon, ts[0])


@dataclasses.dataclass(frozen=True)
class Descents:
    """Of each seed: distance from M* and imbalance at some iterations."""

    iterations: np.ndarray
    times: np.ndarray
    distance: np.ndarray
    imbalance: np.ndarray


def descents(
    config: Config, models: Any, matrix: jax.Array, delta: float, steps: int
) -> Descents:
    """Descent of every seed with η_t = constant·(t+1)^{−(½+δ)}."""
    every = max(1, steps // RECORDED)

    def one(model):
        gd = descend(
            model,
            matrix,
            steps,
            learning_rate=step_sizes(
                lambda t: config.constant * (t + 1) ** -(0.5 + delta), matrix.dtype
            ),
            objective=factorization_objective,
            record_every=every,
            throw=False,
        )
        return gd.ts, distance(gd), imbalance(gd)

    times, far, uneven = map(np.asarray, jax.jit(jax.vmap(one))(models))
    iterations = np.minimum(np.arange(times.shape[1]) * every, steps)
    return Descents(iterations, times[0], far, uneven)


def _steps(config: Config, delta: float, time: float) -> int:
    """How many steps take `PATIENCE` times that time, if that can be run."""
    sums = config.constant * np.cumsum(
        np.arange(1.0, config.most_steps) ** -(0.5 + delta)
    )
    return int(np.searchsorted(sums, PATIENCE * time)) + 1


def _convergence(config: Config, r: Descents, delta: float) -> Claim:
    arrivals = first_time(r.distance <= config.epsilon, r.iterations)
    found = fraction(int(np.isfinite(arrivals).sum()), arrivals.size)
    there = arrivals[np.isfinite(arrivals)]
    when = (
        f"after {np.median(there):,.0f} iterations (median)" if there.size else "never"
    )
    return Claim(
        f"δ = {delta:g}: ‖UVᵀ − M*‖_F ≤ {config.epsilon:g}",
        f"{found}; {when}, of {r.iterations[-1]:,}",
        found.successes == found.trials,
        printed="with high probability",
        seeds=found.trials,
    )


def _balance_claim(config: Config, results: dict[float, Descents]) -> Claim:
    largest = max(float(np.max(r.imbalance)) for r in results.values())
    return Claim(
        f"‖UᵀU − VᵀV‖_F ≤ {config.epsilon:g} at all of them",
        f"largest {largest:.2g}",
        bool(largest <= config.epsilon),
        seeds=config.seeds,
    )


def _clock_claim(
    config: Config, results: dict[float, Descents], needed: np.ndarray
) -> Claim:
    """Descent takes the flow's time, however it is divided into steps."""
    ratios = [
        np.median(first_time(r.distance <= config.epsilon, r.times) / needed)
        for r in results.values()
    ]
    return Claim(
        "Σ η_t until then is the time that the flow needs, within 25 %",
        ", ".join(f"{x:.2f}" for x in ratios) + " times it (medians, for each δ)",
        bool(all(abs(x - 1) < 0.25 for x in ratios)),
        seeds=config.seeds,
    )


def _curves(r: Descents) -> dict[str, np.ndarray]:
    return {
        "iteration": r.iterations,
        "t": r.times,
        "distance": np.median(r.distance, axis=0),
        "imbalance": r.imbalance.max(axis=0),
    }


def draw(report: Report) -> "Figure":
    """Distance from M* over iterations and, the same, over time; imbalance over time."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    curves = [n for n in report.tables if n.startswith("δ")]
    for name, colour in zip(curves, COLOURS, strict=False):
        table = report.tables[name]
        line = {"color": colour, "lw": 2, "ls": ":" if "control" in name else "-"}
        axes[0].plot(table["iteration"] + 1, table["distance"], label=name, **line)
        axes[1].plot(table["t"], table["distance"], **line)
        axes[2].plot(table["t"], table["imbalance"], **line)
    epsilon = report.tables["epsilon"]["epsilon"][0]
    for ax in axes:
        ax.axhline(epsilon, color="0.3", ls="--", lw=1.5, label="ε")
        ax.set(yscale="log", xlabel="time Σ η")
    for ax in axes[:2]:
        ax.set(ylabel=f"{DISTANCE}, median", ylim=(epsilon / 20, 2))
    axes[0].set(xscale="log", xlabel="iteration + 1")
    axes[2].set(ylabel=f"largest {IMBALANCE}")
    axes[0].set_title("iterations differ by powers of ten")
    axes[1].set_title("the time is that of the flow")
    axes[2].set_title("the factors stay balanced")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=7, frameon=False)
    return figure
