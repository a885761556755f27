"""Lemma 3.2: a balanced stationary point is a solution or a strict saddle."""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from homoflow import MatrixFactorization, factorization_objective
from homoflow.plot import COLOURS

from ._factorizations import keys
from ._labels import DISTANCE
from ._progress import Progress
from ._report import Claim, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: An eigenvalue below minus this is negative (the largest of the Hessian is about 1).
NEGATIVE = 1e-6


@dataclasses.dataclass(frozen=True)
class Config:
    """‖M*‖_F = 1, of rank r. `excesses`: ‖p‖² of the columns that unbalance a saddle."""

    d1: int = 20
    d2: int = 15
    rank: int = 4
    epsilon: float = 0.1
    excesses: tuple[float, ...] = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    seeds: int = 20
    seed: int = 0


QUICK = Config(rank=3, excesses=(0.0, 0.1, 10.0, 100.0), seeds=5)


class Points(NamedTuple):
    """Stationary points: what they are, and what the lemma is about.

    - `rank`: of UVᵀ; `excess`: ‖p‖²; `left_out`: σ_j, the largest that UVᵀ lacks.
    - `gradient`: ‖∇f‖; `imbalance`: ‖UᵀU − VᵀV‖_F; `distance`: ‖UVᵀ − M*‖_F.
    - `curvature`: the smallest eigenvalue of ∇²f.
    """

    rank: np.ndarray | Array
    excess: np.ndarray | Array
    left_out: np.ndarray | Array
    gradient: np.ndarray | Array
    imbalance: np.ndarray | Array
    distance: np.ndarray | Array
    curvature: np.ndarray | Array


def run(config: Config = Config(), *, progress: Progress = False) -> Report:
    """Stationary points of every rank and balance; the same for a target of rank r + 1."""
    del progress  # Half a minute.
    points = _points(config, target_rank=config.rank)
    beyond = _points(config, target_rank=config.rank + 1)
    return Report(
        "lemma32",
        "Lemma 3.2: solution or strict saddle",
        "A stationary point of ½‖UVᵀ − M*‖_F² with ‖UᵀU − VᵀV‖_F ≤ ε either has "
        "‖UVᵀ − M*‖_F ≤ ε or is a strict saddle, where the Hessian has a negative "
        "eigenvalue.",
        _claims(config, points),
        (
            _dichotomy(
                config,
                beyond,
                f"M* of rank {config.rank + 1}, one more than the factors': ",
            ),
        ),
        {
            "points": points._asdict(),
            "beyond": beyond._asdict(),
            "epsilon": {"epsilon": np.array([config.epsilon])},
        },
        (
            f"U is {config.d1}×{config.rank}, V is {config.d2}×{config.rank}, ‖M*‖_F = "
            f"1, singular values drawn in (0.2, 1) and scaled, ε = {config.epsilon:g}.",
            "A stationary point of rank k keeps k singular components of M*, as "
            "U = Φ√Σ G, V = Ψ√Σ G^{−T}, with a random G (the identity in the balanced "
            "ones), then columns p orthogonal to M* in U alone, ‖p‖² the excess.",
            "The most negative eigenvalue is that of the whole Hessian, decomposed.",
        ),
    )


def _points(config: Config, target_rank: int) -> Points:
    """Every rank, excess and seed: what the lemma is about, in flat columns."""

    def one(key: PRNGKeyArray, rank: Array, excess: Array) -> Points:
        return examine(*stationary_point(config, key, rank, excess, target_rank))

    ranks, excesses = jnp.meshgrid(
        jnp.arange(config.rank + 1), jnp.asarray(config.excesses), indexing="ij"
    )
    over_kinds = jax.vmap(one, (None, 0, 0))
    found = jax.jit(jax.vmap(over_kinds, (0, None, None)))(
        keys(config.seeds, config.seed), ranks.ravel(), excesses.ravel()
    )
    return jax.tree.map(lambda column: np.asarray(column).ravel(), found)


