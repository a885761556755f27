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
    for name, dims, values in recorded_variables(trajectory, batch):
        if name in data:
            raise ValueError(
                f"Two things that were recorded are called {name!r}: rename one of them "
                "in `observe`."
            )
        data[name] = (dims, values)
    data["result"] = (batch, names_of(trajectory.result, RESULTS))
    data |= {name: (batch, values) for name, values in numbers_of(trajectory).items()}
    labels = {"array": list(trajectory.squared_norms)}
    coordinates = {**_times(trajectory, batch), **labels}
    return xr.Dataset(data, coordinates, facts_of(trajectory))


def numbers_of(trajectory: Any) -> dict[str, np.ndarray]:
    """The numbers of `stats`, and names for the members of enumerations."""
    found = {}
    for key, value in trajectory.stats.items():
        if isinstance(value, StationaryKind):
            found[key] = names_of(value, StationaryKind)
        elif value is not None and not isinstance(value, str | Reason):
            found[key] = np.asarray(value)
    return found


def facts_of(trajectory: Any) -> dict[str, str]:
    """The facts of `stats`, reasons with their codes beside them."""
    facts = {}
    for key, value in trajectory.stats.items():
        if isinstance(value, Reason):
            facts |= {key: value.text, f"{key}_code": value.code}
        elif isinstance(value, str):
            facts[key] = value
    return facts


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
    for dim, name, every in time_axes(trajectory):
        if is_common:
            coordinates[dim] = ((dim,), first[::every])
        else:
            coordinates[name] = ((*batch, dim), ts[..., ::every])
    return coordinates


def time_axes(trajectory: Any) -> Iterator[tuple[str, str, int]]:
    """The axes of time: dimension, name of the times where runs differ, and thinning."""
    yield "time", "t", 1
    for name, every in trajectory.observed_every:
        if every > 1:
            yield f"time of {name}", f"t of {name}", every


def recorded_variables(
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
