"""Minibatches: every sample once in each epoch, in a new order each time."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Int, PRNGKeyArray, PyTree


class EpochOrder(eqx.Module):
    """The order of the current epoch's samples."""

    key: PRNGKeyArray
    permutation: Int[Array, " samples"]


class Batches(eqx.Module):
    """Batches of `size` out of `samples`; a last incomplete one is left out."""

    samples: int = eqx.field(static=True)
    size: int = eqx.field(static=True)

    def init(self, key: PRNGKeyArray) -> EpochOrder:
        """The state before the first step."""
        return EpochOrder(key, jnp.arange(self.samples))

    def take(
        self, order: EpochOrder, step: Int[Array, ""], data: PyTree
    ) -> tuple[PyTree, EpochOrder]:
        """The batch of a step, and the state after it."""
        per_epoch = self.samples // self.size
        position = step % per_epoch
        order = jax.lax.cond(position == 0, self._shuffle, lambda order: order, order)
        indices = jax.lax.dynamic_slice_in_dim(
            order.permutation, position * self.size, self.size
        )
        return jax.tree.map(lambda leaf: leaf[indices], data), order

    def _shuffle(self, order: EpochOrder) -> EpochOrder:
        key, shuffle_key = jr.split(order.key)
        return EpochOrder(key, jr.permutation(shuffle_key, self.samples))