class Built(NamedTuple):
    """A stationary point, its target M*, and what was built into it."""

    model: MatrixFactorization
    target: Float[Array, "d1 d2"]
    rank: Array
    excess: Array
    left_out: Array


def stationary_point(
    config: Config, key: PRNGKeyArray, rank: Array, excess: Array, target_rank: int
) -> Built:
    """A point where UVᵀ has the `rank` largest components of a random target.

    Columns that UVᵀ has no use for are √excess times unit vectors, orthogonal to all of
    M*, in U, and 0 in V.
    """
    key_u, key_v, key_values, key_mix = jr.split(key, 4)
    left, _ = jnp.linalg.qr(jr.normal(key_u, (config.d1, config.d1)))
    right, _ = jnp.linalg.qr(jr.normal(key_v, (config.d2, config.d2)))
    values = jnp.sort(jr.uniform(key_values, (target_rank,), minval=0.2))[::-1]
    values = values / jnp.linalg.norm(values)
    matrix = (left[:, :target_rank] * values) @ right[:, :target_rank].T

    width = config.rank
    used = jnp.arange(width) < rank
    root = jnp.where(used, jnp.sqrt(values[:width]), 0)
    noise = jnp.where(excess > 0, 0.1, 0) * jr.normal(key_mix, (width, width))
    mix = jnp.eye(width) + jnp.where(used[:, None] & used, noise, 0)
    spare = left[:, target_rank : target_rank + width] * jnp.sqrt(excess)
    u = (left[:, :width] * root) @ mix + jnp.where(used, 0, spare)
    v = (right[:, :width] * root) @ jnp.linalg.inv(mix).T
    model = MatrixFactorization(config.d1, config.d2, width, key=key)
    model = eqx.tree_at(lambda m: (m.U, m.V), model, (u, v))
    left_out = jnp.append(values, 0.0)[rank]
    return Built(model, matrix, rank, excess, left_out)


def examine(
    model: MatrixFactorization,
    matrix: Float[Array, "d1 d2"],
    rank: Array,
    excess: Array,
    left_out: Array,
) -> Points:
    """Gradient, imbalance, distance and smallest curvature at a point."""
    flat, unravel = ravel_pytree(model)
    gradient, product = jax.linearize(
        jax.grad(lambda w: factorization_objective(unravel(w), matrix)), flat
    )
    hessian = jax.vmap(product)(jnp.eye(flat.size))
    imbalance = model.U.T @ model.U - model.V.T @ model.V
    return Points(
        rank,
        excess,
        left_out,
        jnp.linalg.norm(gradient),
        jnp.linalg.norm(imbalance),
        jnp.linalg.norm(model.U @ model.V.T - matrix),
        jnp.linalg.eigvalsh(hessian)[0],
    )


def closed_form(excess: Any, left_out: Any) -> Any:
    """The smallest eigenvalue at a saddle that lacks σ_j, with ‖p‖² = `excess`.

    In the plane of (u_j eᵀ, 0) and (0, v_j eᵀ), e the direction of an idle column, the
    Hessian is [[0, −σ_j], [−σ_j, ‖p‖²]].
    """
    # Not (‖p‖² − √…)/2, which cancels.
    return -2 * left_out**2 / (excess + np.sqrt(excess**2 + 4 * left_out**2))


