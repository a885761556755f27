"""A trajectory as a labelled data set of xarray's."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from .._jax._enumerations import names_of
from ._reason import Reason
from ._stationary_kind import StationaryKind
from ._status import RESULTS

Variable = tuple[tuple[str, ...], np.ndarray]


def make_dataset(trajectory: Any, batch_dims: Sequence[str] | None) -> Any:
    """The data set of a `Trajectory`: see `Trajectory.to_xarray`."""
    try:
        import xarray as xr
    except ImportError as error:
        raise ImportError(
            "`to_xarray` needs xarray: `pip install xarray`, or homoflow with its extra, "
            "`pip install 'homoflow[xarray]'`."
        ) from error
    batch = _batch_dims(np.ndim(trajectory.ts), batch_dims)
    data: dict[str, Variable] = {}
    for name, dims, values in _recorded(trajectory, batch):
        if name in data:
            raise ValueError(
                f"Two things that were recorded are called {name!r}: rename one of them "
                "in `observe`."
            )
        data[name] = (dims, values)
    data["result"] = (batch, names_of(trajectory.result, RESULTS))
    facts = {}
    for key, value in trajectory.stats.items():
        if isinstance(value, Reason):
            facts |= {key: value.text, f"{key}_code": value.code}
        elif isinstance(value, str):
            facts[key] = value
        elif isinstance(value, StationaryKind):
            data[key] = (batch, names_of(value, StationaryKind))
        elif value is not None:
            data[key] = (batch, np.asarray(value))
    labels = {"array": list(trajectory.squared_norms)}
    return xr.Dataset(data, {**_times(trajectory, batch), **labels}, facts)


def _batch_dims(ndim: int, asked: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the axes in front of time."""
    if asked is None:
        if ndim > 2:
            raise ValueError(
                f"This batch has {ndim - 1} axes: name them, such as "
                '`to_xarray(batch_dims=("width", "seed"))`.'
            )
        return ("seed",)[: ndim - 1]
    if len(asked) != ndim - 1:
        raise ValueError(
            f"`batch_dims` must name the {ndim - 1} axes in front of time; got "
            f"{tuple(asked)}."
        )
    return tuple(asked)


def _times(trajectory: Any, batch: tuple[str, ...]) -> dict[str, Variable]:
    """The time coordinates, `time` and those of observables with their own times.

    Runs that were recorded at different times have them as `t`, beside the index.
    """
    ts = np.asarray(trajectory.ts)
    first = ts.reshape(-1, ts.shape[-1])[0]
    is_common = bool(np.all(ts == first))
    coordinates: dict[str, Variable] = {}
    thinned = ((n, every) for n, every in trajectory.observed_every if every > 1)
    for dim, name, every in (
        ("time", "t", 1),
        *((f"time of {n}", f"t of {n}", every) for n, every in thinned),
    ):
        if is_common:
            coordinates[dim] = ((dim,), first[::every])
        else:
            coordinates[name] = ((*batch, dim), ts[..., ::every])
    return coordinates


def _recorded(
    trajectory: Any, batch: tuple[str, ...]
) -> Iterator[tuple[str, tuple[str, ...], np.ndarray]]:
    """Name, dimensions and values of everything over time."""
    over_time = (*batch, "time")
    yield "losses", over_time, np.asarray(trajectory.losses)
    yield "grad_norms", over_time, np.asarray(trajectory.grad_norms)
    squares = [np.asarray(s) for s in trajectory.squared_norms.values()]
    if squares:
        yield "squared_norms", (*over_time, "array"), np.stack(squares, -1)
    for name, values in trajectory.laws.items():
        values = np.asarray(values)
        yield name, (*over_time, *_law_dims(name, values.ndim - len(over_time))), values
    every = dict(trajectory.observed_every)
    for name, value in trajectory.observed.items():
        time = "time" if every.get(name, 1) == 1 else f"time of {name}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(value):
            values = np.asarray(leaf)
            label = name + "".join(_step_label(step) for step in path)
            rest = range(values.ndim - len(over_time))
            axes = (f"{label} axis {i}" for i in rest)
            yield label, (*batch, time, *axes), values


def _law_dims(name: str, ndim: int) -> tuple[str, ...]:
    """The axes of a law's value: its units, or rows and columns of a matrix over them."""
    names = {0: (), 1: ("unit",), 2: ("row", "column")}
    axes = names.get(ndim, tuple(f"axis {i}" for i in range(ndim)))
    return tuple(f"{name} {axis}" for axis in axes)


def _step_label(step: Any) -> str:
    """One step into a container, as `.name` or `.0`."""
    for attribute in ("name", "key", "idx"):
        if hasattr(step, attribute):
            return f".{getattr(step, attribute)}"
    return f".{step}"
