"""Figure 2 on a small network: data, label scale, step size and start, varied."""

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from .._descent import descend
from .._models import MLP, Gaussian
from .._trajectory import Trajectory
from ..plot import COLOURS
from ._conservation import candidates
from ._report import Claim, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: ‖W_h‖² of each layer at the start. The paper's unbalanced one is (10, 1, 0.1), where
#: its norms end near 45; here they end near 10 to 50.
STARTS = {
    "balanced": (0.1, 0.1, 0.1),
    "unbalanced": (2.0, 0.4, 0.1),
    "large": (100.0, 50.0, 20.0),
}
#: Standard deviation of the inputs' entries.
SPREADS = {"gaussian": 1.0, "uniform": 12**-0.5}
NEAR_ONE = 1.25


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Step sizes and time are in units of 1/(standard deviations of input and label)."""

    sizes: tuple[int, ...] = (50, 20, 20, 5)
    samples: int = 50
    data: tuple[str, ...] = ("gaussian", "uniform")
    label_variances: tuple[float, ...] = (1.0, 10.5)
    rates: tuple[float, ...] = (0.0125, 0.025, 0.05)
    time: float = 300.0
    seed: int = 0

    def described(self) -> str:
        """For a report."""
        return (
            f"The study: sizes {'-'.join(map(str, self.sizes))}, {self.samples} samples; "
            f"inputs N(0, 1) (gaussian) or uniform on [−½, ½]: {', '.join(self.data)}; "
            "labels of variance "
            f"{', '.join(f'{v:g}' for v in self.label_variances)}; each to time "
            f"{self.time:g}, with η of {', '.join(f'{r:g}' for r in self.rates)}, both "
            "over the product of the standard deviations of inputs and labels. Layers "
            + "; ".join(f"{k}: ‖W_h‖² of {v}" for k, v in STARTS.items())
            + " at the start."
        )


class Lane(NamedTuple):
    """One setting of the study."""

    start: str
    data: str
    label_variance: float

    @property
    def scale(self) -> float:
        """How much faster this runs than with inputs and labels of variance 1."""
        return SPREADS[self.data] * self.label_variance**0.5


def measure_study(config: StudyConfig) -> tuple[Table, Trajectory]:
    """A row for each setting and activation; and a tanh network's run with its account."""
    lanes = [
        Lane(*setting)
        for setting in itertools.product(STARTS, config.data, config.label_variances)
    ]
    rows: list[tuple[Any, ...]] = []
    for rate in config.rates:
        for lane, end in zip(lanes, _ends(config, lanes, rate), strict=True):
            rows.append((*lane, "relu", rate, *end))
    lane = Lane("unbalanced", config.data[0], config.label_variances[-1])
    tanh = _descent(
        config, *_posed(config, lane, jnp.tanh), config.rates[-1], ledger=True
    )
    norms = [np.asarray(v) for v in tanh.squared_norms.values()]
    gap = max(np.max(np.abs(np.asarray(law))) for law in tanh.laws.values())
    end = (*(norm[-1] for norm in norms), gap, float(tanh.losses[-1] / tanh.losses[0]))
    rows.append((*lane, "tanh", config.rates[-1], *end))
    names = (
        "start", "data", "label variance", "activation", "learning rate",
        "layer 1", "layer 2", "layer 3", "gap", "loss",
    )  # fmt: skip
    columns = zip(names, zip(*rows, strict=True), strict=True)
    return {name: np.array(column) for name, column in columns}, tanh


def _posed(
    config: StudyConfig, lane: Lane, activation: Any = "relu"
) -> tuple[MLP, tuple[Array, Array], Array]:
    """A network at its start, data, and the unit of time."""
    key_model, key_x, key_y = jr.split(jr.key(config.seed), 3)
    norms = STARTS[lane.start]
    sizes = config.sizes
    variance = [
        norm / (n_in * n_out)
        for norm, n_in, n_out in zip(norms, sizes[:-1], sizes[1:], strict=True)
    ]
    model = MLP(
        sizes, activation=activation, init=Gaussian(variance=variance), key=key_model
    )
    shape = (config.samples, sizes[0])
    uniform = jr.uniform(key_x, shape, minval=-0.5, maxval=0.5)
    x = jr.normal(key_x, shape) if lane.data == "gaussian" else uniform
    y = lane.label_variance**0.5 * jr.normal(key_y, (config.samples, sizes[-1]))
    return model, (x, y), jnp.asarray(1 / lane.scale)


