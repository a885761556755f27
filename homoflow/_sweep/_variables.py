"""What a run returned, as named arrays with named axes."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._jax._enumerations import member_indices, member_names
from .._jax._text import short_repr
from .._results._stationary_kind import StationaryKind
from .._results._status import RESULTS
from .._results._trajectory import Trajectory
from .._results._xarray import facts_of, recorded_variables, time_axes

#: How a setting may end: as a run does, by an exception, or not at all yet.
RESULT_NAMES = (*member_names(RESULTS), "raised", "not_run")
RAISED, NOT_RUN = (RESULT_NAMES.index(name) for name in ("raised", "not_run"))
#: What the sweep itself says about every setting.
OWN_NAMES = ("result", "attempt")


class Variable(NamedTuple):
    """An array with the names of its axes, those of the settings left out."""

    dims: tuple[str, ...]
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What runs returned: of one setting, or of several along a leading axis.

    - `variables`: name → array.
    - `codes`: how each ended, as indices of `RESULT_NAMES`.
    - `labels`: dimension → the names of its places.
    - `times`: dimension of time → name of the variable that has its times.
    - `names`: variable of indices → the names that these stand for.
    - `facts`: what is the same for all of them.
    """

    variables: dict[str, Variable]
    codes: np.ndarray
    labels: dict[str, list[str]]
    times: dict[str, str]
    names: dict[str, list[str]]
    facts: dict[str, str]


def reduce_result(result: PyTree, *, models: bool) -> PyTree:
    """What is kept of a run's result; inside of a program the rest is not computed."""

    def reduce(part):
        if isinstance(part, Trajectory):
            left_out = dict.fromkeys(("events", "ledger", "continuation"))
            kept = eqx.filter((part.model, part.models), eqx.is_array)
            model, stacked = kept if models else (None, None)
            return dataclasses.replace(part, model=model, models=stacked, **left_out)
        if not eqx.is_array_like(part):
            raise TypeError(
                "`run` must return a trajectory, or a pytree of arrays and trajectories; "
                f"it returned {short_repr(part)}."
            )
        return jnp.asarray(part)

    return jax.tree.map(reduce, result, is_leaf=_is_trajectory)


def outcome_of(result: PyTree, num_axes: int) -> Outcome:
    """The named arrays of a reduced result; `num_axes` is 1 for several runs, else 0."""
    outcome = Outcome({}, np.zeros(()), {}, {}, {}, {})
    codes = None
    parts = jax.tree_util.tree_leaves_with_path(result, is_leaf=_is_trajectory)
    for path, part in parts:
        prefix = ".".join(_step_label(step) for step in path)
        if not isinstance(part, Trajectory):
            name = prefix or "value"
            values = np.asarray(part)
            axes = range(values.ndim - num_axes)
            dims = tuple(f"{name} axis {i}" for i in axes)
            _add(outcome.variables, name, Variable(dims, values))
            continue
        _add_trajectory(outcome, f"{prefix}." if prefix else "", part, num_axes)
        own = member_indices(part.result)
        codes = own if codes is None else np.where(codes == 0, own, codes)
    if not outcome.variables:
        raise ValueError(
            "`run` must return a trajectory, or a pytree of arrays or trajectories; it "
            "returned nothing of the kind."
        )
    if codes is None:
        first = next(iter(outcome.variables.values())).values
        codes = np.zeros(first.shape[:num_axes], int)
    return dataclasses.replace(outcome, codes=np.asarray(codes))


def _add_trajectory(
    outcome: Outcome, prefix: str, trajectory: Trajectory, num_axes: int
) -> None:
    batch = ("setting",)[:num_axes]
    variables = outcome.variables
    for name, dims, values in recorded_variables(trajectory, batch):
        own = tuple(prefix + dim for dim in dims[num_axes:])
        _add(variables, prefix + name, Variable(own, values))
    if prefix:
        result = Variable((), member_indices(trajectory.result))
        _add(variables, f"{prefix}result", result)
        outcome.names[f"{prefix}result"] = list(RESULT_NAMES)
    for name, value in trajectory.stats.numbers.items():
        if isinstance(value, StationaryKind):
            outcome.names[prefix + name] = list(member_names(StationaryKind))
            value = member_indices(value)
        _add(variables, prefix + name, Variable((), np.asarray(value)))
    ts = np.asarray(trajectory.ts)
    for dim, name, every in time_axes(trajectory):
        outcome.times[prefix + dim] = prefix + name
        values = Variable((prefix + dim,), ts[..., ::every])
        _add(variables, prefix + name, values)
    if trajectory.squared_norms:
        outcome.labels[f"{prefix}array"] = list(trajectory.squared_norms)
    outcome.facts.update({prefix + k: v for k, v in facts_of(trajectory).items()})
    for name, model in (("model", trajectory.model), ("models", trajectory.models)):
        time = (f"{prefix}time",) if name == "models" else ()
        for path, leaf in _arrays_of(model):
            label = f"{prefix}{name}.{path}"
            axes = range(np.ndim(leaf) - num_axes - len(time))
            dims = (*time, *(f"{label} axis {i}" for i in axes))
            _add(variables, label, Variable(dims, np.asarray(leaf)))


def _arrays_of(model: PyTree) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        if eqx.is_array(leaf):
            yield jax.tree_util.keystr(path).lstrip("."), leaf


def _add(variables: dict[str, Variable], name: str, variable: Variable) -> None:
    if name in variables or name in OWN_NAMES:
        raise ValueError(
            f"Two results of a setting are called {name!r}: rename one of them, in "
            "`observe` or in what `run` returns."
        )
    if "/" in name:
        raise ValueError(
            f"A result is called {name!r}: names of a data set have no '/'. Rename it."
        )
    variables[name] = variable


def _is_trajectory(part: Any) -> bool:
    return isinstance(part, Trajectory)


def _step_label(step: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(step, attribute):
            return str(getattr(step, attribute))
    return str(step)
