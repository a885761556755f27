"""Theorem 3.2: rank 1 and a constant step size: linear convergence, balanced factors."""

import dataclasses
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from homoflow import MatrixFactorization, descend, factorization_objective
from homoflow.plot import COLOURS

from ._binomial import fraction
from ._factorizations import first_time, keys
from ._progress import Progress
from ._report import Claim, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: How many trajectories of the ratio are kept for the figure.
SHOWN = 40


@dataclasses.dataclass(frozen=True)
class Config:
    """σ₁ = 1; starts N(0, (c_init)²/d), η = c_step; c₀ = 1/C₀ = `ratio`."""

    dimensions: tuple[int, ...] = (10, 32, 100, 316, 1000)
    accuracies: tuple[float, ...] = (1e-2, 1e-4, 1e-6, 1e-8, 1e-10)
    init: float = 0.1
    step: float = 0.1
    too_large_step: float = 1.1
    ratio: float = 0.1
    steps: int = 600
    seeds: int = 1000
    seed: int = 0


QUICK = Config(dimensions=(10, 100, 1000), accuracies=(1e-2, 1e-6, 1e-10), seeds=200)


def run(config: Config = Config(), *, progress: Progress = False) -> Report:
    """All dimensions, all seeds; the iterations to each accuracy; the ratio's extremes."""
    del progress  # A few seconds.
    results = [_measure(config, d, config.step) for d in config.dimensions]
    too_large = _measure(config, config.dimensions[0], config.too_large_step)
    return Report(
        "thm32",
        "Theorem 3.2: rank 1, constant step size",
        "With a small Gaussian start and a small constant step size the strengths "
        "|uᵀu*| and |vᵀv*| of the two factors stay within constant factors of each other "
        "with constant probability, and ‖uvᵀ − M*‖_F ≤ εσ₁ after O(log(d/ε)) iterations.",
        (_ratio_claim(config, results), *_rate_claims(config, results)),
        _controls(config, results, too_large),
        _tables(config, results),
        (
            "M* = σ₁u*v*ᵀ with σ₁ = 1. Only four numbers of a start matter, uᵀu*, vᵀv* "
            "and the norms of the rest of u and v (the rest keeps its direction): the "
            "full vectors are drawn, and descent runs on these, which is exact.",
            f"Entries of u₀, v₀ ~ N(0, {config.init:g}²/d) (the paper's N(0, δI) with δ "
            f"as a standard deviation), η = {config.step:g}/σ₁; c₀ = {config.ratio:g}, "
            f"C₀ = {1 / config.ratio:g}.",
            "The ratio's bound needs uᵀu* and vᵀv* to start with the same sign, which "
            "half of all starts do: otherwise one of them passes through 0. Convergence "
            "does not need it.",
        ),
    )


def start(d: int, init: float, key: Any) -> MatrixFactorization:
    """A d-dimensional start in the plane of (u*, rest of u) and (v*, rest of v).

    With M* = u*v*ᵀ the rest p of u obeys p⁺ = (1 − η‖v‖²)p: it keeps its direction.
    """
    u, v = init / jnp.sqrt(d) * jr.normal(key, (2, d))
    model = MatrixFactorization(2, 2, 1, key=key)
    factors = tuple(jnp.array([[w[0]], [jnp.linalg.norm(w[1:])]]) for w in (u, v))
    return eqx.tree_at(lambda m: (m.U, m.V), model, factors)


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Of each seed: iterations to each accuracy, same sign, the ratio's extremes."""

    iterations: np.ndarray
    same_sign: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    ratios: np.ndarray


def _measure(config: Config, d: int, step: float) -> _Measured:
    target = jnp.diag(jnp.array([1.0, 0.0]))

    def one(key):
        gd = descend(
            start(d, config.init, key),
            target,
            config.steps,
            learning_rate=step,
            objective=factorization_objective,
            laws=(),
            save_models=True,
            throw=False,
        )
        assert gd.models is not None
        u, v = gd.models.U[:, 0, 0], gd.models.V[:, 0, 0]
        return jnp.sqrt(2 * gd.losses), u, v

    distance, u, v = jax.jit(jax.vmap(one))(keys(config.seeds, config.seed))
    # A run that blew up has NaN: it never arrives.
    distance, counted = np.asarray(distance), np.arange(config.steps + 1)
    iterations = np.stack(
        [first_time(distance <= e, counted) for e in config.accuracies], axis=1
    )
    ratio = np.abs(np.asarray(u) / np.asarray(v))
    return _Measured(
        iterations,
        np.asarray(u[:, 0] * v[:, 0] > 0),
        ratio.min(axis=1),
        ratio.max(axis=1),
        ratio[:SHOWN],
    )


def _bounded(config: Config, m: _Measured) -> np.ndarray:
    return (m.lowest >= config.ratio) & (m.highest <= 1 / config.ratio)


def _ratio_claim(config: Config, results: list[_Measured]) -> Claim:
    found = [fraction(int(_bounded(config, m).sum()), config.seeds) for m in results]
    lowest, highest = min(f.low for f in found), max(f.high for f in found)
    expected = 0.5 - 2 / np.pi * np.arctan(config.ratio)
    shares = ", ".join(f"{f.successes / f.trials:.1%}" for f in found)
    return Claim(
        f"{config.ratio:g} ≤ |uᵀu*|/|vᵀv*| ≤ {1 / config.ratio:g} for all t, with a "
        "probability that does not fall with d",
        f"{shares} for d = {_listed(config.dimensions)} (95 % intervals within "
        f"{lowest:.1%} to {highest:.1%}); the start alone allows {expected:.1%}",
        lowest > 0.25,
        printed="constant probability",
        seeds=config.seeds,
    )


