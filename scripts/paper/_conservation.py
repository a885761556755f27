"""Flows of small random networks, and how far their laws move: the measurement of §2."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from homoflow import (
    MLP,
    AbstractLoss,
    AbstractNetwork,
    Filippov,
    Law,
    Laws,
    LeakyReLU,
    Linear,
    LogisticLoss,
    ReLU,
    SquaredLoss,
    Trajectory,
    flow,
    laws,
)

from ._report import Claim, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOSSES: dict[str, AbstractLoss] = {"squared": SquaredLoss(), "logistic": LogisticLoss()}
#: Names for reports.
ACTIVATIONS = {
    "relu": "ReLU", "leaky_relu": "LeakyReLU", "linear": "linear", "tanh": "tanh",
}  # fmt: skip
_NOT_HOMOGENEOUS = {"tanh": jnp.tanh}
#: A quantity counts as conserved if it moves by this many relative tolerances at most:
#: local errors of that size add up over a run.
ALLOWANCE = 10.0

Data = tuple[Float[Array, "m ..."], Float[Array, "m p"]]


class Setting(NamedTuple):
    """A fully connected network, the number of samples, and the loss."""

    sizes: tuple[int, ...]
    activations: tuple[str, ...]
    samples: int
    loss: str = "squared"

    def draw(self, seed: int, *, use_bias: bool = False) -> tuple[MLP, Data]:
        """A network with Kaiming's start, standard Gaussian inputs, random targets."""
        key_model, key_data = jr.split(jr.key(seed))
        model = MLP(
            self.sizes,
            activation=[_NOT_HOMOGENEOUS.get(a, a) for a in self.activations],
            use_bias=use_bias,
            key=key_model,
        )
        shape = (self.sizes[0],)
        return model, random_data(
            key_data, self.samples, shape, self.sizes[-1], self.loss
        )


def random_data(
    key: Array, samples: int, in_shape: tuple[int, ...], outputs: int, loss: str
) -> Data:
    """Gaussian inputs; Gaussian targets, or their signs for the logistic loss."""
    key_x, key_y = jr.split(key)
    x = jr.normal(key_x, (samples, *in_shape))
    y = jr.normal(key_y, (samples, outputs))
    return x, (jnp.sign(y) if loss == "logistic" else y)


def candidates(model: AbstractNetwork) -> Laws:
    """Every law that the layers would have if all activations were linear.

    Recorded whether they are laws or not: what is not conserved must be seen to move.
    """
    linear = (Linear(),) * len(model.activations)
    return laws(eqx.tree_at(lambda m: m.activations, model, linear))


def exact_flow_of(
    model: Any, data: Data, t1: float, rtol: float, recorded: Iterable[Law], loss: str
) -> Trajectory:
    """The flow to a tolerance: the differential inclusion where there are kinks.

    Nothing restores the laws: whether they hold is what is measured. A run that does not
    finish holds NaN from there on, and satisfies no claim.
    """
    smooth = isinstance(model, AbstractNetwork) and not any(
        isinstance(a, ReLU | LeakyReLU) for a in model.activations
    )
    return flow(
        model,
        data,
        t1,
        loss=LOSSES[loss],
        solver=None if smooth else Filippov(),
        rtol=rtol,
        laws=recorded,
        project=False,
        throw=False,
    )


def relative_change(run: Trajectory, law: str) -> Float[np.ndarray, " times"]:
    """max |h(t) − h(0)| over the components of a law, relative to the largest ‖w‖²."""
    return relative_change_of(np.asarray(run.laws[law]), squared_size(run))


def relative_change_of(values: np.ndarray, size: float) -> Float[np.ndarray, " times"]:
    """The same of values over time, of any shape."""
    change = np.abs(values - values[:1]).reshape(len(values), -1)
    return change.max(axis=1) / size


def squared_size(run: Trajectory) -> float:
    """The largest ‖w‖² along a run."""
    return float(
        np.nanmax(np.sum([np.asarray(v) for v in run.squared_norms.values()], 0))
    )


def conservation_claim(
    text: str, changes: Sequence[float] | np.ndarray, rtol: float, *, seeds: int
) -> Claim:
    """That something is conserved in every run, for claims and for controls."""
    changes = np.asarray(changes)
    # NaN, of a run that did not finish, is not below the limit.
    kept = int(np.sum(changes <= ALLOWANCE * rtol))
    return Claim(
        text,
        f"changes by {spread(changes)} of ‖w‖² (rtol {rtol:.0e}); conserved in {kept} of "
        f"{changes.size} cases",
        kept == changes.size,
        printed="constant",
        seeds=seeds,
    )


def spread(values: Sequence[float] | np.ndarray) -> str:
    """The range of some positive numbers, in words."""
    values = np.asarray(values)
    unknown = int(np.sum(~np.isfinite(values)))
    if unknown:
        return f"an unknown amount ({unknown} of {values.size} runs did not finish)"
    return f"{values.min():.1e} to {values.max():.1e}"


def seeds_of(count: int, name: str, *, progress: Any = False) -> Iterable[int]:
    """0 … count − 1, with a bar if wanted."""
    if not progress:
        return range(count)
    from tqdm import trange

    return trange(count, desc=name)


def limit_table(rtol: float) -> Table:
    """What still counts as conserved, for a report's tables."""
    return {"change": np.array([ALLOWANCE * rtol])}


def draw_limit(ax: "Axes", table: Table) -> None:
    """A line at what still counts as conserved."""
    limit = float(table["change"][0])
    ax.axhline(limit, color="0.3", ls="--", lw=1.5)
    ax.annotate(
        "below: conserved, to tolerance", (0.02, limit), (0, 4),
        xycoords=ax.get_yaxis_transform(), textcoords="offset points", color="0.3",
    )  # fmt: skip
