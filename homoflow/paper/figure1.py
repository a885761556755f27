"""Figure 1: gradient descent on matrix factorization, with and without regularizer."""

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from .._descent import descend
from .._flow import flow
from .._models import (
    MatrixFactorization,
    factorization_objective,
    regularized_factorization_objective,
)
from .._trajectory import Trajectory
from ..plot import COLOURS
from ._report import Claim, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes, start and step size: the paper gives none of them."""

    d1: int = 50
    d2: int = 40
    rank: int = 5
    std: float = 0.1
    learning_rate: float = 0.05
    steps: int = 1000
    seed: int = 0


def run(config: Config = Config(), *, progress: bool = False) -> Report:
    """Gradient descent on (1) and on (3), and the flow of (1) at the same times."""
    model, target = problem(config)
    descents = {
        name: descend(
            model,
            target,
            config.steps,
            learning_rate=config.learning_rate,
            objective=objective,
            laws=(),
            progress=progress,
        )
        for name, objective in (
            ("GD on (1)", factorization_objective),
            ("GD on (3)", regularized_factorization_objective),
        )
    }
    gd, regularized = descents.values()
    exact = flow(
        model,
        target,
        gd.ts[-1],
        ts=gd.ts,
        objective=factorization_objective,
        progress=progress,
    )
    runs = {**descents, "flow of (1)": exact}
    return Report(
        "figure1",
        "Figure 1: matrix factorization without and with the regularizer",
        _claims(gd, regularized, exact),
        runs,
        _choices(config),
    )


def problem(config: Config) -> tuple[MatrixFactorization, Float[Array, "d1 d2"]]:
    """The start, and a target of the given rank with largest singular value 1."""
    key_model, key_u, key_v = jr.split(jr.key(config.seed), 3)
    u = jr.normal(key_u, (config.d1, config.rank))
    v = jr.normal(key_v, (config.d2, config.rank))
    target = u @ v.T
    model = MatrixFactorization(
        config.d1, config.d2, config.rank, std=config.std, key=key_model
    )
    return model, target / jnp.linalg.norm(target, 2)


def draw(report: Report) -> "Figure":
    """(a) the objective, (b) the ratio of squared norms, (c) the conserved difference."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 4), layout="constrained"
    )
    styles = {"GD on (1)": "-", "GD on (3)": "--", "flow of (1)": ":"}
    for (name, trajectory), colour in zip(
        report.runs.items(), COLOURS[1:], strict=False
    ):
        line = {"color": colour, "linestyle": styles[name], "label": name, "lw": 2}
        left.plot(trajectory.ts, trajectory.losses, **line)
        middle.plot(trajectory.ts, _ratio(trajectory), **line)
        difference = jnp.abs(_difference(trajectory) - _difference(trajectory)[0])
        right.plot(trajectory.ts[1:], difference[1:], **line)
    left.set(yscale="log", xlabel="time t = Σ η", ylabel="objective")
    left.set_title("(a) both converge")
    middle.set(xlabel="time t = Σ η", ylabel="‖U‖² / ‖V‖²")
    middle.set_title("(b) the factors stay balanced")
    right.set(yscale="log", xlabel="time t = Σ η")
    right.set_ylabel("change of ‖U‖² − ‖V‖²")
    right.set_title("what is conserved, and what is not")
    middle.legend(frameon=False)
    return figure


def _claims(
    gd: Trajectory, regularized: Trajectory, exact: Trajectory
) -> tuple[Claim, ...]:
    ratio = _ratio(gd)
    spread = float(jnp.max(ratio) - jnp.min(ratio))
    drift_flow, drift_gd, drift_regularized = (
        float(jnp.max(jnp.abs(_difference(t) - _difference(t)[0])))
        for t in (exact, gd, regularized)
    )
    return (
        Claim(
            "GD on (1), without regularizer, converges to a global minimum",
            "—",
            f"objective {float(gd.losses[0]):.3g} → {float(gd.losses[-1]):.2g}",
            float(gd.losses[-1]) < 1e-6 * float(gd.losses[0]),
        ),
        Claim(
            "its rate is competitive with that on (3)",
            "—",
            f"steps to 1e-3 of the start: {_steps_to(gd)} on (1), "
            f"{_steps_to(regularized)} on (3)",
            _steps_to(gd) <= 2 * _steps_to(regularized),
        ),
        Claim(
            "‖U‖²/‖V‖² stays constant on (1)",
            "constant",
            f"{float(ratio[0]):.3f} → {float(ratio[-1]):.3f}, all within {spread:.3f}",
            spread < 0.5,
        ),
        Claim(
            "‖U‖² − ‖V‖² is conserved by the flow, nearly so by GD, not with (3)",
            "—",
            f"largest change {drift_flow:.1e} (flow), {drift_gd:.1e} (GD on 1), "
            f"{drift_regularized:.1e} (GD on 3)",
            drift_flow < 1e-6 < drift_gd < drift_regularized,
        ),
    )


def _choices(config: Config) -> tuple[str, ...]:
    return (
        f"Sizes {config.d1}×{config.d2}, rank {config.rank}; M* a product of Gaussian "
        "factors with largest singular value 1.",
        f"Entries of U and V start as N(0, {config.std:g}²); "
        f"η = {config.learning_rate:g}, {config.steps} steps.",
        "The ratio can only be constant if it starts near its final value, 1: what is "
        "conserved is the difference, shown in the third panel.",
    )


def _ratio(run: Trajectory) -> Float[Array, " times"]:
    return run.squared_norms["U"] / run.squared_norms["V"]


def _difference(run: Trajectory) -> Float[Array, " times"]:
    return run.squared_norms["U"] - run.squared_norms["V"]


def _steps_to(run: Trajectory, fraction: float = 1e-3) -> int:
    return int(jnp.argmax(run.losses <= fraction * run.losses[0]))
