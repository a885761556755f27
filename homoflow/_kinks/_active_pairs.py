"""The active pairs: (sample, kink) pairs whose pre-activation is at its kink."""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int


class ActivePairs(NamedTuple):
    """A list of pairs of fixed length, its *capacity*, as XLA needs it.

    - `flat_index`: the pair in each slot of the list, as sample · kinks + kink; 0 in a slot
        that is not used.
    - `is_used`: which slots hold a pair.
    - `slot`: the slot of every pair, or the capacity for a pair that has none.
    """

    flat_index: Int[Array, " slots"]
    is_used: Bool[Array, " slots"]
    slot: Int[Array, "samples kinks"]

    @staticmethod
    def empty(shape: tuple[int, int], capacity: int) -> "ActivePairs":
        slot = jnp.full(shape, capacity, jnp.int32)
        return ActivePairs(
            jnp.zeros(capacity, jnp.int32), jnp.zeros(capacity, bool), slot
        )

    @staticmethod
    def from_mask(mask: Bool[Array, "samples kinks"], capacity: int) -> "ActivePairs":
        """The pairs in the mask, or the first ones where there are more than fit."""
        slot = jnp.where(mask, jnp.minimum(_ranks(mask), capacity), capacity)
        indices = jnp.arange(mask.size, dtype=jnp.int32).reshape(mask.shape)
        unused = jnp.full(capacity, mask.size, jnp.int32)
        index = unused.at[slot].set(indices, mode="drop")
        is_used = index < mask.size
        return ActivePairs(jnp.where(is_used, index, 0), is_used, slot)

    @property
    def num_slots_used(self) -> Int[Array, ""]:
        """The number of slots up to the last that is used."""
        numbers = np.arange(1, self.is_used.size + 1, dtype=np.int32)
        return jnp.max(jnp.where(self.is_used, numbers, 0), initial=0)

    def truncate(self, capacity: int) -> "ActivePairs":
        """The list cut to its first slots."""
        few = slice(capacity)
        slot = jnp.minimum(self.slot, capacity)
        return ActivePairs(self.flat_index[few], self.is_used[few], slot)

    def scatter(
        self,
        table: Array,
        values: Array,
        where: Bool[Array, " slots"],
    ) -> Array:
        """A table over all pairs, with `values` in place of the pairs `where` it says."""
        capacity = self.flat_index.size
        slot = jnp.minimum(self.slot, capacity - 1)
        return jnp.where((self.slot < capacity) & where[slot], values[slot], table)

    def carry_over(self, values: Array, to: "ActivePairs") -> Array:
        """Values of these slots in those of another list, 0 for pairs not in this one."""
        slot = self.slot.ravel()[to.flat_index]
        is_known = to.is_used & (slot < self.flat_index.size)
        slot = jnp.minimum(slot, self.flat_index.size - 1)
        return jnp.where(is_known, values[slot], 0)

    def gather(self, table: Array) -> Array:
        """The entries of a table over all pairs that belong to the slots."""
        return table.ravel()[self.flat_index]

    def in_samples_with(
        self, mask: Bool[Array, "samples kinks"]
    ) -> Bool[Array, " slots"]:
        """Which slots have a pair of the mask in their sample."""
        return self.is_used & jnp.any(mask, 1)[self.flat_index // mask.shape[1]]


def _ranks(mask: Bool[Array, "samples kinks"]) -> Int[Array, "samples kinks"]:
    """How many entries of the mask are true before each entry.

    Written as two matrix products, because XLA turns a cumulative sum into many small
    kernels.
    """
    width = math.isqrt(mask.size - 1) + 1
    square = jnp.pad(mask.ravel(), (0, width**2 - mask.size)).reshape(width, width)
    square, lower = square.astype(jnp.float32), np.tri(width, k=-1, dtype=np.float32)
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    ranks = product(square, lower.T) + product(lower, square.sum(1))[:, None]
    return ranks.ravel()[: mask.size].reshape(mask.shape).astype(jnp.int32)
