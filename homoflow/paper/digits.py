"""Auto-balancing on real data: scikit-learn's handwritten digits."""

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from .._descent import descend
from .._flow import flow
from .._losses import SoftmaxCrossEntropy
from .._models import MLP, AbstractNetwork, Balanced, ConvNet, Gaussian
from .._progress import Progress
from .._trajectory import Trajectory
from ..plot import COLOURS
from ._conservation import candidates, relative_change
from ._report import Claim, Report, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSE, CONVOLUTIONAL, TANH = "ReLU MLP", "ReLU ConvNet", "tanh MLP"
BALANCED, UNBALANCED = "balanced", "unbalanced"
GD, SGD, ADAM, FLOW = "GD", "SGD", "Adam", "flow"
#: Discrete steps may change differences of squared norms by this part of ‖w‖².
SMALL = 0.03
#: Layers count as balanced if the largest squared norm exceeds the smallest by so much.
NEAR = 1.5
#: Test accuracy of a network that has learned; guessing has 10 %.
LEARNED = 0.85


#: A network, its start, and the method that trains it.
Case = tuple[str, str, str]
CONTROLS: tuple[Case, ...] = (
    (TANH, UNBALANCED, GD),
    (DENSE, UNBALANCED, ADAM),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Small starts of a dense and of a convolutional network, softmax cross-entropy."""

    cases: tuple[Case, ...] = (
        *itertools.product((DENSE, CONVOLUTIONAL), (BALANCED, UNBALANCED), (GD, SGD)),
        (DENSE, UNBALANCED, FLOW),
        *CONTROLS,
    )
    images: int = 1797
    hidden: tuple[int, ...] = (32, 32)
    channels: tuple[int, ...] = (4, 8)
    dense_std: float = 0.05
    conv_std: float = 0.1
    learning_rate: float = 0.05
    adam_rate: float = 0.003
    steps: int = 3000
    batch_size: int = 64
    record_every: int = 20
    flow_times: int = 51
    test_fraction: float = 0.25
    seed: int = 0


QUICK = Config(
    cases=(
        (DENSE, UNBALANCED, GD),
        (DENSE, UNBALANCED, SGD),
        (DENSE, UNBALANCED, FLOW),
        (CONVOLUTIONAL, UNBALANCED, GD),
        CONTROLS[0],
    ),
    images=400,
    learning_rate=0.1,
    steps=800,
    flow_times=41,
)

Samples = tuple[Float[Array, "_ 64"], Int[Array, " _"]]


def run(config: Config = Config(), *, progress: Progress = False) -> Report:
    """Every network from both starts by every method, on three quarters of the images."""
    rows, over_time = [], {}
    for network, start, method in config.cases:
        trajectory = train(config, network, start, method, progress=progress)
        rows.append(_row(config, trajectory, network, start, method))
        over_time[f"{network}, {start}, {method}"] = _columns(trajectory)
    table = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    return Report(
        "digits",
        "Auto-balancing on real data: handwritten digits",
        "Not in the paper: what its theorems say of gradient flow, on real images with "
        "softmax cross-entropy, by gradient descent and with minibatches.",
        _claims(table),
        _controls(table),
        {"runs": table, **over_time},
        _choices(config),
    )


def digits(config: Config) -> tuple[Samples, Samples]:
    """Training and test samples, in a random order that the seed determines."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(config.seed).permutation(len(images))
    order = order[: config.images]
    x = jnp.asarray(images[order] / 16, jnp.zeros(()).dtype)
    y = jnp.asarray(labels[order])
    test = int(config.test_fraction * len(order))
    return (x[test:], y[test:]), (x[:test], y[:test])


def network_of(config: Config, network: str, start: str) -> AbstractNetwork:
    """A network at its start: every unit balanced, or all entries alike."""
    convolutional = network == CONVOLUTIONAL
    std = config.conv_std if convolutional else config.dense_std
    init = Balanced(std) if start == BALANCED else Gaussian(std=std)
    key = jr.key(config.seed)
    if convolutional:
        return ConvNet(
            (1, 8, 8), config.channels, 10, stride=2, padding=1, init=init, key=key
        )
    activation = jnp.tanh if network == TANH else "relu"
    return MLP((64, *config.hidden, 10), activation=activation, init=init, key=key)


def train(
    config: Config, network: str, start: str, method: str, *, progress: Progress = False
) -> Trajectory:
    """One run, recorded with the laws that the layers have or would have if linear."""
    (x, labels), _ = digits(config)
    model = network_of(config, network, start)
    shape = (1, 8, 8) if network == CONVOLUTIONAL else (64,)
    data = (x.reshape(-1, *shape), labels)
    # A dictionary, as the two functions have it in common.
    common: dict[str, Any] = {
        "loss": SoftmaxCrossEntropy(),
        "laws": [law for law in candidates(model) if law.contraction == "total"],
        "progress": progress,
    }
    if method == FLOW:
        t1 = config.steps * config.learning_rate
        ts = np.linspace(0, t1, config.flow_times)
        return flow(model, data, t1, ts=ts, project=False, **common)
    return descend(
        model,
        data,
        config.steps,
        learning_rate=config.adam_rate if method == ADAM else config.learning_rate,
        optimizer=optax.adam if method == ADAM else optax.sgd,
        batch_size=config.batch_size if method == SGD else None,
        key=jr.key(config.seed + 1) if method == SGD else None,
        record_every=config.record_every,
        **common,
    )


def _row(
    config: Config, run: Trajectory, network: str, start: str, method: str
) -> dict[str, Any]:
    norms = np.stack([np.asarray(v) for v in run.squared_norms.values()], axis=1)
    ratio = norms.max(axis=1) / norms.min(axis=1)
    return {
        "network": network,
        "start": start,
        "method": method,
        "change": max(float(relative_change(run, name).max()) for name in run.laws),
        "ratio at start": float(ratio[0]),
        "ratio at end": float(ratio[-1]),
        "growth": float(norms[-1].sum() / norms[0].sum()),
        "accuracy": accuracy(config, run.model, network),
    }


def accuracy(config: Config, model: AbstractNetwork, network: str) -> float:
    """The fraction of test images that are classified correctly."""
    _, (x, labels) = digits(config)
    x = x.reshape(-1, 1, 8, 8) if network == CONVOLUTIONAL else x
    return float(jnp.mean(jnp.argmax(jax.vmap(model)(x), axis=1) == labels))


def _columns(run: Trajectory) -> Table:
    norms = {
        f"layer {h}": np.asarray(v) for h, v in enumerate(run.squared_norms.values(), 1)
    }
    return {"t": np.asarray(run.ts), "loss": np.asarray(run.losses), **norms}


def _claims(table: Table) -> tuple[Claim, ...]:
    steps = np.isin(table["method"], (GD, SGD)) & (table["network"] != TANH)
    kinds = dict.fromkeys(
        zip(table["network"][steps], table["method"][steps], strict=True)
    )
    exact = table["method"] == FLOW
    gd = (table["network"] == DENSE) & (table["method"] == GD)
    gd &= table["start"] == UNBALANCED
    flow_change, gd_change = table["change"][exact][0], table["change"][gd][0]
    learned = table["accuracy"][steps | exact]
    return (
        *(
            _change_claim(table, (table["network"] == n) & (table["method"] == m))
            for n, m in kinds
        ),
        Claim(
            "the flow of the MLP changes them ten times less than GD does",
            f"{flow_change:.1e} of ‖w‖² (by the flow, averaged over kinks), "
            f"{gd_change:.1e} by GD",
            bool(flow_change < gd_change / 10),
        ),
        _balance_claim(table, steps & (table["start"] == UNBALANCED)),
        Claim(
            f"the ReLU networks have learned: test accuracy above {LEARNED:.0%}",
            f"{learned.min():.1%} to {learned.max():.1%}",
            bool((learned > LEARNED).all()),
        ),
    )


def _controls(table: Table) -> tuple[Claim, ...]:
    cases = zip(table["network"], table["start"], table["method"], strict=True)
    return tuple(
        _change_claim(table, np.arange(len(table["method"])) == i)
        for i, case in enumerate(cases)
        if case in CONTROLS
    )


def _change_claim(table: Table, chosen: np.ndarray) -> Claim:
    change = table["change"][chosen]
    network, method = table["network"][chosen][0], table["method"][chosen][0]
    starts = " and ".join(dict.fromkeys(table["start"][chosen].tolist()))
    return Claim(
        f"{network} by {method} ({starts} start): differences ‖W_h‖² − ‖W_{{h+1}}‖² "
        f"change by less than {SMALL:.0%} of ‖w‖²",
        f"{' and '.join(f'{c:.2%}' for c in change)}, while ‖w‖² grows "
        f"{' and '.join(f'{g:.3g}' for g in table['growth'][chosen])}-fold",
        bool((change < SMALL).all()),
    )


def _balance_claim(table: Table, chosen: np.ndarray) -> Claim:
    start, end = table["ratio at start"][chosen], table["ratio at end"][chosen]
    return Claim(
        f"from small unbalanced starts by GD and SGD, the largest ‖W_h‖² ends at most "
        f"{NEAR:g} times the smallest",
        "; ".join(
            f"{n}, {m}: {a:.2f} → {b:.2f}"
            for n, m, a, b in zip(
                table["network"][chosen],
                table["method"][chosen],
                start,
                end,
                strict=True,
            )
        ),
        bool((end <= NEAR).all()),
    )


def _choices(config: Config) -> tuple[str, ...]:
    train_count = config.images - int(config.test_fraction * config.images)
    return (
        f"MLP 64-{'-'.join(map(str, config.hidden))}-10, entries N(0, "
        f"{config.dense_std:g}²); ConvNet with channels {config.channels}, kernels of 3, "
        f"stride 2, entries N(0, {config.conv_std:g}²); or every unit balanced exactly.",
        f"η = {config.learning_rate:g} ({config.adam_rate:g} for Adam), {config.steps} "
        f"steps; SGD with batches of {config.batch_size}.",
        f"{train_count} images for training, the other {config.images - train_count} for "
        "testing; pixels in [0, 1].",
        "Adam has no clock of the flow; its time is the sum of its learning rates.",
    )


def draw(report: Report) -> "Figure":
    """Squared norms of layers over time in three runs; the change of laws in all."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8.4), layout="constrained")
    panels = (
        (axes[0, 0], DENSE, "(a) ReLU MLP: the layers join"),
        (axes[0, 1], CONVOLUTIONAL, "(b) ReLU ConvNet: they join"),
        (axes[1, 0], TANH, "(c) tanh MLP: they part"),
    )
    for ax, network, title in panels:
        for method, style in ((GD, "-"), (FLOW, ":")):
            table = report.tables.get(f"{network}, {UNBALANCED}, {method}")
            if table is not None:
                _draw_norms(ax, table, method, style)
        ax.set(xlabel="time t = Σ η", ylabel="squared norm ‖W_h‖²", title=title)
        ax.legend(frameon=False)
    _draw_changes(axes[1, 1], report.tables["runs"])
    return figure


def _draw_norms(ax: "Axes", table: Table, method: str, style: str) -> None:
    layers = [name for name in table if name.startswith("layer")]
    for name, colour in zip(layers, COLOURS, strict=False):
        label = f"{name}, {method}"
        ax.plot(table["t"], table[name], style, color=colour, lw=2.5, label=label)


def _draw_changes(ax: "Axes", table: Table) -> None:
    markers = {DENSE: ("o", COLOURS[0]), CONVOLUTIONAL: ("s", COLOURS[1]),
               TANH: ("^", COLOURS[2])}  # fmt: skip
    methods = (FLOW, GD, SGD, ADAM)
    for place, method in enumerate(methods):
        for i, (network, (marker, colour)) in enumerate(markers.items()):
            for start, fill in ((BALANCED, "none"), (UNBALANCED, colour)):
                chosen = (
                    (table["method"] == method)
                    & (table["network"] == network)
                    & (table["start"] == start)
                )
                ax.plot(
                    np.full(chosen.sum(), place + 0.18 * (i - 1)),
                    table["change"][chosen],
                    marker, ms=9, color=colour, mfc=fill, mew=1.8,
                )  # fmt: skip
    for network, (marker, colour) in markers.items():
        ax.plot([], [], marker, ms=9, color=colour, label=network)
    ax.plot([], [], "o", ms=9, color="0.3", mfc="none", mew=1.8, label="balanced start")
    ax.axhline(SMALL, color="0.3", ls="--", lw=1.5)
    ax.set_xticks(range(len(methods)), methods)
    ax.set_xlim(-0.5, len(methods) - 0.5)
    ax.set(yscale="log", xlabel="method")
    ax.set_ylabel("change of ‖W_h‖² − ‖W_h+1‖², over ‖w‖²")
    ax.set_title("(d) every run: Adam and tanh lose the balance")
    ax.legend(frameon=False)