def _rate_claims(config: Config, results: list[_Measured]) -> tuple[Claim, Claim]:
    arrived = [int(np.isfinite(m.iterations[:, -1]).sum()) for m in results]
    fewest = fraction(min(arrived), config.seeds)
    intercept, per_accuracy, per_dimension, misfit = fit(config, results)
    del intercept
    expected_accuracy = -1 / np.log(1 - config.step)
    expected_dimension = 0.5 / np.log(1 + config.step)
    return (
        Claim(
            f"‖uvᵀ − M*‖_F falls to {config.accuracies[-1]:g} σ₁",
            f"at every d at least {fewest}, within {config.steps} iterations",
            fewest.low > 0.9,
            seeds=config.seeds,
        ),
        Claim(
            "the number of iterations is linear in log(1/ε) and in log d",
            f"median = … + {per_accuracy:.2f} ln(1/ε) + {per_dimension:.2f} ln d, within "
            f"{misfit:.1%}; linearized descent says {expected_accuracy:.2f} and "
            f"{expected_dimension:.2f}",
            bool(
                misfit < 0.1
                and abs(per_accuracy / expected_accuracy - 1) < 0.1
                and abs(per_dimension / expected_dimension - 1) < 0.25
            ),
            printed="O(log(d/ε))",
            seeds=config.seeds,
        ),
    )


def fit(config: Config, results: list[_Measured]) -> tuple[float, float, float, float]:
    """Least squares of the median iterations; and the largest relative misfit."""
    medians = np.array([np.median(m.iterations, axis=0) for m in results])
    d, e = np.meshgrid(config.dimensions, config.accuracies, indexing="ij")
    design = np.stack([np.ones(d.size), -np.log(e).ravel(), np.log(d).ravel()], axis=1)
    if not np.isfinite(medians).all():
        return np.nan, np.nan, np.nan, np.inf
    solution = np.linalg.lstsq(design, medians.ravel())[0]
    misfit = np.abs(design @ solution / medians.ravel() - 1).max()
    constant, per_accuracy, per_dimension = map(float, solution)
    return constant, per_accuracy, per_dimension, float(misfit)


def _controls(
    config: Config, results: list[_Measured], too_large: _Measured
) -> tuple[Claim, Claim]:
    opposite = [_bounded(config, m)[~m.same_sign] for m in results]
    kept = fraction(int(sum(o.sum() for o in opposite)), sum(len(o) for o in opposite))
    arrived = int(np.isfinite(too_large.iterations[:, -1]).sum())
    return (
        Claim(
            "the ratio is bounded for starts with opposite signs",
            str(kept),
            kept.high > 0.25,
            seeds=kept.trials,
        ),
        Claim(
            f"convergence with a step that is too large, η = {config.too_large_step:g}/σ₁",
            str(fraction(arrived, config.seeds)),
            arrived > 0.5 * config.seeds,
            seeds=config.seeds,
        ),
    )


def _tables(config: Config, results: list[_Measured]) -> dict[str, Any]:
    rows = [
        (d, e, *np.quantile(m.iterations[:, j], (0.05, 0.5, 0.95)))
        for d, m in zip(config.dimensions, results, strict=True)
        for j, e in enumerate(config.accuracies)
    ]
    names = ("d", "accuracy", "iterations 5 %", "iterations median", "iterations 95 %")
    line = fit(config, results)[:3]
    shown = results[-1]
    count = len(shown.ratios)
    return {
        "iterations": dict(zip(names, np.array(rows).T, strict=True)),
        "fit": dict(
            zip(("constant", "ln(1/ε)", "ln d"), np.array([line]).T, strict=True)
        ),
        "ratios": {
            f"{'same' if shown.same_sign[i] else 'opposite'} {i}": shown.ratios[i]
            for i in range(count)
        },
        "bounds": {"ratio": np.array([config.ratio, 1 / config.ratio])},
    }


def draw(report: Report) -> "Figure":
    """Iterations over what the theorem says they are linear in; the ratio over them."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    table, line = report.tables["iterations"], report.tables["fit"]
    for d, colour in zip(np.unique(table["d"]), COLOURS, strict=False):
        here = table["d"] == d
        x = np.log(d / table["accuracy"][here])
        low, mid, high = (
            table[f"iterations {q}"][here] for q in ("5 %", "median", "95 %")
        )
        left.errorbar(
            x, mid, (mid - low, high - mid),
            fmt="o", color=colour, capsize=3, label=f"d = {d:g}",
        )  # fmt: skip
        fitted = line["constant"] - line["ln(1/ε)"] * np.log(table["accuracy"][here])
        left.plot(x, fitted + line["ln d"] * np.log(d), color=colour, lw=1)
    left.set(xlabel="ln(d / ε)", ylabel="iterations to accuracy ε", ylim=(0, None))
    left.set_title("as many iterations as log(d/ε) says")
    left.legend(frameon=False)
    for sign, colour in (("opposite", COLOURS[1]), ("same", COLOURS[0])):
        curves = [v for k, v in report.tables["ratios"].items() if k.startswith(sign)]
        for i, curve in enumerate(curves):
            label = f"{sign} sign at the start" if i == 0 else None
            right.plot(curve, color=colour, lw=1, alpha=0.8, label=label)
    low, high = report.tables["bounds"]["ratio"]
    right.axhspan(low, high, color="0.9", zorder=0, label="the bounds")
    right.set(yscale="log", xlim=(0, 120), ylim=(low / 30, high * 30))
    right.set(xlabel="iteration", ylabel="|uᵀu*| / |vᵀv*|")
    right.set_title("balanced if both start with the same sign")
    right.legend(frameon=False, loc="upper right")
    return figure


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(str(n) for n in numbers)
