"""Final models out of a sweep's data set."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._jax._text import path_text


def models_of(data: Any, like: PyTree, *, part: str = "") -> PyTree:
    """The final models of a sweep that was made with `models=True`.

    **Arguments:**

    - `data`: the data set of `homoflow.sweep`, or some of it: `data.sel(seed=3)`.
    - `like`: a model of the same structure, whatever its numbers.
    - `part`: where `run` returned several trajectories, the path of one, such as `flow`.

    **Returns:** `like` with the arrays of the data set, of all settings that it has: with
    their dimensions in front, as under vmap. Of a single setting it is a model. Those
    of settings without an answer are NaN.

    **Raises:** `ValueError` if there are no models, or `like` is of other shapes.

    ```python
    x = jax.random.normal(jax.random.key(1), (20, 3))

    def run(seed):
        model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(seed))
        return hf.descend(model, (x, x[:, :1]), 50, learning_rate=0.1, throw=False)

    data = hf.sweep(run, {"seed": range(4)}, models=True, progress=False)
    like = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    model = hf.models_of(data.sel(seed=2), like)
    model(x[0])
    ```
    """
    prefix = f"{part}." if part else ""
    places, structure = jax.tree_util.tree_flatten_with_path(like)
    filled = [
        _read(data, f"{prefix}model.{path_text(path)}", leaf)
        if eqx.is_array(leaf)
        else leaf
        for path, leaf in places
    ]
    return jax.tree.unflatten(structure, filled)


def _read(data: Any, name: str, like: Any) -> Any:
    if name not in data:
        has_any = any("model." in str(other) for other in data.data_vars)
        why = (
            "`like` has another structure"
            if has_any
            else "ask for the models with `homoflow.sweep(…, models=True)`"
        )
        raise ValueError(f"The data set has no `{name}`: {why}.")
    values = np.asarray(data[name])
    num_settings = values.ndim - like.ndim
    sizes = values.shape[num_settings:]
    fits = num_settings >= 0 and all(
        own <= there for own, there in zip(like.shape, sizes, strict=True)
    )
    inside = (..., *(slice(size) for size in like.shape)) if fits else ...
    rest = values.copy()
    rest[inside] = np.nan if values.dtype.kind == "f" else 0
    # Of settings of other widths there is NaN beyond a model's own arrays.
    if not fits or (sizes != like.shape and not np.isnan(rest).all()):
        raise ValueError(
            f"`like` is not the model of this data set: `{name}` has shape {like.shape} in "
            f"it and {sizes} in the data set."
        )
    return jnp.asarray(values[inside], like.dtype)
