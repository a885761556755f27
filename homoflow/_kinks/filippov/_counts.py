"""How often things happened along an exact flow."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int

_NAMES = (
    "gradients",
    "rows",
    "forward",
    "crossings",
    "entries",
    "exits",
    "leaps",
    "largest_sliding_set",
)
#: What was computed at a point that is given up was still computed.
_WORK = 3


class Counts(eqx.Module):
    """Counts for `stats`, in one array: XLA compiles a kernel for every number."""

    numbers: Int[Array, " counts"]

    @staticmethod
    def zeros() -> "Counts":
        return Counts(jnp.zeros(len(_NAMES), int))

    def __getitem__(self, name: str) -> Int[Array, ""]:
        return self.numbers[_NAMES.index(name)]

    def plus(self, **more: Array | int) -> "Counts":
        """With these added."""
        added = [jnp.asarray(more.get(name, 0), int) for name in _NAMES]
        return Counts(self.numbers + jnp.stack(added))

    def with_sliding(self, number: Array) -> "Counts":
        """With so many pairs sliding at one time."""
        return Counts(self.numbers.at[-1].max(number.astype(self.numbers.dtype)))

    def undone(self, before: "Counts") -> "Counts":
        """The work of these, and `before` in everything that did not happen after all."""
        is_work = jnp.arange(len(_NAMES)) < _WORK
        return Counts(jnp.where(is_work, self.numbers, before.numbers))


def how_many(masks: list[Array]) -> Int[Array, " masks"]:
    """How many entries are true in each, in one product: XLA splits every sum in two."""
    ones = jnp.ones(masks[0].size, jnp.float32)
    flat = jnp.stack([mask.ravel() for mask in masks])
    return (flat.astype(jnp.float32) @ ones).astype(jnp.int32)
