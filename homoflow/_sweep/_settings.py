"""The settings of a sweep: named axes, their product, and axes that go together."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from .._jax._text import short_repr


@dataclasses.dataclass(frozen=True)
class Column:
    """The values that one name takes along an axis.

    - `values`: as they were given, one for each setting.
    - `array`: the same as one array of numbers or of random keys, with the settings in
        front; `None` where they are something else.
    """

    values: tuple[Any, ...]
    array: Any

    def labels(self) -> np.ndarray:
        """What the axis of a data set is labelled by: numbers, or names."""
        if self.array is not None and not _is_key(self.array) and self.array.ndim == 1:
            return np.asarray(self.array)
        names = [_label(value) for value in self.values]
        is_unique = len(set(names)) == len(names)
        return np.array(names) if is_unique else np.arange(len(names))


@dataclasses.dataclass(frozen=True)
class Axis:
    """One dimension of a sweep, with the names whose values change along it."""

    dim: str
    columns: Mapping[str, Column]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())).values)


@final
@dataclasses.dataclass(frozen=True, repr=False)
class Settings:
    """The settings of a sweep, made by `homoflow.grid` and `homoflow.zipped`.

    `shape` says how many there are along each dimension, by its name.
    """

    axes: tuple[Axis, ...]

    @property
    def shape(self) -> dict[str, int]:
        return {axis.dim: len(axis) for axis in self.axes}

    @property
    def names(self) -> tuple[str, ...]:
        """What `run` is called with."""
        return tuple(name for axis in self.axes for name in axis.columns)

    def __len__(self) -> int:
        return int(np.prod([len(axis) for axis in self.axes], dtype=int))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{dim}: {size}" for dim, size in self.shape.items())
        return f"Settings({sizes})"


def grid(*parts: Settings, **axes: Iterable[Any]) -> Settings:
    """Every combination of the values of all axes.

    **Arguments:**

    - `parts`: settings that are axes already, such as those of `homoflow.zipped`.
    - `axes`: name → its values: a range, a list, an array, random keys, or anything else
        that `run` takes, such as activations.

    **Returns:** `homoflow.Settings`, with a dimension for each axis.

    **Raises:** `ValueError` for an axis without values or a name that is there twice,
    `TypeError` for values that cannot be listed.

    ```python
    hf.grid(seed=range(64), scale=[0.1, 1.0, 10.0])  # 192 settings
    ```
    """
    for part in parts:
        if not isinstance(part, Settings):
            raise TypeError(
                "`grid` takes axes by name, `grid(seed=range(64))`, and settings such as "
                f"those of `homoflow.zipped`; got {short_repr(part)}."
            )
    given = [axis for part in parts for axis in part.axes]
    own = [Axis(name, {name: _column(name, values)}) for name, values in axes.items()]
    return _checked(Settings((*given, *own)))


def zipped(dim: str, /, **columns: Iterable[Any]) -> Settings:
    """Names whose values change together, along one dimension called `dim`.

    **Raises:** `ValueError` unless all have as many values.

    ```python
    budget = hf.zipped("budget", learning_rate=[0.1, 0.01], steps=[100, 1000])
    hf.grid(budget, seed=range(64))  # 128 settings
    ```
    """
    if not isinstance(dim, str):
        raise TypeError(
            'The first argument of `zipped` is the name of its dimension, such as "pair"; '
            f"got {short_repr(dim)}."
        )
    if not columns:
        raise ValueError(f"`zipped({dim!r}, …)` needs names with their values.")
    found = {name: _column(name, values) for name, values in columns.items()}
    sizes = {name: len(column.values) for name, column in found.items()}
    if len(set(sizes.values())) > 1:
        text = ", ".join(f"`{name}` has {size}" for name, size in sizes.items())
        raise ValueError(
            f"What is zipped needs as many values of each name: {text}. For every "
            "combination of them use `homoflow.grid`."
        )
    return _checked(Settings((Axis(dim, found),)))


def as_settings(over: Any) -> Settings:
    """A user's `over`: settings, axes by name, or a list of settings one by one."""
    if isinstance(over, Settings):
        return _checked(over)
    if isinstance(over, Mapping):
        _check_names(over)
        return grid(**over)
    if isinstance(over, Sequence) and not isinstance(over, str | bytes):
        return _of_list(over)
    raise TypeError(
        "`over` must be axes by their names, such as `{'seed': range(64)}`, "
        "`homoflow.grid(…)`, `homoflow.zipped(…)`, or a list of settings such as "
        f"`[{{'seed': 0, 'scale': 0.1}}, …]`; got {short_repr(over)}."
    )


