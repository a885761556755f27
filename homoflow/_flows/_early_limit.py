"""`early_limit`: the saddles that a flow visits as its start vanishes."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._jax._tracing import is_concrete
from .._problem._losses import LossLike, SquaredLoss
from .._problem._problem import Objective
from .._problem._trainable import Trainable
from .._results._saddle import Saddle
from .._results._saddle_limit import SaddleLimit
from ._early_flow import early_flow
from ._saddles import saddles

#: How often the flow is recorded to find its saddles, and around each departure how often,
#: how many times, to date it.
_RECORDS, _REFINED, _ROUNDS = 401, 32, 2


def early_limit(
    model: PyTree,
    data: PyTree,
    *,
    log_sizes: Iterable[float] | Float[Array, "3"] = (-500.0, -1000.0, -2000.0),
    loss: LossLike = SquaredLoss(),  # noqa: B008
    objective: Objective | None = None,
    trainable: Trainable = None,
    tolerance: float = 1e-2,
    max_steps: int = 100_000,
) -> tuple[SaddleLimit, ...]:
    """The saddles that gradient flow visits from s times the weights, in the limit s → 0.

    From smaller and smaller starts the flow in units of log(1/s) becomes a sequence of
    jumps between saddles [Jacot et al. 2021; Pesme & Flammarion 2023]. It is followed by
    `homoflow.early_flow` from three sizes, and the times at which `homoflow.saddles` finds
    each saddle left, recorded densely there, are extrapolated: they are
    date·log(1/s) + offset, up to what vanishes with s.

    **Arguments:**

    - `log_sizes`: three values of log s, from the largest start to the smallest.
    - `tolerance`: as for `homoflow.saddles`; all others as for `homoflow.early_flow`.

    **Returns:** a `homoflow.SaddleLimit` for each saddle, in order, with error estimates.

    **Raises:** `ValueError` for models that `homoflow.early_flow` refuses, and where the
    three starts do not visit saddles of the same losses: smaller ones may.
    `homoflow.TrajectoryError` if a flow does not come to its end.

    ```python
    class Diagonal(eqx.Module):
        u: jax.Array
        v: jax.Array

        def __call__(self, x):
            return (self.u**2 - self.v**2) @ x

    x = jnp.array([[1.0, 0.5, 0.7, 0.0], [0.5, 1.0, 0.1, 0.7]])
    data = (x, jnp.array([1.0, 0.0]))
    limit = hf.early_limit(Diagonal(jnp.ones(4), jnp.ones(4)), data)
    [saddle.date for saddle in limit]  # 1, 4, 5.633
    ```
    """
    sizes = _checked_sizes(log_sizes)
    of_problem: dict[str, Any] = {
        "loss": loss,
        "objective": objective,
        "trainable": trainable,
    }

    def visited(log_size: float) -> tuple[Saddle, ...]:
        run_options = {"log_size": log_size, "max_steps": max_steps, "laws": ()}
        options = {**of_problem, **run_options}
        rest = early_flow(model, data, jnp.inf, **options)
        ts = np.linspace(0, float(rest.ts[-1]), _RECORDS)
        found: tuple[Saddle, ...] = ()
        for _ in range(1 + _ROUNDS):
            ts = _with_more(ts, found)
            run = early_flow(model, data, ts[-1], ts=ts, save_models=True, **options)
            found = saddles(run, data, tolerance=tolerance, **of_problem)
            found = tuple(s for s in found if np.isfinite(s.departure))
        return found

    sequences = [visited(size) for size in sizes]
    _refuse_different(sequences, sizes)
    return tuple(_extrapolated(same, sizes) for same in zip(*sequences, strict=True))


def _checked_sizes(log_sizes: Any) -> np.ndarray:
    if not is_concrete(log_sizes):
        raise ValueError("`log_sizes` must be known: outside of jit, vmap and grad.")
    sizes = np.asarray(tuple(log_sizes), float)
    is_good = sizes.shape == (3,) and np.all(np.isfinite(sizes)) and sizes[0] < 0
    if not (is_good and np.all(np.diff(sizes) < 0)):
        raise ValueError(
            "`log_sizes` must be three logarithms below 0, each below the one before; got "
            f"{log_sizes}."
        )
    return sizes


def _with_more(ts: np.ndarray, found: tuple[Saddle, ...]) -> np.ndarray:
    """The times with more of them where a saddle is left."""
    around = [
        np.linspace(
            s.departure - 2 * s.time_error, s.departure + 2 * s.time_error, _REFINED
        )
        for s in found
    ]
    more = np.unique(np.concatenate([ts, *around]))
    return more[(more >= 0) & (more <= ts[-1])]


def _refuse_different(sequences: list[tuple[Saddle, ...]], sizes: np.ndarray) -> None:
    losses = [np.array([s.loss for s in sequence]) for sequence in sequences]
    are_as_many = len({len(values) for values in losses}) == 1
    if are_as_many and all(
        np.allclose(values, losses[-1], rtol=1e-3, atol=1e-9) for values in losses
    ):
        return
    seen = "; ".join(
        f"{len(values)} from e^{size:g}"
        for values, size in zip(losses, sizes, strict=True)
    )
    raise ValueError(
        f"The starts do not visit the same saddles ({seen}): they are too large for the "
        "limit. Pass smaller `log_sizes`."
    )


def _extrapolated(same: tuple[Saddle, ...], sizes: np.ndarray) -> SaddleLimit:
    """One saddle's date and offset from its departures, by lines through two of them."""
    times = np.array([s.departure for s in same])
    errors = np.array([s.time_error for s in same])
    logs = -sizes

    def line(i: int, j: int) -> tuple[float, float]:
        slope = (times[j] - times[i]) / (logs[j] - logs[i])
        return slope, times[j] - slope * logs[j]

    date, offset = line(1, 2)
    earlier = line(0, 1)
    of_times = (errors[1] + errors[2]) / (logs[2] - logs[1])
    return SaddleLimit(
        saddle=same[-1],
        date=float(date),
        offset=float(offset),
        date_error=float(abs(date - earlier[0]) + of_times),
        offset_error=float(abs(offset - earlier[1]) + errors[2] + of_times * logs[2]),
    )
