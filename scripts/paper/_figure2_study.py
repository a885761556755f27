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

from homoflow import MLP, Gaussian, Trajectory, descend
from homoflow.plot import COLOURS

from ._conservation import candidates
from ._labels import NORM, plain_ticks
from ._report import Claim, Table
from ._steps import ROUNDING, balance_change, norms_by_start, ratio

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
LAYERS = ("layer 1", "layer 2", "layer 3")


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
    tanh = _descent(config, *_posed(config, lane, jnp.tanh), config.rates[-1])
    rows.append((*lane, "tanh", config.rates[-1], *np.asarray(_end_of(tanh))))
    names = (
        "start", "data", "label variance", "activation", "learning rate",
        *(f"{layer} at start" for layer in LAYERS), *LAYERS, "gap", "left over", "loss",
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
) -> Trajectory:
    steps = round(config.time / rate)
    return descend(
        model,
        data,
        steps,
        learning_rate=rate * unit,
        laws=[law for law in candidates(model) if law.contraction == "total"],
        record_every=max(1, steps // 100),
        ledger=True,
        throw=False,
    )


def _ends(
    config: StudyConfig, lanes: list[Lane], rate: float
) -> Float[np.ndarray, "lanes 9"]:
    """`_end_of` every setting."""
    posed = [_posed(config, lane) for lane in lanes]
    # The activations are the same in all: only arrays are stacked.
    arrays, rest = eqx.partition(posed, eqx.is_array)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)

    def one(arrays):
        model, data, unit = eqx.combine(arrays, rest[0])
        return _end_of(_descent(config, model, data, unit, rate))

    return np.asarray(eqx.filter_vmap(one)(stacked))


def _end_of(run: Trajectory) -> Float[Array, " 9"]:
    """Squared norms at start and end; gap; what the account leaves over; loss by first."""
    norms = jnp.stack(list(run.squared_norms.values()), axis=1)
    gap = jnp.max(jnp.abs(jnp.stack(list(run.laws.values()))))
    others = jnp.stack([gap, balance_change(run).left, run.losses[-1] / run.losses[0]])
    return jnp.concatenate([norms[0], norms[-1], others])


def ratios(
    study: Table,
) -> tuple[Float[np.ndarray, " runs"], Float[np.ndarray, " runs"]]:
    """Largest over smallest squared norm at the end: as it is, and as the start says."""
    start = np.stack([study[f"{layer} at start"] for layer in LAYERS], axis=1)
    end = np.stack([study[layer] for layer in LAYERS], axis=1)
    return ratio(end), ratio(norms_by_start(start, end))


def study_claims(study: Table) -> tuple[tuple[Claim, ...], tuple[Claim, ...]]:
    """What holds of ReLU networks in every setting, and must not of tanh."""
    relu = study["activation"] == "relu"
    good = (_claim(start, study, relu & (study["start"] == start)) for start in STARTS)
    return tuple(good), (_claim("tanh, unbalanced", study, ~relu),)


def _claim(name: str, study: Table, chosen: np.ndarray) -> Claim:
    (ends, said), left = (r[chosen] for r in ratios(study)), study["left over"][chosen]
    count = int(np.sum(left <= ROUNDING))
    return Claim(
        f"study, {name} start: whatever the data, label scale and η, final ‖W_h‖² are "
        "those that ‖w‖², the differences at the start and Σ η²q(∇L) give",
        f"largest / smallest {_range(ends)} (so say the differences at the start: "
        f"{_range(said)}); left over ≤ {left.max():.1e} of ‖w‖² in {count} of "
        f"{left.size} settings",
        count == left.size,
        printed="close to 1",
    )


def _range(values: np.ndarray) -> str:
    low, high = f"{values.min():.3g}", f"{values.max():.3g}"
    return low if low == high else f"{low} to {high}"


def draw_study(ax: "Axes", study: Table) -> None:
    """The ratio at the end of every setting, against what the start says."""
    kinds = (("balanced", "relu", "o"), ("unbalanced", "relu", "s"),
             ("large", "relu", "D"), ("unbalanced", "tanh", "^"))  # fmt: skip
    ends, said = ratios(study)
    for (start, activation, marker), colour in zip(kinds, COLOURS, strict=False):
        chosen = (study["start"] == start) & (study["activation"] == activation)
        name = f"{start} start" if activation == "relu" else f"tanh, {start} start"
        ax.plot(
            said[chosen], ends[chosen], marker, color=colour, ms=8, alpha=0.7, mew=0,
            label=name,
        )  # fmt: skip
    limits = 0.95, 1.15 * max(ends.max(), said.max())
    ax.plot(limits, limits, color="0.5", lw=1, zorder=0)
    ax.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
    plain_ticks(ax.xaxis)
    plain_ticks(ax.yaxis)
    ax.set_xlabel("as the differences at the start and ‖w‖² say")
    ax.set_ylabel(f"largest / smallest {NORM} at the end")
    ax.set_title("many small networks: the start tells the ratio")
    ax.legend(frameon=False, loc="upper left")
