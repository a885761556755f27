"""Figure 1: gradient descent on matrix factorization, with and without regularizer."""

import dataclasses
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float

from homoflow import (
    MatrixFactorization,
    descend,
    factorization_objective,
    flow,
    regularized_factorization_objective,
)
from homoflow.plot import COLOURS

from ._labels import plain_ticks
from ._progress import Progress
from ._report import Claim, Report, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLAIN, REGULARIZED, EXACT = "GD on (1)", "GD on (3)", "flow of (1)"
LARGE_STEP, UNEQUAL = "GD on (1), η too large", "GD on (1), U ten times as large"
#: A start counts as small if its balance at the end is within this of 1.
NEAR_ONE = 0.05


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes, start and step size, of which the paper gives none; and a study of them."""

    d1: int = 50
    d2: int = 40
    rank: int = 5
    std: float = 0.1
    learning_rate: float = 0.05
    steps: int = 1000
    # The stability limit at a balanced minimum is 1/σ₁(M*) = 1.
    large_rate: float = 1.5
    study_sizes: tuple[tuple[int, int, int], ...] = (
        (20, 30, 3),
        (50, 40, 5),
        (100, 20, 10),
    )
    study_stds: tuple[float, ...] = (0.001, 0.01, 0.1, 0.4)
    study_rates: tuple[float, ...] = (0.05, 0.2, 0.8)
    study_time: float = 200.0
    seeds: int = 5
    seed: int = 0


QUICK = Config(
    study_sizes=((20, 30, 3),),
    study_stds=(0.001, 0.4),
    study_rates=(0.05,),
    seeds=3,
)


def run(config: Config = Config(), *, progress: Progress = False) -> Report:
    """Descent on (1) and (3) and the flow of (1) from one start; then the study."""
    del progress  # Half a minute.
    runs = measure(config)
    study = measure_study(config)
    small, large = config.study_stds[0], config.study_stds[-1]
    return Report(
        "figure1",
        "Figure 1: matrix factorization without and with the regularizer",
        "Gradient descent on (1) converges to a global minimum at a rate competitive with "
        "that on the regularized objective (3), and ‖U‖_F²/‖V‖_F² remains constant: no "
        "unbalancedness occurs.",
        (
            _convergence(runs[PLAIN], PLAIN),
            _rates(runs[PLAIN], runs[REGULARIZED]),
            _ratio_claim(runs[PLAIN], PLAIN),
            _difference_claim(runs[PLAIN], PLAIN, 0.1),
            _difference_claim(runs[EXACT], EXACT, 1e-7),
            _study_converges(study, small),
            _study_balances(study, small),
        ),
        (
            _convergence(runs[LARGE_STEP], f"GD on (1), η = {config.large_rate:g}"),
            _ratio_claim(runs[UNEQUAL], UNEQUAL),
            _difference_claim(runs[REGULARIZED], REGULARIZED, 0.1),
            _study_balances(study, large),
        ),
        {**runs, "study": study},
        _choices(config),
    )


def problem(
    config: Config, seed: int | None = None
) -> tuple[MatrixFactorization, Float[Array, "d1 d2"]]:
    """The start, and a target of the given rank with largest singular value 1."""
    key = jr.key(config.seed if seed is None else seed)
    key_model, key_u, key_v = jr.split(key, 3)
    u = jr.normal(key_u, (config.d1, config.rank))
    v = jr.normal(key_v, (config.d2, config.rank))
    target = u @ v.T
    model = MatrixFactorization(
        config.d1, config.d2, config.rank, std=config.std, key=key_model
    )
    return model, target / jnp.linalg.norm(target, 2)


def measure(config: Config) -> dict[str, Table]:
    """Objective and squared norms of both factors along every run, over time."""
    model, target = problem(config)
    unequal = eqx.tree_at(lambda m: m.U, model, 10 * model.U)
    descents = {
        PLAIN: (model, config.learning_rate, factorization_objective),
        REGULARIZED: (model, config.learning_rate, regularized_factorization_objective),
        LARGE_STEP: (model, config.large_rate, factorization_objective),
        UNEQUAL: (unequal, config.learning_rate, factorization_objective),
    }
    runs = {
        name: descend(
            start,
            target,
            config.steps,
            learning_rate=rate,
            objective=objective,
            laws=(),
            throw=False,
        )
        for name, (start, rate, objective) in descents.items()
    }
    ts = runs[PLAIN].ts
    runs[EXACT] = flow(
        model, target, ts[-1], ts=ts, objective=factorization_objective, laws=()
    )
    return {
        name: {
            "t": np.asarray(run.ts),
            "objective": np.asarray(run.losses),
            "U": np.asarray(run.squared_norms["U"]),
            "V": np.asarray(run.squared_norms["V"]),
        }
        for name, run in runs.items()
    }


def measure_study(config: Config) -> Table:
    """A row for each size, start, step size and seed, at the end of a fixed time."""
    rows: list[np.ndarray] = []
    for d1, d2, rank in config.study_sizes:
        settings = [(std, s) for std in config.study_stds for s in range(config.seeds)]
        starts = [
            problem(dataclasses.replace(config, d1=d1, d2=d2, rank=rank, std=std), s)
            for std, s in settings
        ]
        models, targets = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
        for rate in config.study_rates:
            found = _ends(models, targets, rate, round(config.study_time / rate))
            for (std, s), end in zip(settings, found, strict=True):
                rows.append(np.array([d1, d2, rank, std, s, rate, *end]))
    names = (
        "d1", "d2", "rank", "std", "seed", "learning rate",
        "ratio at start", "ratio at end", "objective at start", "objective at end",
    )  # fmt: skip
    return dict(zip(names, np.array(rows).T, strict=True))


def _ends(
    models: MatrixFactorization, targets: Array, rate: float, steps: int
) -> Float[np.ndarray, "runs 4"]:
    def one(model, target):
        gd = descend(
            model,
            target,
            steps,
            learning_rate=rate,
            objective=factorization_objective,
            laws=(),
            record_every=steps,
            throw=False,
        )
        ratio = gd.squared_norms["U"] / gd.squared_norms["V"]
        return jnp.concatenate([ratio, gd.losses])

    return np.asarray(eqx.filter_vmap(one)(models, targets))


def _convergence(run: Table, name: str) -> Claim:
    first, last = run["objective"][0], run["objective"][-1]
    return Claim(
        f"{name} converges to a global minimum",
        f"objective {first:.3g} → {last:.2g}",
        bool(last < 1e-6 * first),
        printed="converges",
    )


def _rates(plain: Table, regularized: Table) -> Claim:
    steps, rival = (steps_to(run) for run in (plain, regularized))
    return Claim(
        "its rate is competitive with that on (3): at most twice as many steps",
        f"steps to 1e-3 of the start: {steps:g} on (1), {rival:g} on (3)",
        bool(steps <= 2 * rival),
        printed="competitive",
    )


def steps_to(run: Table, part: float = 1e-3) -> float:
    """Steps until the objective is this part of what it was; inf if it never is."""
    reached = run["objective"] <= part * run["objective"][0]
    return float(np.argmax(reached)) if reached.any() else np.inf


def _ratio_claim(run: Table, name: str) -> Claim:
    values = ratio(run)
    return Claim(
        f"{name}: ‖U‖²/‖V‖² stays within a factor of 1.5 of 1",
        f"{values[0]:.3f} → {values[-1]:.3f}, between {values.min():.3f} and "
        f"{values.max():.3f}",
        bool(values.max() <= 1.5 and values.min() >= 1 / 1.5),
        printed="constant",
    )


def _difference_claim(run: Table, name: str, part: float) -> Claim:
    values = difference(run)
    change = float(np.max(np.abs(values / values[0] - 1)))
    return Claim(
        f"{name}: ‖U‖² − ‖V‖² stays within {part:.2g} of its start, relatively",
        f"starts at {values[0]:.3g}, changes by {change:.1e} of that",
        change <= part,
        printed="conserved by the flow",
    )


def _study_converges(study: Table, std: float) -> Claim:
    good = _converged(study)[study["std"] == std]
    return Claim(
        f"study, start N(0, {std:g}²): GD on (1) converges at every size and step size",
        f"{good.sum()} of {good.size} runs converge",
        bool(good.all()),
        printed="converges",
        seeds=len(np.unique(study["seed"])),
    )


def _study_balances(study: Table, std: float) -> Claim:
    chosen = (study["std"] == std) & _converged(study)
    starts, ends = study["ratio at start"][chosen], study["ratio at end"][chosen]
    good = np.abs(ends - 1) <= NEAR_ONE
    return Claim(
        f"study, start N(0, {std:g}²): where GD on (1) converges, ‖U‖²/‖V‖² ends within "
        f"{NEAR_ONE:.0%} of 1",
        f"{starts.min():.2f} to {starts.max():.2f} → {ends.min():.4f} to {ends.max():.4f}"
        f"; so ends in {good.sum()} of {good.size} runs",
        bool(good.all()),
        printed="no unbalancedness",
        seeds=len(np.unique(study["seed"])),
    )


def _converged(study: Table) -> Bool[np.ndarray, " runs"]:
    return study["objective at end"] < 1e-6 * study["objective at start"]


def _choices(config: Config) -> tuple[str, ...]:
    sizes = ", ".join(f"{a}×{b} of rank {r}" for a, b, r in config.study_sizes)
    return (
        f"Sizes {config.d1}×{config.d2}, rank {config.rank}; M* a product of Gaussian "
        "factors with largest singular value 1.",
        f"Entries of U and V start as N(0, {config.std:g}²); "
        f"η = {config.learning_rate:g}, {config.steps} steps.",
        "The ratio can only be constant if it starts near its final value, 1: what is "
        "conserved is the difference.",
        f"The study: {sizes}; η = {', '.join(f'{r:g}' for r in config.study_rates)}; "
        f"each to time {config.study_time:g}.",
    )


def ratio(run: Table) -> Float[np.ndarray, " times"]:
    return run["U"] / run["V"]


def difference(run: Table) -> Float[np.ndarray, " times"]:
    return run["U"] - run["V"]


def draw(report: Report) -> "Figure":
    """(a) objective, (b) ratio of squared norms, (c) their difference, (d) the study.

    Of the study, the runs that converged.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8.4), layout="constrained")
    (objective, ratios), (differences, study) = axes
    styles = {PLAIN: "-", REGULARIZED: "--", EXACT: ":"}
    for (name, style), colour in zip(styles.items(), COLOURS[:3], strict=True):
        table = report.tables[name]
        line: dict[str, Any] = {"color": colour, "ls": style, "lw": 2.5, "label": name}
        objective.plot(table["t"], table["objective"], **line)
        ratios.plot(table["t"], ratio(table), **line)
        differences.plot(table["t"], difference(table), **line)
    objective.set(yscale="log", ylabel="objective")
    objective.set_title("(a) both converge")
    objective.legend(frameon=False)
    ratios.axhline(1, color="0.6", lw=1, zorder=0)
    ratios.set(ylabel="‖U‖² / ‖V‖²")
    ratios.set_title("(b) the factors stay balanced")
    differences.set(ylabel="‖U‖² − ‖V‖²")
    differences.axhline(0, color="0.6", lw=1, zorder=0)
    differences.set_title("(c) only (1) conserves the difference")
    for ax in (objective, ratios, differences):
        ax.set_xlabel("time t = Σ η")
    _draw_study(study, report.tables["study"])
    return figure


