"""The pairs of a sample and a kink that are at their kink, numbered."""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int


class Slots(NamedTuple):
    """The (sample, kink) pairs that are at their kink, in room for a fixed number.

    A pair's number is sample · kinks + kink; an unused slot holds 0. `place` is the
    slot of a pair, or the number of slots for a pair that has none.
    """

    pair: Int[Array, " slots"]
    used: Bool[Array, " slots"]
    place: Int[Array, "samples kinks"]

    @staticmethod
    def none(shape: tuple[int, int], room: int) -> "Slots":
        place = jnp.full(shape, room, jnp.int32)
        return Slots(jnp.zeros(room, jnp.int32), jnp.zeros(room, bool), place)

    @staticmethod
    def of(chosen: Bool[Array, "samples kinks"], room: int) -> "Slots":
        """Slots for the chosen pairs, the first `room` of them."""
        place = jnp.where(chosen, jnp.minimum(_ranks(chosen), room), room)
        numbers = jnp.arange(chosen.size, dtype=jnp.int32).reshape(chosen.shape)
        nothing = jnp.full(room, chosen.size, jnp.int32)
        pair = nothing.at[place].set(numbers, mode="drop")
        used = pair < chosen.size
        return Slots(jnp.where(used, pair, 0), used, place)

    def scattered(self, table: Array, values: Array, where: Array) -> Array:
        """`table` over all pairs with the values of the slots in `where` put in."""
        room = self.pair.size
        slot = jnp.minimum(self.place, room - 1)
        return jnp.where((self.place < room) & where[slot], values[slot], table)

    def beside(self, chosen: Bool[Array, "samples kinks"]) -> Bool[Array, " slots"]:
        """The slots with chosen pairs in their sample."""
        return self.used & jnp.any(chosen, 1)[self.pair // chosen.shape[1]]

    def gathered(self, table: Array) -> Array:
        """The entries of a table over all pairs that belong to the slots."""
        return table.ravel()[self.pair]


def _ranks(chosen: Bool[Array, "samples kinks"]) -> Int[Array, "samples kinks"]:
    """How many chosen entries come before each entry.

    As two matrix products: XLA makes a cumulative sum of many small kernels.
    """
    width = math.isqrt(chosen.size - 1) + 1
    square = jnp.pad(chosen.ravel(), (0, width**2 - chosen.size)).reshape(width, width)
    square, lower = square.astype(jnp.float32), np.tri(width, k=-1, dtype=np.float32)
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    ranks = product(square, lower.T) + product(lower, square.sum(1))[:, None]
    return ranks.ravel()[: chosen.size].reshape(chosen.shape).astype(jnp.int32)