def _descent(
    config: StudyConfig,
    model: MLP,
    data: tuple[Array, Array],
    unit: Array,
    rate: float,
    *,
    ledger: bool = False,
) -> Trajectory:
    steps = round(config.time / rate)
    return descend(
        model,
        data,
        steps,
        learning_rate=rate * unit,
        laws=[law for law in candidates(model) if law.contraction == "total"],
        record_every=max(1, steps // 100),
        ledger=ledger,
        throw=False,
    )


def _ends(
    config: StudyConfig, lanes: list[Lane], rate: float
) -> Float[np.ndarray, "lanes 5"]:
    """Final squared norms, the largest gap, and the final loss over the first."""
    posed = [_posed(config, lane) for lane in lanes]
    # The activations are the same in all: only arrays are stacked.
    arrays, rest = eqx.partition(posed, eqx.is_array)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)

    def one(arrays):
        model, data, unit = eqx.combine(arrays, rest[0])
        run = _descent(config, model, data, unit, rate)
        gap = jnp.max(jnp.abs(jnp.stack(list(run.laws.values()))))
        norms = [norm[-1] for norm in run.squared_norms.values()]
        return jnp.stack([*norms, gap, run.losses[-1] / run.losses[0]])

    return np.asarray(eqx.filter_vmap(one)(stacked))


def ratio(study: Table) -> Float[np.ndarray, " runs"]:
    """Largest over smallest squared norm at the end."""
    norms = np.stack([study[f"layer {h}"] for h in (1, 2, 3)])
    return norms.max(axis=0) / norms.min(axis=0)


def study_claims(study: Table) -> tuple[tuple[Claim, ...], tuple[Claim, ...]]:
    """What holds of small starts in every setting, and must not of others."""
    relu = study["activation"] == "relu"
    good = tuple(
        _claim(f"study, {start} small start", study, relu & (study["start"] == start))
        for start in ("balanced", "unbalanced")
    )
    bad = (
        _claim("study, large start", study, relu & (study["start"] == "large")),
        _claim("study, tanh, unbalanced small start", study, ~relu),
    )
    return good, bad


def _claim(name: str, study: Table, chosen: np.ndarray) -> Claim:
    ratios, gaps = ratio(study)[chosen], study["gap"][chosen]
    count = int(np.sum(ratios <= NEAR_ONE))
    return Claim(
        f"{name}: whatever the data, label scale and η, the largest ‖W_h‖² ends at most "
        f"{NEAR_ONE:g} times the smallest",
        f"{ratios.min():.3f} to {ratios.max():.3f} times; gaps ≤ {gaps.min():.2g} to "
        f"{gaps.max():.2g}; in {count} of {ratios.size} settings",
        count == ratios.size,
        printed="close to 1",
    )


def draw_study(ax: "Axes", study: Table) -> None:
    """The ratio at the end of every setting, by start and step size."""
    groups = [("balanced", "relu"), ("unbalanced", "relu"), ("large", "relu"),
              ("unbalanced", "tanh")]  # fmt: skip
    rates = np.unique(study["learning rate"])
    kinds = list(
        dict.fromkeys(zip(study["data"], study["label variance"], strict=True))
    )
    for place, (start, activation) in enumerate(groups):
        for (data, variance), marker, colour in zip(
            kinds, "os^D", COLOURS, strict=False
        ):
            chosen = (
                (study["start"] == start)
                & (study["activation"] == activation)
                & (study["data"] == data)
                & (study["label variance"] == variance)
            )
            shift = np.searchsorted(rates, study["learning rate"][chosen])
            x = place + 0.2 * (shift - (len(rates) - 1) / 2)
            ax.plot(x, ratio(study)[chosen], marker, color=colour, ms=7, alpha=0.8)
    for (data, variance), marker, colour in zip(kinds, "os^D", COLOURS, strict=False):
        ax.plot(
            [], [], marker, color=colour, ms=7,
            label=f"{data} inputs, labels of variance {variance:g}",
        )  # fmt: skip
    ax.axhline(1, color="0.6", lw=1, zorder=0)
    ax.axhline(NEAR_ONE, color="0.3", ls="--", lw=1.5)
    names = [f"{start}" if a == "relu" else "tanh" for start, a in groups]
    ax.set_xticks(range(len(groups)), names)
    several = ", η grows to the right" if len(rates) > 1 else ""
    ax.set(yscale="log", xlabel=f"start (small network{several})")
    ax.set_ylabel("largest / smallest ‖W_h‖² at the end")
    # Room for the legend above the points.
    ax.set_ylim(0.95, 2.2 * ratio(study).max())
    ticks = [1, 1.25, 2, 3, 5]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_title("balanced at the end, unless the start is large")
    ax.legend(frameon=False, loc="upper left", fontsize=9)