def check_names(run: Callable[..., Any], settings: Settings) -> None:
    """`TypeError` unless `run` can be called with the names of these settings."""
    if not callable(run):
        raise TypeError(
            f"`run` must be a function of the settings; got {short_repr(run)}."
        )
    try:
        signature = inspect.signature(run)
    except (TypeError, ValueError):  # Functions in C do not say.
        return
    kinds = inspect.Parameter
    parameters = signature.parameters.values()
    takes_all = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
    named = (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    known = [p.name for p in parameters if p.kind in named]
    unknown = [name for name in settings.names if name not in known]
    if unknown and not takes_all:
        raise TypeError(
            f"`run` has no argument `{unknown[0]}`: its arguments are "
            f"{', '.join(known) or 'none'}. Every axis of `over` must be one of them."
        )
    missing = [
        p.name
        for p in parameters
        if p.kind in named and p.default is kinds.empty and p.name not in settings.names
    ]
    if missing:
        raise TypeError(
            f"`run` needs `{missing[0]}`, which is no axis of `over`: add it, if with one "
            f"value, `{missing[0]}=[…]`, or give that argument a default."
        )


def _of_list(over: Sequence[Any]) -> Settings:
    if not over:
        raise ValueError("`over` is an empty list: a sweep needs settings.")
    for setting in over:
        if not isinstance(setting, Mapping):
            raise TypeError(
                "A list of settings holds dictionaries, such as "
                f"`{{'seed': 0, 'scale': 0.1}}`; got {short_repr(setting)}. Axes by name "
                "are a dictionary of lists."
            )
        _check_names(setting)
        if setting.keys() != over[0].keys():
            raise ValueError(
                "Every setting of a list must have the same names: the first has "
                f"{sorted(over[0])}, another {sorted(setting)}."
            )
    return zipped("setting", **{n: [s[n] for s in over] for n in over[0]})


def _check_names(names: Iterable[Any]) -> None:
    for name in names:
        if not isinstance(name, str) or not name.isidentifier():
            raise TypeError(
                f"`over` has the name {short_repr(name)}: names are those of `run`'s "
                "arguments."
            )


def _checked(settings: Settings) -> Settings:
    if not settings.axes:
        raise ValueError("A sweep needs an axis, such as `seed=range(64)`.")
    for what, names in (
        ("The dimension", [axis.dim for axis in settings.axes]),
        ("The name", settings.names),
    ):
        twice = [name for i, name in enumerate(names) if name in names[:i]]
        if twice:
            raise ValueError(f"{what} `{twice[0]}` is there twice in these settings.")
    return settings


def _column(name: str, values: Any) -> Column:
    if isinstance(values, str | bytes | Mapping) or not (
        isinstance(values, Iterable) or hasattr(values, "__array__")
    ):
        raise TypeError(
            f"`{name}` must be a list of its values, a range or an array; got "
            f"{short_repr(values)}. A single value is `{name}=[…]`."
        )
    if getattr(values, "ndim", None) == 0:
        raise TypeError(f"`{name}` is one value: write `{name}=[…]`.")
    listed = tuple(values)
    if not listed:
        raise ValueError(f"`{name}` has no values.")
    return Column(listed, _as_array(name, values, listed))


def _as_array(name: str, values: Any, listed: tuple[Any, ...]) -> Any:
    """One array of all values if they are numbers or keys, in JAX's dtypes."""
    if all(_is_key(value) for value in listed):
        return values if _is_key(values) else jnp.stack(listed)
    if any(isinstance(value, str | bytes) or callable(value) for value in listed):
        return None
    try:
        given = np.asarray(values if hasattr(values, "dtype") else list(listed))
    except (TypeError, ValueError):  # values of different shapes, or no numbers
        return None
    if given.dtype.kind not in "biufc":
        return None
    array = np.asarray(jnp.asarray(given))
    if given.dtype.kind in "iu" and not np.array_equal(array, given):
        raise ValueError(
            f"`{name}` has integers that {array.dtype} cannot hold: take smaller ones, or "
            "`jax.config.update('jax_enable_x64', True)`."
        )
    return array


def _is_key(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _label(value: Any) -> str:
    if isinstance(value, str):
        return value
    return getattr(value, "__name__", None) or short_repr(value)