def _draw_study(ax: "Axes", study: Table) -> None:
    sizes = sorted(set(zip(study["d1"], study["d2"], study["rank"], strict=True)))
    rates = np.unique(study["learning rate"])
    for i, ((d1, d2, rank), colour) in enumerate(zip(sizes, COLOURS, strict=False)):
        for rate, marker in zip(rates, "osD^v", strict=False):
            chosen = (
                (study["d1"] == d1)
                & (study["d2"] == d2)
                & (study["learning rate"] == rate)
                & _converged(study)
            )
            # Side by side: all three sizes start from the same spreads.
            x = study["std"][chosen] * 1.25 ** (i - (len(sizes) - 1) / 2)
            ax.plot(
                x, study["ratio at end"][chosen], marker, color=colour, ms=6, alpha=0.6,
                mew=0,
            )  # fmt: skip
        label = f"{d1:.0f}×{d2:.0f}, rank {rank:.0f}"
        ax.plot([], [], "o", color=colour, label=label)
    for rate, marker in zip(rates, "osD^v", strict=False):
        ax.plot([], [], marker, color="0.4", label=f"η = {rate:g}")
    ax.axhline(1, color="0.6", lw=1, zorder=0)
    ends = study["ratio at end"][_converged(study)]
    # Room above the points of small starts, which lie near 1.
    room = 1.4 * np.exp(np.abs(np.log(ends)).max())
    ax.set(xscale="log", yscale="log", xlabel="standard deviation of the start")
    ax.set(ylabel="‖U‖² / ‖V‖² at the end", ylim=(1 / room, room))
    plain_ticks(ax.yaxis)
    ax.set_title("(d) balanced from small starts")
    ax.legend(frameon=False, loc="upper left")
