"""What a data set is, checked at the door and cast to the model's dtype."""

import numbers
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .._jax._dtypes import cast_floats
from .._jax._structural_cache import cached_by_structure
from .._jax._text import first_line
from .._jax._tracing import is_concrete, known_finite

_FILTER_VMAPPED: Any = type(eqx.filter_vmap(lambda x: x))


def as_samples(model: PyTree, data: Any, dtype: jnp.dtype) -> tuple[PyTree, Array]:
    """`data` as `(x, y)` with the samples along the leading axes.

    A list of numbers, or of lists of numbers, is an array; any other list is a pytree of
    inputs. Floating-point arrays are cast to `dtype`. Integer inputs are too, unless the
    model needs them as they are (an embedding's indices); integer targets are left to
    the loss, which knows whether they are classes.

    Raises `ValueError` if `data` is not a pair, is empty, has mismatched lengths, is
    not finite, or if the model cannot be applied to one sample.
    """
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise ValueError(
            "`data` must be a pair (x, y) of inputs and targets, with the samples along "
            "their first axes. For problems of another form pass `objective`."
        )
    x, y = map(_as_arrays, data)
    m = _sample_count(x, y, hint=_stack_hint(x, y))
    if m == 0:
        raise ValueError("`data` is empty: there are no samples.")
    _refuse_complex((x, y))
    refuse_nonfinite("data", (x, y))
    return _inputs_for(model, x, dtype), cast_floats(y, dtype)


def as_objective_data(data: Any, dtype: jnp.dtype) -> PyTree:
    """Data of a custom objective: any pytree of arrays, floats cast to `dtype`."""
    data = jax.tree.map(as_array, data)
    refuse_nonfinite("data", data)
    return cast_floats(data, dtype)


def sample_shape(x: PyTree[Array]) -> PyTree[jax.ShapeDtypeStruct]:
    """Shape and dtype of one of the samples stacked in `x`."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), x)


@cached_by_structure()
def shape_of(function: Callable, *given: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
    """Shape and dtype of what a function or model returns."""
    return eqx.filter_eval_shape(function, *given)


def refuse_nonfinite(what: str, tree: PyTree) -> None:
    """Raise `ValueError` if a concrete pytree holds NaN or inf."""
    if is_concrete(tree) and not known_finite(tree):
        raise ValueError(f"The {what} contain NaN or inf.")


def check_model(model: Any) -> None:
    """`TypeError` unless it can be applied to a sample."""
    if isinstance(model, type):
        raise TypeError(
            f"`model` is the class {model.__name__}: pass an instance, "
            f"`{model.__name__}(…)`."
        )
    if callable(model):
        return
    own = (
        " Its `.model` may be meant." if callable(getattr(model, "model", None)) else ""
    )
    raise TypeError(
        "`model` must be a function of one sample that holds its weights, such as an "
        f"Equinox module with `__call__`; got an object of type {type(model).__name__}, "
        f"which cannot be called.{own} Weights of another form, such as a dictionary, go "
        "with an `objective`."
    )


def _as_arrays(part: Any) -> PyTree[Array]:
    if not _is_nested_list(part):
        return jax.tree.map(as_array, part)
    try:
        return jnp.asarray(part)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "The data hold lists of numbers that make no array: rows must be of equal "
            f"lengths ({first_line(error)})."
        ) from error


def _is_nested_list(part: Any) -> bool:
    """Whether it is a list of numbers, or a list of such lists."""
    if not isinstance(part, list | tuple) or not part:
        return False
    return all(_is_number(entry) or _is_nested_list(entry) for entry in part)


def _is_number(entry: Any) -> bool:
    return isinstance(entry, numbers.Number | np.generic) or (
        isinstance(entry, jax.Array) and entry.ndim == 0
    )


def as_array(leaf: Any) -> Array:
    """A leaf of a user's data as an array; `TypeError` unless it holds numbers."""
    if isinstance(leaf, jax.Array):
        return leaf
    try:
        return jnp.asarray(leaf)
    except Exception as error:  # whatever an object of another library raises
        raise TypeError(
            f"The data hold a {type(leaf).__name__} that is no array of numbers "
            f"({first_line(error).rstrip('.')}): make it one, for example with "
            "`np.asarray(…, dtype=float)`."
        ) from error


def _refuse_complex(data: PyTree[Array]) -> None:
    if any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(data)):
        raise ValueError(
            "The data are complex: give real and imaginary parts as real arrays."
        )


def _stack_hint(*parts: PyTree[Array]) -> str:
    """What to do about data that may be lists of samples."""
    if not any(isinstance(part, list) for part in parts):
        return ""
    return (
        " A list of arrays stands for several inputs, each with the samples along its "
        "first axis: of a list of samples make one array, `jnp.stack(x)`."
    )


def _sample_count(x: PyTree[Array], y: PyTree[Array], hint: str) -> int:
    leaves = jax.tree.leaves((x, y))
    if not leaves or any(leaf.ndim == 0 for leaf in leaves):
        raise ValueError(
            "Inputs and targets need a first axis that counts the samples; a scalar "
            "has none."
        )
    counts = sorted({leaf.shape[0] for leaf in leaves})
    if len(counts) > 1:
        raise ValueError(
            f"Inputs and targets have different numbers of samples: {counts}. Both "
            f"count them along their first axis.{hint}"
        )
    return counts[0]


def _inputs_for(model: PyTree, x: PyTree[Array], dtype: jnp.dtype) -> PyTree[Array]:
    as_floats = jax.tree.map(lambda a: a.astype(dtype), x)
    error = _why_not_applicable(model, as_floats)
    if error is None:
        return as_floats
    as_given = cast_floats(x, dtype)
    if _why_not_applicable(model, as_given) is None:
        return as_given
    shapes = [s.shape for s in jax.tree.leaves(sample_shape(x))]
    raise ValueError(
        f"The model cannot be applied to one input sample of shape "
        f"{shapes[0] if len(shapes) == 1 else shapes}: {first_line(error)}. Inputs have "
        "shape (samples, …), and the model maps one sample to one output."
        f"{_remedy(model, x)}"
    ) from error


def _remedy(model: PyTree, x: PyTree[Array]) -> str:
    """What to do about a model that does not fit, where that can be guessed."""
    if isinstance(model, _FILTER_VMAPPED):
        return (
            " Of `equinox.filter_vmap(model)` pass the model itself: homoflow applies it "
            "to each sample."
        )
    return _stack_hint(x)


def _why_not_applicable(model: Callable, x: PyTree[Array]) -> Exception | None:
    try:
        shape_of(model, sample_shape(x))
    except Exception as error:  # whatever a user's model raises on a wrong shape
        return error
    return None
