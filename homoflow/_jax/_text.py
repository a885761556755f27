"""Errors and places in a pytree, as text for people."""

import jax
from jaxtyping import PyTree


def first_line(error: Exception) -> str:
    """The first line of an error's message: those of JAX go on for pages."""
    return str(error).strip().split("\n")[0]


def path_text(path: PyTree) -> str:
    """A leaf's path as Python would write it, such as `layers[0].weight`."""
    return jax.tree_util.keystr(path).lstrip(".")
