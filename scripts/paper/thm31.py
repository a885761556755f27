"""Theorem 3.1 in its own regime: e^{thousands} iterations, followed in the flow's time."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from homoflow import (
    MatrixFactorization,
    Trajectory,
    descend,
    factorization_objective,
    flow,
)
from homoflow.plot import COLOURS

from ._binomial import fraction, probable
from ._factorizations import (
    distance,
    fields_of,
    first_time,
    imbalance,
    of_seeds,
    small_std,
    step_sizes,
    target,
)
from ._labels import DISTANCE, IMBALANCE
from ._progress import Progress
from ._report import Claim, Report
from .lemma31 import literal_constant, literal_schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Seeds in the figure.
SHOWN = 25
#: Σ t^(−3/2): the total time of a schedule whose sum is finite is a multiple of it.
ZETA_3_2 = 2.612375348685488


@dataclasses.dataclass(frozen=True)
class Config:
    """As in Lemma 3.1. `steps` of descent, then the flow to time `t1`."""

    d1: int = 20
    d2: int = 15
    rank: int = 2
    epsilon: float = 0.1
    steps: int = 20_000
    t1: float = 60.0
    times: int = 241
    rtol: float = 1e-9
    seeds: int = 1000
    seed: int = 0


QUICK = Config(steps=5000, seeds=50)


class SeedResults(NamedTuple):
    """Of every seed: descent to its last step, the flow from there, and the bounds.

    - `distance`: ‖UVᵀ − M*‖_F of the flow, at times `ts` after descent's end.
    - `imbalance`: the largest ‖UᵀU − VᵀV‖_F of descent and the flow.
    - `drift_bound`: of what all later iterations add to UᵀU − VᵀV (‖·‖_F).
    - `gap_bound`: of the distance of descent's weights from the flow's, at `t1`.
    - `gap`: the same at descent's last step, measured against a flow from the start,
        and `gap_bound_then`, its bound.

    JAX's arrays in compiled code, NumPy's with an axis of seeds outside.
    """

    ts: Any
    distance: Any
    imbalance: Any
    drift_bound: Any
    gap_bound: Any
    gap: Any
    gap_bound_then: Any


def run(config: Config = Config(), *, progress: Progress = False) -> Report:
    """What every seed comes to, and two controls."""
    del progress  # A minute.
    std = small_std(config.d1, config.d2, config.epsilon)
    results = measure(config, std)
    final = _final_distances(config)
    summable = final(std, ZETA_3_2 * literal_constant(config))
    zero = final(0.0, config.t1)
    return Report(
        "thm31",
        "Theorem 3.1: the limit is a global minimum",
        "Descent from a small random start with η_t = √(ε/r)/(100(t+1)‖M*‖_F^{3/2}) has "
        "a limit, and there ‖UVᵀ − M*‖_F ≤ ε.",
        _claims(config, results),
        (
            _limit_claim(config, summable, "η_t ∝ (t+1)^(−3/2), whose sum is finite: "),
            _limit_claim(config, zero, "a start at U = V = 0: "),
        ),
        _tables(config, results),
        (
            f"U is {config.d1}×{config.rank}, V is {config.d2}×{config.rank}, ‖M*‖_F = "
            f"1, ε = {config.epsilon:g}, start as in Lemma 3.1.",
            f"The first {config.steps:,} iterations are run. The later ones are followed "
            "in the time Σ η_t by the flow. What discretization adds is "
            "bounded: later steps change UᵀU − VᵀV by at most Σ η_t²‖∇f‖² ≤ η_T f_T/(1 "
            "− Lη_T/2), by the descent lemma; and they stay within ½η_T ∫‖∇²f‖‖∇f‖ "
            "exp(∫‖UVᵀ − M*‖₂) of the flow, as −λ_min(∇²f) ≤ ‖UVᵀ − M*‖₂. The integrals "
            f"are sums over {config.times - 1} intervals of the computed flow (relative "
            f"tolerance {config.rtol:g}), with the larger end of each.",
            "Time t is reached after about exp(t/c) iterations, c = "
            f"{literal_constant(config):.3g}.",
        ),
    )


def measure(config: Config, std: float) -> SeedResults:
    """What every seed comes to, in batches."""
    matrix = target(config.d1, config.d2, config.rank, config.seed)

    def one(model):
        return _follow_seed(config, matrix, model)

    return fields_of(of_seeds(config, one, std=std), SeedResults)


def _follow_seed(
    config: Config, matrix: Array, model: MatrixFactorization
) -> SeedResults:
    schedule = literal_schedule(config)
    gd = descend(
        model,
        matrix,
        config.steps,
        learning_rate=step_sizes(schedule, matrix.dtype),
        objective=factorization_objective,
        record_every=config.steps // 100,
        throw=False,
    )
    ts = jnp.linspace(0.0, config.t1, config.times)
    options = {
        "objective": factorization_objective,
        "rtol": config.rtol,
        "save_models": True,
        "project": False,
        "throw": False,
    }
    later = flow(gd.model, matrix, config.t1, ts=ts, **options)
    beside = flow(model, matrix, gd.ts[-1], ts=gd.ts, laws=(), **options)
    gap = optax.tree.norm(jax.tree.map(jnp.subtract, gd.model, beside.model))
    # Steps only get smaller: the first later one bounds all of them.
    step = schedule(jnp.asarray(float(config.steps)))
    smoothness = jnp.max(_smoothness(matrix, _models(later)))
    return SeedResults(
        later.ts,
        distance(later),
        jnp.maximum(jnp.max(imbalance(gd)), jnp.max(imbalance(later))),
        step * later.losses[0] / (1 - smoothness * step / 2),
        _gap_bound(matrix, later, step),
        gap,
        _gap_bound(matrix, beside, schedule(jnp.asarray(0.0))),
    )


def _gap_bound(matrix: Array, run: Trajectory, step: Array) -> Float[Array, ""]:
    """½η ∫ ‖∇²f‖‖∇f‖ exp(∫_s^t ‖UVᵀ − M*‖₂) ds, by the larger end of each interval."""
    residual = jax.vmap(
        lambda m: jnp.linalg.norm(m.U @ m.V.T - matrix, ord=2)
    )(_models(run))  # fmt: skip
    widths = jnp.diff(run.ts)
    growth = jnp.maximum(residual[1:], residual[:-1]) * widths
    to_the_end = jnp.cumsum(growth[::-1])[::-1]
    local = _smoothness(matrix, _models(run)) * run.grad_norms
    local = jnp.maximum(local[1:], local[:-1])
    return step / 2 * jnp.sum(local * jnp.exp(to_the_end) * widths)


def _models(run: Trajectory) -> Any:
    assert run.models is not None
    return run.models


def _smoothness(matrix: Array, models: MatrixFactorization) -> Float[Array, " times"]:
    """A bound of ‖∇²f‖: (‖U‖₂ + ‖V‖₂)² from the product, ‖R‖₂ from the residual."""

    def bound(m: MatrixFactorization) -> Array:
        residual = jnp.linalg.norm(m.U @ m.V.T - matrix, ord=2)
        u, v = (jnp.linalg.norm(w, ord=2) for w in (m.U, m.V))
        return u**2 + v**2 + residual

    return jax.vmap(bound)(models)


def _final_distances(config: Config) -> Callable[[float, float], np.ndarray]:
    """‖UVᵀ − M*‖_F of the flow, of every seed, as a function of the start and the time."""
    matrix = target(config.d1, config.d2, config.rank, config.seed)

    def one(model, t1):
        run = flow(
            model,
            matrix,
            t1,
            ts=jnp.stack([jnp.zeros_like(t1), t1]),
            objective=factorization_objective,
            rtol=config.rtol,
            laws=(),
            throw=False,
        )
        return distance(run)[-1]

    def final(std: float, t1: float) -> np.ndarray:
        return of_seeds(config, one, std=std, t1=t1)["value"].to_numpy()

    return final


def log_iterations(
    config: Config, time: Float[np.ndarray, " times"]
) -> Float[np.ndarray, " times"]:
    """ln of how many iterations take the time that the flow takes after descent's end.

    Σ_{T<s≤N} c/s lies between c·ln((N+1)/(T+1)) and c·ln(N/T).
    """
    return np.log(config.steps) + time / literal_constant(config)


def _limit_claim(config: Config, final: np.ndarray, what: str = "") -> Claim:
    found = fraction(int((final <= config.epsilon).sum()), final.size)
    return probable(
        f"{what}the limit has ‖UVᵀ − M*‖_F ≤ {config.epsilon:g}",
        found,
        f"median {np.median(final):.2g}",
    )


def _claims(config: Config, a: SeedResults) -> tuple[Claim, ...]:
    seeds = a.distance.shape[0]
    at_the_end = a.distance[:, -1] + _distance_bound(a)
    arrived = first_time(a.distance <= config.epsilon, a.ts[0])
    iterations = log_iterations(config, arrived)
    ever = a.imbalance + a.drift_bound
    honest = fraction(int((a.gap <= a.gap_bound_then).sum()), seeds)
    return (
        _limit_claim(config, at_the_end),
        probable(
            "the iterations that takes are finite: ln of their number",
            fraction(int(np.isfinite(iterations).sum()), seeds),
            f"median {np.median(iterations):,.0f}, from {iterations.min():,.0f} to "
            f"{iterations.max():,.0f}",
        ),
        probable(
            f"‖UᵀU − VᵀV‖_F ≤ {config.epsilon:g} for all t",
            fraction(int((ever <= config.epsilon).sum()), seeds),
            f"largest {a.imbalance.max():.2g} + at most {a.drift_bound.max():.1g} by "
            "all later steps",
        ),
        probable(
            f"descent is within {config.epsilon / 10:g} of the flow at the end",
            fraction(int((a.gap_bound <= config.epsilon / 10).sum()), seeds),
            f"bound at most {a.gap_bound.max():.1g}",
        ),
        probable(
            f"the bound holds where it can be checked, over {config.steps:,} iterations",
            honest,
            f"measured at most {a.gap.max():.1g}, bound at least "
            f"{a.gap_bound_then.min():.1g}",
        ),
    )


def _distance_bound(a: SeedResults) -> np.ndarray:
    """How far UVᵀ is from the flow's if the weights are within `gap_bound`.

    ‖U‖₂ and ‖V‖₂ are at most √2 there, as ‖UVᵀ‖₂ and their imbalance are small.
    """
    return 2 * np.sqrt(2) * a.gap_bound + a.gap_bound**2


def _tables(config: Config, a: SeedResults) -> dict[str, Any]:
    ts = a.ts[0]
    low, middle, high = np.quantile(a.distance, (0.05, 0.5, 0.95), axis=0)
    return {
        "distance": {
            "t": ts,
            "ln iterations": log_iterations(config, ts),
            "5 %": low,
            "median": middle,
            "95 %": high,
        },
        "seeds": {f"seed {i}": row for i, row in enumerate(a.distance[:SHOWN])},
        "bounds": {
            "imbalance": a.imbalance,
            "drift_bound": a.drift_bound,
            "gap_bound": a.gap_bound,
        },
        "epsilon": {"epsilon": np.array([config.epsilon])},
    }


def draw(report: Report) -> "Figure":
    """Distance from M* over ln(iterations); what all steps can add to the imbalance."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    table = report.tables["distance"]
    epsilon = report.tables["epsilon"]["epsilon"][0]
    x = table["ln iterations"]
    for row in report.tables["seeds"].values():
        left.plot(x, row, color=COLOURS[0], lw=0.6, alpha=0.4)
    left.plot(x, table["median"], color=COLOURS[0], lw=2.5, label="median of all seeds")
    left.axhline(epsilon, color="0.3", ls="--", lw=1.5, label="ε")
    left.set(yscale="log", ylim=(1e-9, 3))
    left.set(xlabel="ln(iterations)", ylabel=DISTANCE)
    left.set_title("the theorem's schedule, followed to its end")
    left.legend(frameon=False)
    bounds = report.tables["bounds"]
    bins = np.geomspace(1e-9, 1, 97)
    for (name, label), colour in zip(
        {
            "imbalance": f"largest {IMBALANCE} so far",
            "drift_bound": "all later steps add at most",
            "gap_bound": "bound on descent − flow",
        }.items(),
        COLOURS,
        strict=False,
    ):
        right.hist(bounds[name], bins=bins, color=colour, alpha=0.8, label=label)
    right.axvline(epsilon, color="0.3", ls="--", lw=1.5, label="ε")
    right.set(xscale="log", xlabel="Frobenius norm", ylabel="seeds")
    right.set_title("what discretization can add is far below ε")
    figure.legend(
        *right.get_legend_handles_labels(),
        loc="outside lower center", ncols=4, frameon=False,
    )  # fmt: skip
    return figure