def _claims(config: Config, p: Points) -> tuple[Claim, ...]:
    saddle = p.distance > config.epsilon
    expected = closed_form(p.excess[saddle], p.left_out[saddle])
    error = np.abs(p.curvature[saddle] - expected).max()
    slope = _fading(p)
    return (
        Claim(
            "the points that were built are stationary: ‖∇f‖ = 0",
            f"at most {p.gradient.max():.1g} at {p.gradient.size:,} points, of ranks 0 "
            f"to {config.rank}",
            bool(p.gradient.max() < 1e-12 * max(1, max(config.excesses))),
            seeds=config.seeds,
        ),
        _dichotomy(config, p),
        Claim(
            "the most negative eigenvalue is −2σ_j²/(‖p‖² + √(‖p‖⁴ + 4σ_j²))",
            f"within {error:.1g} at {saddle.sum():,} saddles, found matrix-free",
            bool(error < 1e-6),
            seeds=config.seeds,
        ),
        Claim(
            "beyond the lemma: saddles with any imbalance are strict, but the escape "
            "gets slow, as 1/‖UᵀU − VᵀV‖",
            f"eigenvalue negative at all {(saddle & (p.imbalance > config.epsilon)).sum()}"
            f" saddles with imbalance > ε; exponent {slope:.3f}",
            bool((p.curvature[saddle] < 0).all() and abs(slope + 1) < 0.05),
            seeds=config.seeds,
        ),
    )


def _dichotomy(config: Config, p: Points, what: str = "") -> Claim:
    balanced = p.imbalance <= config.epsilon
    solved, strict = p.distance <= config.epsilon, p.curvature < -NEGATIVE
    one_of_two = (solved | strict)[balanced]
    return Claim(
        f"{what}of balanced stationary points (≤ {config.epsilon:g}) each is a solution "
        "or a strict saddle",
        f"{one_of_two.sum()} of {balanced.sum()}: {(solved & balanced).sum()} solutions, "
        f"{(strict & balanced & ~solved).sum()} strict saddles, "
        f"{(~one_of_two).sum()} neither",
        bool(balanced.any() and one_of_two.all()),
        seeds=config.seeds,
    )


def _fading(p: Points) -> float:
    """Exponent of the curvature in ‖p‖² where that is far above σ_j."""
    large = (p.excess >= 3) & (p.left_out > 0)
    scaled = -p.curvature[large] / p.left_out[large] ** 2
    return float(np.polyfit(np.log(p.excess[large]), np.log(scaled), 1)[0])


def draw(report: Report) -> "Figure":
    """Curvature over distance; curvature over imbalance."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    epsilon = report.tables["epsilon"]["epsilon"][0]
    points, beyond = report.tables["points"], report.tables["beyond"]
    balanced = points["imbalance"] <= epsilon
    left.axvspan(-0.03, epsilon, color="0.92", zorder=0)
    left.axhspan(
        -1, -NEGATIVE, fc="0.92", ec="0.6", zorder=0, label="what the lemma allows"
    )
    left.scatter(
        points["distance"][balanced], points["curvature"][balanced],
        color=COLOURS[0], s=28, label="balanced, M* of rank r", zorder=3,
    )  # fmt: skip
    at = beyond["imbalance"] <= epsilon
    left.scatter(
        beyond["distance"][at], beyond["curvature"][at],
        color=COLOURS[1], marker="x", s=36, label="M* of rank r + 1 (control)",
    )  # fmt: skip
    left.set(xlabel=DISTANCE, ylabel="smallest eigenvalue of ∇²f")
    left.set(xlim=(-0.03, 1.05), ylim=(-1, 0.15))
    left.set_title("balanced: solution or strict saddle")
    left.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.12, 0))
    saddle = (points["distance"] > epsilon) & (points["excess"] > 0)
    shades = right.scatter(
        points["excess"][saddle],
        -points["curvature"][saddle],
        c=points["left_out"][saddle], cmap="viridis", s=22,
    )  # fmt: skip
    x = np.geomspace(points["excess"][saddle].min(), 300, 100)
    for sigma in np.quantile(points["left_out"][saddle], (0.1, 0.9)):
        right.plot(x, -closed_form(x, sigma), color="0.4", lw=1, zorder=0)
    right.axvline(epsilon, color="0.3", ls="--", lw=1.5)
    right.set(xscale="log", yscale="log")
    right.set(
        xlabel="imbalance of an idle column, ‖p‖²",
        ylabel="−(smallest eigenvalue of ∇²f)",
    )
    right.set_title("past ε (dashed): strict, but only just")
    figure.colorbar(shades, ax=right, label="largest singular value left out")
    return figure
