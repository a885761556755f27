"""Counters for `stats`: the work and the events of an exact flow."""

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
    "forced_steps",
    "largest_sliding_set",
)
#: The first of them count evaluations. These were made also for steps that are rejected.
_NUM_WORK = 3


class Counts(eqx.Module):
    """All counters in one array, because XLA compiles a kernel for every scalar."""

    values: Int[Array, " counts"]

    @staticmethod
    def zeros() -> "Counts":
        return Counts(jnp.zeros(len(_NAMES), int))

    def __getitem__(self, name: str) -> Int[Array, ""]:
        return self.values[_NAMES.index(name)]

    def add(self, **more: Array | int) -> "Counts":
        added = [jnp.asarray(more.get(name, 0), int) for name in _NAMES]
        return Counts(self.values + jnp.stack(added))

    def record_sliding(self, number: Int[Array, ""]) -> "Counts":
        """With so many pairs that slide at one time."""
        return Counts(self.values.at[-1].max(number.astype(self.values.dtype)))

    def reject(self, before: "Counts") -> "Counts":
        """With the events of `before`, and the work that was done since nevertheless."""
        is_work = jnp.arange(len(_NAMES)) < _NUM_WORK
        return Counts(jnp.where(is_work, self.values, before.values))


def count_true(masks: list[Array]) -> Int[Array, " masks"]:
    """How many entries of each mask are true.

    In one matrix product, because XLA compiles two kernels for every sum.
    """
    ones = jnp.ones(masks[0].size, jnp.float32)
    flat = jnp.stack([mask.ravel() for mask in masks])
    return (flat.astype(jnp.float32) @ ones).astype(jnp.int32)
