"""Which arrays of a model are trained."""

import inspect
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._jax._text import first_line, path_text, short_repr

Trainable = PyTree[bool] | Callable[..., bool] | None


def trainable_mask(model: PyTree, trainable: Trainable = None) -> PyTree[bool]:
    """A bool for every leaf of `model`: whether it is trained.

    `trainable` is an Equinox filter: a function of a leaf, or a pytree of bools that is
    a prefix of the model. By default every floating-point array is trained.

    Raises `ValueError` if nothing is left to train, if a weight is of an integer type,
    or if one is complex.
    """
    if trainable is None:
        _refuse_integers(model)
        trainable = eqx.is_inexact_array
    mask = _expanded(model, trainable)
    chosen = [
        (path, leaf)
        for (path, leaf), m in zip(
            jax.tree_util.tree_leaves_with_path(model),
            jax.tree.leaves(mask),
            strict=True,
        )
        if m
    ]
    for path, leaf in chosen:
        _refuse_unless_real(path, leaf)
    if not any(leaf.size for _, leaf in chosen):
        raise ValueError(
            f"The model has no trainable array: nothing would move. {_remedy(model)}"
        )
    return mask


def _remedy(model: PyTree) -> str:
    if inspect.isroutine(model) or hasattr(model, "__wrapped__"):
        return (
            "It is a plain function, whose weights cannot be seen. Of `jax.vmap(model)` or "
            "`jax.jit(model)` pass the model itself: homoflow applies it to each sample."
        )
    return (
        "Check that its weights are floating-point JAX arrays, and that `trainable` "
        "selects some."
    )


def _expanded(model: PyTree, trainable) -> PyTree[bool]:
    left_out = object()
    for leaf in jax.tree.leaves(trainable):
        if isinstance(leaf, type) or not (isinstance(leaf, bool) or callable(leaf)):
            raise TypeError(
                "`trainable` must be a function from a leaf to True or False, or a pytree "
                f"of them like the model; it holds {short_repr(leaf)}."
            )
    try:
        chosen = eqx.filter(model, trainable, replace=left_out)
    except ValueError as error:
        raise ValueError(
            "`trainable` must be a function of a leaf, or a pytree of True and False of "
            f"the model's structure or a prefix of it: {first_line(error)}"
        ) from error
    return jax.tree.map(
        lambda leaf: leaf is not left_out and eqx.is_array(leaf), chosen
    )


def _refuse_integers(model: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        if eqx.is_array(leaf) and _is_integer(leaf):
            raise ValueError(
                f"The model's array at `{path_text(path)}` has the integer type "
                f"{leaf.dtype}. If it is a weight, make it floating point, for example "
                "with `.astype(float)`; if it is a constant, say so by passing "
                "`trainable=eqx.is_inexact_array`."
            )


def _refuse_unless_real(path, leaf) -> None:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"`trainable` selects `{path_text(path)}`, of type {leaf.dtype}: only "
            "real floating-point arrays can be trained."
        )


def _is_integer(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.dtype == jnp.bool_
