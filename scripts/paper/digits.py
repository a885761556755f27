"""Auto-balancing on real data: scikit-learn's handwritten digits."""

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from homoflow import (
    MLP,
    AbstractNetwork,
    Balanced,
    ConvNet,
    Gaussian,
    Law,
    SoftmaxCrossEntropy,
    Trajectory,
    descend,
    flow,
)
from homoflow.plot import COLOURS

from ._conservation import candidates
from ._labels import DIFFERENCE, NORM
from ._progress import Progress
from ._report import Claim, Report, Table
from ._steps import (
    ERRORS,
    HALVING,
    ROUNDING,
    Additions,
    additions,
    balance_change,
    change_of,
    norms_by_start,
    ratio,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSE, CONVOLUTIONAL, TANH = "ReLU MLP", "ReLU ConvNet", "tanh MLP"
BALANCED, UNBALANCED = "balanced", "unbalanced"
GD, SGD, ADAM, FLOW = "GD", "SGD", "Adam", "flow"
#: Test accuracy of a network that has learned; guessing has 10 %.
LEARNED = 0.85

#: A network, its start, and the method that trains it.
Case = tuple[str, str, str]
_KEYS = ("network", "start", "method")
#: Where the noise of batches is compared with its covariance.
NOISY: Case = (DENSE, UNBALANCED, SGD)
CONTROLS: tuple[Case, ...] = (
    (TANH, UNBALANCED, GD),
    (DENSE, UNBALANCED, ADAM),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Small starts of a dense and of a convolutional network, softmax cross-entropy.

    Those of `halved` are run once more, with half the step and twice as many.
    """

    cases: tuple[Case, ...] = (
        *itertools.product((DENSE, CONVOLUTIONAL), (BALANCED, UNBALANCED), (GD, SGD)),
        (DENSE, UNBALANCED, FLOW),
        *CONTROLS,
    )
    halved: tuple[Case, ...] = (
        *itertools.product((DENSE, CONVOLUTIONAL), (UNBALANCED,), (GD, SGD)),
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
        *CONTROLS,
    ),
    halved=((DENSE, UNBALANCED, GD), CONTROLS[0]),
    images=400,
    learning_rate=0.1,
    steps=800,
    flow_times=41,
)

Samples = tuple[Float[Array, "_ 64"], Int[Array, " _"]]


def run(config: Config = Config(), *, progress: Progress = False) -> Report:
    """Every network from both starts by every method, on three quarters of the images."""
    rows, over_time = [], {}
    added: dict[str, Additions] = {}
    for case in config.cases:
        network, start, method = case
        trajectory = train(config, case, progress=progress)
        rows.append(_row(config, trajectory, case))
        over_time[f"{network}, {start}, {method}"] = _columns(trajectory)
        if case == NOISY:
            added = _additions(config, trajectory)
    table = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    halved = _halved(config, table, progress=progress)
    return Report(
        "digits",
        "Auto-balancing on real data: handwritten digits",
        "Not in the paper: what its theorems say of gradient flow, on real images with "
        "softmax cross-entropy, by gradient descent and with minibatches.",
        _claims(table, halved, added),
        _controls(table, halved, added),
        {"runs": table, "half the step": halved, **over_time},
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


def train(config: Config, case: Case, *, progress: Progress = False) -> Trajectory:
    """One run, recorded with the laws that the layers have or would have if linear.

    Descent has an account of its steps; `NOISY` keeps its models, too.
    """
    network, start, method = case
    model = network_of(config, network, start)
    # A dictionary, as the two functions have it in common.
    common: dict[str, Any] = {
        "loss": SoftmaxCrossEntropy(),
        "laws": totals(model),
        "save_models": case == NOISY,
        "progress": progress,
    }
    if method == FLOW:
        t1 = config.steps * config.learning_rate
        ts = np.linspace(0, t1, config.flow_times)
        data = training_data(config, network)
        return flow(model, data, t1, ts=ts, project=False, **common)
    return descend(
        model,
        training_data(config, network),
        config.steps,
        learning_rate=config.adam_rate if method == ADAM else config.learning_rate,
        optimizer=optax.adam if method == ADAM else optax.sgd,
        batch_size=config.batch_size if method == SGD else None,
        key=jr.key(config.seed + 1) if method == SGD else None,
        record_every=config.record_every,
        ledger=True,
        **common,
    )


def training_data(config: Config, network: str) -> tuple[Array, Array]:
    """The training samples in the shape that the network takes."""
    (x, labels), _ = digits(config)
    shape = (1, 8, 8) if network == CONVOLUTIONAL else (64,)
    return x.reshape(-1, *shape), labels


def totals(model: AbstractNetwork) -> list[Law]:
    """The laws of whole layers."""
    return [law for law in candidates(model) if law.contraction == "total"]


def _row(config: Config, run: Trajectory, case: Case) -> dict[str, Any]:
    network, start, method = case
    norms = np.stack([np.asarray(v) for v in run.squared_norms.values()], axis=1)
    first, last = norms[0], norms[-1]
    return {
        "network": network,
        "start": start,
        "method": method,
        "change": change_of(run),
        "left over": float(balance_change(run).left)
        if run.ledger is not None
        else np.nan,
        "ratio at start": float(ratio(first)),
        "ratio at end": float(ratio(last)),
        "ratio by the start": float(ratio(norms_by_start(first, last))),
        "growth": float(last.sum() / first.sum()),
        "accuracy": accuracy(config, run.model, network),
    }


def _halved(config: Config, table: Table, *, progress: Progress = False) -> Table:
    """The change of the laws with the step of `table`, and with half of it."""
    finer = dataclasses.replace(
        config,
        learning_rate=config.learning_rate / 2,
        adam_rate=config.adam_rate / 2,
        steps=2 * config.steps,
        record_every=2 * config.record_every,
    )
    rows = []
    for case in config.halved:
        (place,) = np.flatnonzero(_is(table, case))
        change = change_of(train(finer, case, progress=progress))
        rows.append((*case, table["change"][place], change))
    names = ("network", "start", "method", "change", "change with half the step")
    return {n: np.array(c) for n, c in zip(names, zip(*rows, strict=True), strict=True)}


def _is(table: Table, case: Case) -> Bool[np.ndarray, " rows"]:
    columns = (table[name] == value for name, value in zip(_KEYS, case, strict=True))
    return np.logical_and.reduce(list(columns))


def _additions(config: Config, run: Trajectory) -> dict[str, Additions]:
    """What the recorded steps of `NOISY` added to each law, against the mean."""
    network, start, _ = NOISY
    data = training_data(config, network)
    return {
        law.name: additions(
            run, law, data, SoftmaxCrossEntropy(), config.learning_rate,
            config.batch_size,
        )
        for law in totals(network_of(config, network, start))
    }  # fmt: skip


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


def _claims(
    table: Table, halved: Table, added: dict[str, Additions]
) -> tuple[Claim, ...]:
    descents = np.isin(table["method"], (GD, SGD)) & (table["network"] != TANH)
    exact = table["method"] == FLOW
    learned = table["accuracy"][descents | exact]
    kinds = dict.fromkeys(
        zip(table["network"][descents], table["method"][descents], strict=True)
    )
    return (
        *(
            _account_claim(table, (table["network"] == n) & (table["method"] == m))
            for n, m in kinds
        ),
        *(_halving_claim(halved, i) for i in _rows(halved, controls=False)),
        *(_noise_claim(name, a) for name, a in added.items()),
        _flow_claim(table, exact),
        _balance_claim(table, descents & (table["start"] == UNBALANCED)),
        Claim(
            f"the ReLU networks have learned: test accuracy above {LEARNED:.0%}",
            f"{learned.min():.1%} to {learned.max():.1%}",
            bool((learned > LEARNED).all()),
        ),
    )


def _controls(
    table: Table, halved: Table, added: dict[str, Additions]
) -> tuple[Claim, ...]:
    return (
        *(_account_claim(table, [i]) for i in _rows(table, controls=True)),
        *(_halving_claim(halved, i) for i in _rows(halved, controls=True)),
        *(_noise_claim(name, a, noise=False) for name, a in added.items()),
    )


def _rows(table: Table, *, controls: bool) -> list[int]:
    """The rows of controls, or of all others."""
    cases = zip(*(table[name].tolist() for name in _KEYS), strict=True)
    return [i for i, case in enumerate(cases) if (case in CONTROLS) == controls]


def _account_claim(table: Table, chosen: Any) -> Claim:
    change, left = table["change"][chosen], table["left over"][chosen]
    network, method = table["network"][chosen][0], table["method"][chosen][0]
    starts = " and ".join(dict.fromkeys(table["start"][chosen].tolist()))
    return Claim(
        f"{network} by {method} ({starts} start): the differences ‖W_h‖² − ‖W_{{h+1}}‖² "
        "change by Σ η²(‖∂L/∂W_h‖² − ‖∂L/∂W_{h+1}‖²) over the steps, and by nothing else",
        f"by {' and '.join(f'{c:.2%}' for c in change)} of ‖w‖² (which grows "
        f"{' and '.join(f'{g:.3g}' for g in table['growth'][chosen])}-fold); left over "
        f"{left.max():.1e}",
        bool((left <= ROUNDING).all()),
    )


def _halving_claim(halved: Table, row: int) -> Claim:
    network, start, method = (halved[name][row] for name in _KEYS)
    coarse, fine = halved["change"][row], halved["change with half the step"][row]
    return Claim(
        f"{network} by {method} ({start} start): half the step, half the change",
        f"{coarse:.2e} → {fine:.2e} of ‖w‖², {coarse / fine:.2f} times less",
        bool(abs(coarse / fine / 2 - 1) <= HALVING),
    )


def _noise_claim(name: str, added: Additions, *, noise: bool = True) -> Claim:
    network, _, method = NOISY
    formula = "η²(q(∇L) + tr AΣ), Σ the covariance of a batch's gradient"
    expected, off = added.expected, added.off
    if not noise:
        formula = "η²q(∇L), without the noise of batches"
        expected, off = added.of_mean, added.off_without_noise
    return Claim(
        f"{network} by {method}: a step changes {name} by {formula}, in the mean",
        f"{added.observed:.3g} over the recorded steps; {expected:.3g} expected, "
        f"{off:.1f} standard errors away",
        off <= ERRORS,
    )


def _flow_claim(table: Table, exact: Any) -> Claim:
    (network,) = table["network"][exact]
    (flow_change,) = table["change"][exact]
    (gd_change,) = table["change"][_is(table, (network, UNBALANCED, GD))]
    return Claim(
        f"the flow of the {network} changes them less than GD does",
        f"{flow_change:.1e} of ‖w‖² (by the flow, averaged over kinks), "
        f"{gd_change:.1e} by GD",
        bool(flow_change < gd_change),
    )


def _balance_claim(table: Table, chosen: np.ndarray) -> Claim:
    start, end, said = (
        table[f"ratio {when}"][chosen]
        for when in ("at start", "at end", "by the start")
    )
    names = zip(table["network"][chosen], table["method"][chosen], strict=True)
    numbers = zip(start, end, said, strict=True)
    return Claim(
        "from small unbalanced starts by GD and SGD the largest ‖W_h‖² comes closer to "
        "the smallest: all gain the same, so that the differences at the start and ‖w‖² "
        "say how close",
        "; ".join(
            f"{n}, {m}: {a:.2f} → {b:.2f} (so said: {c:.2f})"
            for (n, m), (a, b, c) in zip(names, numbers, strict=True)
        ),
        bool((end < start).all()),
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
        ax.set(xlabel="time t = Σ η", ylabel=f"squared norm {NORM}", title=title)
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
            chosen = (table["method"] == method) & (table["network"] == network)
            x = np.full(chosen.sum(), place + 0.18 * (i - 1))
            line: dict[str, Any] = {"color": colour, "ms": 8, "mew": 1.8}
            ax.plot(x, table["change"][chosen], marker, **line)
            ax.plot(x, table["left over"][chosen], marker, mfc="none", **line)
    for network, (marker, colour) in markers.items():
        ax.plot([], [], marker, ms=8, color=colour, label=network)
    label = "hollow: not Σ η²q(∇L)"
    ax.plot([], [], "o", ms=8, color="0.3", mfc="none", mew=1.8, label=label)
    ax.set_xticks(range(len(methods)), methods)
    ax.set_xlim(-0.5, len(methods) - 0.5)
    ax.set(yscale="log", xlabel="method", ylim=(1e-17, 1e2))
    ax.set_ylabel(f"change of {DIFFERENCE}, over ‖w‖²")
    ax.set_title("(d) steps explain all, but for tanh and Adam")
    ax.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.45))
