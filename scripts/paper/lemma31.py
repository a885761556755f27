"""Lemma 3.1: small steps keep the factors balanced, bounded, and the objective falling."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from homoflow import descend, factorization_objective
from homoflow.plot import COLOURS

from ._binomial import fraction, probable
from ._factorizations import (
    fields_of,
    imbalance,
    of_seeds,
    small_std,
    step_sizes,
    target,
)
from ._labels import IMBALANCE
from ._progress import Progress
from ._report import Claim, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTILES = (0.05, 0.5, 0.95)
#: Columns of the figure's table are thinned to about this many steps.
SHOWN = 300


@dataclasses.dataclass(frozen=True)
class Config:
    """A random target of rank r with ‖M*‖_F = 1; starts N(0, ε/d²), d the larger size."""

    d1: int = 20
    d2: int = 15
    rank: int = 2
    epsilon: float = 0.1
    delta: float = 0.05
    steps: int = 3000
    large_std: float = 0.5
    large_step: float = 1.5
    seeds: int = 1000
    seed: int = 0


QUICK = Config(steps=2000, seeds=125)


class Measured(NamedTuple):
    """Of every seed, over all steps: what the lemma's three parts bound.

    Arrays of shape `(seeds, steps + 1)`: JAX's in compiled code, NumPy's outside.
    """

    imbalance: Any
    losses: Any
    squared_norm: Any


def run(config: Config = Config(), *, progress: Progress = False) -> Report:
    """Both schedules from small starts; a large start and a large step as controls."""
    del progress  # Half a minute.
    std = small_std(config.d1, config.d2, config.epsilon)
    runs = {
        "literal": measure(config, std, literal_schedule(config)),
        "footnote": measure(config, std, footnote_schedule(config)),
    }
    large_start = measure(config, config.large_std, footnote_schedule(config))
    large_step = measure(config, std, lambda t: jnp.full_like(t, config.large_step))
    names = {
        "literal": "η_t = √(ε/r)/(100(t+1))",
        "footnote": f"η_t = √(ε/r)(t+1)^(−{0.5 + config.delta:g})",
    }
    claims = [
        claim
        for key, name in names.items()
        for claim in _claims(config, runs[key], name)
    ]
    controls = (
        _claims(config, large_start, f"start N(0, {config.large_std:g}²)")[0],
        _claims(config, large_step, f"constant η = {config.large_step:g}")[1],
    )
    return Report(
        "lemma31",
        "Lemma 3.1: balanced, decreasing, bounded",
        "With a small random start and small, decreasing step sizes, for all t: (i) "
        "‖UᵀU − VᵀV‖_F ≤ ε, (ii) the objective decreases from f(U₀, V₀) ≤ 2‖M*‖_F², "
        "(iii) ‖U‖_F² and ‖V‖_F² are at most 5√r‖M*‖_F.",
        tuple(claims),
        controls,
        {
            **{name: _quantiles(m) for name, m in runs.items()},
            "large start": _quantiles(large_start),
            "bounds": {
                "imbalance": np.array([config.epsilon]),
                "squared norm": np.array([5 * np.sqrt(config.rank)]),
            },
        },
        (
            f"U is {config.d1}×{config.rank}, V is {config.d2}×{config.rank}, ‖M*‖_F = "
            f"1, ε = {config.epsilon:g}; entries start with variance ε/d², d = "
            f"{max(config.d1, config.d2)}, for the paper's ε/poly(d).",
            "The theorem's own schedule hardly moves in any number of iterations that "
            f"can be run ({config.steps:,} here): its bounds are tested along it, and "
            "beyond it in Theorem 3.1's report. With footnote 11's schedule the same "
            "number of iterations reaches the end of training.",
        ),
    )


def literal_schedule(config: Any) -> Callable[[Array], Array]:
    """η_t of Theorem 3.1, for ‖M*‖_F = 1."""
    return lambda t: literal_constant(config) / (t + 1.0)


def literal_constant(config: Any) -> float:
    """c of η_t = c/(t + 1) in Theorem 3.1, for ‖M*‖_F = 1."""
    return float(np.sqrt(config.epsilon / config.rank) / 100)


def footnote_schedule(config: Any) -> Callable[[Array], Array]:
    """η_t of footnote 11, with the constant √(ε/r)."""
    constant = np.sqrt(config.epsilon / config.rank)
    return lambda t: constant * (t + 1.0) ** -(0.5 + config.delta)


def measure(config: Config, std: float, schedule: Callable[[Array], Array]) -> Measured:
    """Descent from every seed, recorded at every step."""
    matrix = target(config.d1, config.d2, config.rank, config.seed)

    def one(model):
        gd = descend(
            model,
            matrix,
            config.steps,
            learning_rate=step_sizes(schedule, matrix.dtype),
            objective=factorization_objective,
            throw=False,
        )
        norms = jnp.maximum(gd.squared_norms["U"], gd.squared_norms["V"])
        return Measured(imbalance(gd), gd.losses, norms)

    return fields_of(of_seeds(config, one, std=std), Measured)


def _claims(config: Config, m: Measured, name: str) -> tuple[Claim, Claim, Claim]:
    bound = 5 * np.sqrt(config.rank)
    # NaN, after a blow-up, satisfies none of the three.
    balanced = (m.imbalance <= config.epsilon).all(axis=1)
    rounding = 1e-14 * m.losses[:, :1]
    falls = (np.diff(m.losses) <= rounding).all(axis=1) & (m.losses[:, 0] <= 2)
    bounded = (m.squared_norm <= bound).all(axis=1)
    return (
        _claim(
            f"(i) ‖UᵀU − VᵀV‖_F ≤ {config.epsilon:g}; {name}",
            balanced,
            f"largest {_largest(m.imbalance)}",
        ),
        _claim(
            f"(ii) f decreases, f₀ ≤ 2‖M*‖_F²; {name}",
            falls,
            f"median f {np.median(m.losses[:, 0]):.3g} → "
            f"{np.median(m.losses[:, -1]):.2g}",
        ),
        _claim(
            f"(iii) ‖U‖_F², ‖V‖_F² ≤ 5√r‖M*‖_F = {bound:.3g}; {name}",
            bounded,
            f"largest {_largest(m.squared_norm)}",
        ),
    )


def _claim(text: str, of_seeds: np.ndarray, detail: str) -> Claim:
    found = fraction(int(of_seeds.sum()), of_seeds.size)
    return probable(text, found, detail)


def _largest(values: np.ndarray) -> str:
    return f"{np.max(values):.3g}" if np.isfinite(values).all() else "not finite"


def _quantiles(m: Measured) -> dict[str, np.ndarray]:
    steps = m.losses.shape[1]
    # A logarithmic axis needs them at the start.
    kept = np.unique(np.geomspace(1, steps, SHOWN).astype(int) - 1)
    table = {"step": kept}
    for name, values in m._asdict().items():
        for q in QUANTILES:
            table[f"{name} {q:g}"] = np.quantile(values[:, kept], q, axis=0)
    return table


def draw(report: Report) -> "Figure":
    """Imbalance, objective and squared norms of all seeds over the iterations."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    labels = {
        "literal": "the theorem's η ∝ 1/t",
        "footnote": "footnote 11's η",
        "large start": "large start (control)",
    }
    quantities = ("imbalance", "losses", "squared_norm")
    for (key, label), colour in zip(labels.items(), COLOURS, strict=False):
        table = report.tables[key]
        x = table["step"] + 1
        for ax, quantity in zip(axes, quantities, strict=True):
            low, middle, high = (table[f"{quantity} {q:g}"] for q in QUANTILES)
            ax.fill_between(x, low, high, color=colour, alpha=0.25, lw=0)
            ax.plot(x, middle, color=colour, lw=2, label=label)
    bounds = report.tables["bounds"]
    left, middle, right = axes
    bound = {"color": "0.3", "ls": "--", "lw": 1.5}
    left.axhline(bounds["imbalance"][0], label="the lemma's bound", **bound)
    right.axhline(bounds["squared norm"][0], **bound)
    left.set(ylabel=IMBALANCE, title="(i) balanced")
    middle.set(ylabel="objective f", title="(ii) decreasing")
    right.set(ylabel="larger of ‖U‖², ‖V‖²", title="(iii) bounded")
    for ax in axes:
        ax.set(xscale="log", yscale="log", xlabel="iteration + 1")
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    return figure
