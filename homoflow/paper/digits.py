"""Auto-balancing on real data: scikit-learn's handwritten digits."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int

from .._descent import descend
from .._flow import flow
from .._losses import SoftmaxCrossEntropy
from .._models import MLP, Gaussian
from .._trajectory import Trajectory
from ..plot import COLOURS
from ._report import Claim, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Config:
    """A ReLU network with an unbalanced small start, softmax cross-entropy."""

    hidden: tuple[int, ...] = (32, 32)
    std: float = 0.05
    learning_rate: float = 0.1
    steps: int = 1500
    record_every: int = 10
    test_fraction: float = 0.25
    seed: int = 0


def run(config: Config = Config(), *, progress: bool = False) -> Report:
    """Gradient descent and the flow on three quarters of the 1,797 images."""
    (x, labels), (x_test, labels_test) = digits(config)
    model = MLP(
        (64, *config.hidden, 10), init=Gaussian(std=config.std), key=jr.key(config.seed)
    )
    loss = SoftmaxCrossEntropy()
    gd = descend(
        model,
        (x, labels),
        config.steps,
        learning_rate=config.learning_rate,
        record_every=config.record_every,
        loss=loss,
        progress=progress,
    )
    exact = flow(model, (x, labels), gd.ts[-1], ts=gd.ts, loss=loss, progress=progress)
    accuracy = {
        name: _accuracy(t.model, x_test, labels_test)
        for name, t in (("GD", gd), ("flow", exact))
    }
    return Report(
        "digits",
        "Auto-balancing on real data: 1,797 handwritten digits",
        _claims(gd, exact, accuracy),
        {"GD": gd, "flow": exact},
        (
            f"Not in the paper. ReLU network 64-{'-'.join(map(str, config.hidden))}-10, "
            f"all entries N(0, {config.std:g}²), softmax cross-entropy, "
            f"η = {config.learning_rate:g}, {config.steps} steps.",
            f"{len(x)} images for training, {len(x_test)} for testing; pixels in [0, 1].",
        ),
    )


Samples = tuple[Float[Array, "_ 64"], Int[Array, " _"]]


def digits(config: Config) -> tuple[Samples, Samples]:
    """Training and test samples, in a random order that the seed determines."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(config.seed).permutation(len(images))
    x = jnp.asarray(images[order] / 16, jnp.zeros(()).dtype)
    y = jnp.asarray(labels[order])
    test = int(config.test_fraction * len(images))
    return (x[test:], y[test:]), (x[:test], y[:test])


def draw(report: Report) -> "Figure":
    """Loss, squared norms of the layers, and the change of their differences."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 4.5), layout="constrained"
    )
    for (name, t), style in zip(report.runs.items(), ("-", ":"), strict=True):
        left.plot(t.ts, t.losses, style, color=COLOURS[6], lw=2, label=name)
        norms = list(t.squared_norms.values())
        for h, (norm, colour) in enumerate(zip(norms, COLOURS, strict=False), 1):
            label = f"‖W{h}‖², {name}"
            middle.plot(t.ts, norm, style, color=colour, lw=2, label=label)
        for h, colour in zip(range(1, len(norms)), COLOURS, strict=False):
            difference = t.laws[f"layers[{h}]"]
            change = jnp.abs(difference - difference[0])[1:]
            label = f"‖W{h}‖² − ‖W{h + 1}‖², {name}"
            right.plot(t.ts[1:], change, style, color=colour, lw=2, label=label)
    left.set(ylabel="training loss", title="the two learn alike", ylim=(0, None))
    middle.set(ylabel="squared norm", title="the layers grow together")
    right.set(
        yscale="log", ylabel="change since t = 0", title="what discrete steps add"
    )
    for ax in (left, middle, right):
        ax.set_xlabel("time t = Σ η")
        ax.legend(
            frameon=False, fontsize=8, ncols=2, loc="upper center",
            bbox_to_anchor=(0.5, -0.15),
        )  # fmt: skip
    return figure


def _claims(
    gd: Trajectory, exact: Trajectory, accuracy: dict[str, float]
) -> tuple[Claim, ...]:
    norms = [float(v[-1]) for v in gd.squared_norms.values()]
    starts = [float(v[0]) for v in gd.squared_norms.values()]
    change, change_flow = _largest_change(gd), _largest_change(exact)
    return (
        Claim(
            "the layers' squared norms approach each other",
            "—",
            f"largest / smallest: {max(starts) / min(starts):.2f} → "
            f"{max(norms) / min(norms):.2f}",
            max(norms) / min(norms) < max(starts) / min(starts),
        ),
        Claim(
            "their differences are conserved by the flow and nearly so by GD",
            "—",
            f"largest change {change_flow:.2g} (flow), {change:.2g} (GD), of norms near "
            f"{max(norms):.3g}",
            change_flow < change < 0.1 * max(norms),
        ),
        Claim(
            "the network has learned",
            "—",
            f"test accuracy {accuracy['GD']:.1%} (GD), {accuracy['flow']:.1%} (flow)",
            min(accuracy.values()) > 0.9,
        ),
    )


def _layer_laws(run: Trajectory) -> dict[str, Array]:
    return {k: v for k, v in run.laws.items() if k.startswith("layers[")}


def _largest_change(run: Trajectory) -> float:
    return max(float(jnp.max(jnp.abs(v - v[0]))) for v in _layer_laws(run).values())


def _accuracy(model: MLP, x: Array, labels: Array) -> float:
    return float(jnp.mean(jnp.argmax(jax.vmap(model)(x), axis=1) == labels))
