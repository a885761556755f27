"""Figure 2: the layers of a ReLU network stay, or become, balanced."""

import dataclasses
from typing import TYPE_CHECKING

import diffrax as dfx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from .._compare import compare
from .._descent import descend
from .._flow import flow
from .._models import MLP, Gaussian
from .._trajectory import Trajectory
from ..plot import COLOURS
from ._report import Claim, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What §4 prints: final ‖W_h‖_F², and the bound on their differences.
PRINTED = {
    "balanced": ((42.90, 43.76, 43.68), 0.14),
    "unbalanced": ((55.50, 45.65, 45.46), 9.0),
}
#: The paper's variances of the entries of each layer.
VARIANCES = {"balanced": (1e-4 / 100, 1e-4 / 10, 1e-4), "unbalanced": (1e-4,) * 3}


@dataclasses.dataclass(frozen=True)
class Config:
    """The paper's sizes and number of steps; data and step size are our choice."""

    sizes: tuple[int, ...] = (1000, 100, 100, 10)
    samples: int = 1000
    label_variance: float = 10.5
    learning_rate: float = 0.008
    steps: int = 10_000
    record_every: int = 50
    flow_steps_per_step: int = 2
    seed: int = 0


def run(config: Config = Config(), *, progress: bool = False) -> Report:
    """Gradient descent from both starts, and the flow at the same times."""
    runs: dict[str, Trajectory] = {}
    claims: list[Claim] = []
    for start in PRINTED:
        model, data = problem(config, start)
        gd = descend(
            model,
            data,
            config.steps,
            learning_rate=config.learning_rate,
            record_every=config.record_every,
            progress=progress,
        )
        exact = flow(
            model,
            data,
            gd.ts[-1],
            ts=gd.ts,
            solver=dfx.Heun(),
            stepsize_controller=dfx.ConstantStepSize(),
            dt0=config.learning_rate / config.flow_steps_per_step,
            max_steps=config.steps * config.flow_steps_per_step + 1,
            progress=progress,
        )
        runs |= {f"GD, {start}": gd, f"flow, {start}": exact}
        claims += _claims(start, gd, exact)
    return Report(
        "figure2",
        "Figure 2: balancedness of a 3-layer ReLU network",
        tuple(claims),
        runs,
        _choices(config),
    )


def problem(
    config: Config, start: str
) -> tuple[MLP, tuple[Float[Array, "m d"], Float[Array, "m p"]]]:
    """The network at its `"balanced"` or `"unbalanced"` start, and the data."""
    key_model, key_x, key_y = jr.split(jr.key(config.seed), 3)
    init = Gaussian(variance=VARIANCES[start])
    model = MLP(config.sizes, init=init, key=key_model)
    x = jr.normal(key_x, (config.samples, config.sizes[0]))
    y = jr.normal(key_y, (config.samples, config.sizes[-1]))
    return model, (x, jnp.sqrt(config.label_variance) * y)


def draw(report: Report) -> "Figure":
    """The paper's four panels: differences and ratios, from both starts."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, 2, figsize=(10, 7), sharex=True, layout="constrained"
    )
    for row, start in zip(axes, PRINTED, strict=True):
        for kind, style in (("GD", "-"), ("flow", ":")):
            trajectory = report.runs[f"{kind}, {start}"]
            for (low, high), colour in zip(((1, 2), (2, 3)), COLOURS, strict=False):
                a, b = _norm(trajectory, low - 1), _norm(trajectory, high - 1)
                line = {"color": colour, "linestyle": style, "lw": 2.5}
                label = f"layers {low} and {high}, {kind}"
                row[0].plot(trajectory.ts, jnp.abs(a - b), label=label, **line)
                row[1].plot(trajectory.ts, a / b, **line)
        row[0].set_title(f"{start} start: |‖W_h‖² − ‖W_h+1‖²|")
        row[1].set_title(f"{start} start: ‖W_h‖² / ‖W_h+1‖²")
        row[0].set(ylabel="difference of squared norms", ylim=(0, None))
        row[1].set(ylabel="ratio of squared norms", ylim=(0, None))
        row[1].axhline(1, color="0.8", lw=1, zorder=0)
    for ax in axes[1]:
        ax.set_xlabel("time t = Σ η")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _claims(start: str, gd: Trajectory, exact: Trajectory) -> list[Claim]:
    printed, bound = PRINTED[start]
    finals = [float(_norm(gd, h)[-1]) for h in range(3)]
    flow_finals = [float(_norm(exact, h)[-1]) for h in range(3)]
    gap, gap_flow = _largest_gap(gd), _largest_gap(exact)
    change, change_flow = _largest_change(gd), _largest_change(exact)
    apart = max(abs(a / b - 1) for a, b in zip(finals, flow_finals, strict=True))
    distance = float(compare(exact, gd).relative_weight_distance)
    return [
        Claim(
            f"{start}: final ‖W_h‖² by GD; ratios become close to 1",
            " / ".join(f"{v:.2f}" for v in printed),
            " / ".join(f"{v:.2f}" for v in finals),
            max(finals) / min(finals) < 1.25,
        ),
        Claim(
            f"{start}: differences of ‖W_h‖² stay bounded, far below ‖W_h‖²",
            f"≤ {bound:g}",
            f"≤ {gap:.3g} by GD, ≤ {gap_flow:.3g} by the flow",
            gap < 0.25 * min(finals),
        ),
        Claim(
            f"{start}: the flow conserves the differences, GD changes them a little",
            "—",
            f"largest change {change_flow:.2g} (flow), {change:.2g} (GD)",
            change_flow < change / 3,
        ),
        Claim(
            f"{start}: the flow ends with the same norms as GD",
            "—",
            f"{' / '.join(f'{v:.2f}' for v in flow_finals)}, within {apart:.1%} (the "
            f"weights themselves differ by {distance:.0%})",
            apart < 0.05,
        ),
    ]


def _choices(config: Config) -> tuple[str, ...]:
    return (
        "Data, labels and step size are not given. Chosen: x ~ N(0, I), labels "
        f"N(0, {config.label_variance:g} I), η = {config.learning_rate:g}, so that "
        f"{config.steps} steps take time {config.steps * config.learning_rate:g}.",
        "The printed numbers do not agree with each other: |42.90 − 43.76| = 0.86 is not "
        "bounded by 0.14 (42.90 may be a misprint of 43.90). They are shown for "
        "comparison, not as targets.",
        "The flow is approximate: Heun's method with constant steps, "
        f"{config.flow_steps_per_step} for each of gradient descent's; second order but at "
        "kinks. From so small a start final weights are extremely sensitive, to the step "
        "too; norms and laws are not.",
        f"This run: sizes {'-'.join(map(str, config.sizes))}, {config.samples} samples.",
    )


def _norm(run: Trajectory, h: int) -> Float[Array, " times"]:
    return run.squared_norms[f"layers[{h}].weight"]


def _largest_gap(run: Trajectory) -> float:
    return max(float(jnp.max(jnp.abs(run.laws[f"layers[{h}]"]))) for h in (1, 2))


def _largest_change(run: Trajectory) -> float:
    return max(
        float(jnp.max(jnp.abs(run.laws[f"layers[{h}]"] - run.laws[f"layers[{h}]"][0])))
        for h in (1, 2)
    )
