"""Margins and directions of late flows, over the logarithm of time."""

from typing import TYPE_CHECKING

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, PyTree

from .._problem._log_risk import sample_margins
from .._problem._losses import LogisticLoss, LossLike
from .._problem._problem import make_problem
from .._problem._trainable import Trainable
from .._results._margin_certificate import MarginCertificate
from .._results._trajectory import Trajectory
from ._axes import COLOURS, axes_or_new, draw_legend
from ._batch import Runs, named_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def margins(
    run: Trajectory,
    data: PyTree,
    *,
    loss: LossLike = LogisticLoss(),  # noqa: B008
    trainable: Trainable = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """The normalized margin m_i/‖w‖^L of every sample over log t, support samples darker.

    The dashed line is the margin of the limit: the smallest ones come to it from below.

    **Arguments:** a run of `homoflow.flow` with `t1=jnp.inf` and `save_models=True` on
    separable data, and `data`, `loss` and `trainable` as given to it.

    **Raises:** `ValueError` for a run without models, or without a limit.

    ```python
    hf.plot.margins(run, data)
    ```
    """
    limit = _limit_of(run, "run")
    problem = make_problem(run.model, data, loss=loss, trainable=trainable)
    trained = eqx.filter(run.models, problem.mask)
    at = eqx.filter_jit(jax.vmap(lambda w: sample_margins(problem, w)))(trained)
    size = np.linalg.norm(_rows(trained, len(run.ts)), axis=1)
    values = np.asarray(at).reshape(len(run.ts), -1) / size[:, None] ** limit.degree
    log_ts, shown = _log_times(run)
    ax = axes_or_new(ax)
    support = np.ravel(np.asarray(limit.support))
    for is_support, colour, label in (
        (False, COLOURS[4], "other samples"),
        (True, COLOURS[0], "support samples"),
    ):
        lines = values[:, support == is_support]
        for i in range(lines.shape[1]):
            ax.plot(
                log_ts[shown],
                lines[shown, i],
                color=colour,
                linewidth=1.5 if is_support else 0.7,
                label=label if i == 0 else None,
            )
    ax.axhline(limit.margin, color=COLOURS[-1], linestyle="--", label="of the limit")
    ax.set_xscale("log")
    ax.set(xlabel="log t", ylabel="normalized margin m / ‖w‖ᴸ")
    draw_legend(ax)
    return ax


def distances(runs: Runs, *, ax: "Axes | None" = None) -> "Axes":
    """How far the direction of the weights is from its limit, over log t, both logarithmic.

    That is ‖w/‖w‖ − ŵ‖, the angle for small ones. With L layers it falls like
    (log t)^(−1/L).

    **Arguments:** runs as `margins` takes them.

    ```python
    hf.plot.distances({"2 layers": run})
    ```
    """
    runs = named_runs(runs)
    limits = {label: _limit_of(run, label) for label, run in runs.items()}
    ax = axes_or_new(ax)
    for i, (label, run) in enumerate(runs.items()):
        trained = _trained(run)
        units = _units(_rows([leaf for leaf, _ in trained], len(run.ts)))
        at = _units(_rows([leaf for _, leaf in trained], 1))
        log_ts, shown = _log_times(run)
        distance = np.linalg.norm(units - at, axis=1)
        name = f"{label} (degree {limits[label].degree:.3g})"
        ax.plot(log_ts[shown], distance[shown], color=COLOURS[i % 7], label=name)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set(xlabel="log t", ylabel="distance of directions ‖w/‖w‖ − ŵ‖")
    draw_legend(ax)
    return ax


def _limit_of(run: Trajectory, label: str) -> MarginCertificate:
    if run.limit is None or run.models is None:
        raise ValueError(
            f"{label!r} has no limit of directions, or not its models at all times: it "
            "takes a `homoflow.flow` on separable data with `t1=jnp.inf` and "
            "`save_models=True`."
        )
    return run.limit


def _log_times(run: Trajectory) -> tuple[np.ndarray, np.ndarray]:
    """log t, and where it is at least 1."""
    log_ts = np.asarray(run.observed["log_ts"])
    return log_ts, log_ts >= 1


def _trained(run: Trajectory) -> list[tuple[Array, Array]]:
    """The arrays that are there at every time, and the same at the end."""
    leaves = (
        jax.tree.leaves(eqx.filter(m, eqx.is_array)) for m in (run.models, run.model)
    )
    pairs = zip(*leaves, strict=True)
    return [(many, one) for many, one in pairs if many.ndim == one.ndim + 1]


def _rows(trained: PyTree, count: int) -> np.ndarray:
    leaves = [np.reshape(leaf, (count, -1)) for leaf in jax.tree.leaves(trained)]
    return np.concatenate(leaves, axis=1)


def _units(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
