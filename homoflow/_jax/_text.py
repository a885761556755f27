"""Errors and places in a pytree, as text for people."""

import jax
from jaxtyping import PyTree

_MAX_LENGTH = 80


def first_line(error: Exception) -> str:
    """The first line of an error's message: those of JAX go on for pages."""
    return str(error).strip().split("\n")[0]


def short_repr(value: object) -> str:
    """What an object looks like, on one line that is not long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}…"


def path_text(path: PyTree) -> str:
    """A leaf's path as Python would write it, such as `layers[0].weight`."""
    return jax.tree_util.keystr(path).lstrip(".")
