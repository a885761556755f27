"""What does not change along a walk: the edge, what is recorded, and tolerances."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..._dynamics.edge._edge import Edge, Motion
from ._walk import Candidate, State

#: Gaps, relative to the threshold: below some tolerances, but not above and below these, an
#: eigenvalue joins those that are there already.
_JOINS, _LEAST_JOINS, _MOST_JOINS = 10, 1e-6, 1e-2
#: Eigenvalues of X below this part of the largest are zero.
_RANK_RTOL = 1e-8


class Setting(NamedTuple):
    """What does not change along a walk.

    - `rates`: what is integrated beside the weights.
    - `record`: what is kept of a state.
    - `times`: to record at, within [0, end].
    """

    edge: Edge
    rates: Callable[[Motion], Float[Array, " sums"]]
    record: Callable[[State], PyTree]
    times: Float[Array, " times"]
    end: Float[Array, ""]
    rtol: Float[Array, ""]
    max_steps: Int[Array, ""]

    def state(
        self, candidate: Candidate, w: Array, motion: Motion, shift: Array
    ) -> State:
        """A candidate, once it was looked at."""
        event = self.event(motion, candidate.num)
        return State(
            candidate.t,
            w,
            candidate.sums,
            self.slope(motion),
            motion,
            candidate.num,
            event,
            shift,
        )

    def slope(self, motion: Motion) -> Float[Array, " all"]:
        """d(weights, sums)/dτ, as one vector."""
        return jnp.concatenate([motion.velocity, self.rates(motion)])

    def event(self, motion: Motion, num: Array) -> Float[Array, ""]:
        """Positive if an eigenvalue has come to the threshold, or one is to leave it."""
        edge = self.edge
        gap = jnp.where(num > 0, self.joins, 0)
        enters = motion.spectrum.values[num] / edge.threshold - (1 - gap)
        is_pinned = jnp.arange(edge.max_critical) < num
        # What is not pinned must not be the smallest.
        largest = jnp.max(jnp.abs(motion.hold))
        filler = jnp.diag(jnp.where(is_pinned, 0, 2 * largest + 1))
        smallest = jnp.linalg.eigvalsh(motion.hold + filler)[0]
        leaves = jnp.where(num > 0, -smallest / jnp.where(largest > 0, largest, 1), -1)
        return jnp.maximum(enters, leaves)

    @property
    def joins(self) -> Float[Array, ""]:
        """The gap from which on an eigenvalue joins those at the threshold."""
        return jnp.clip(_JOINS * self.rtol, _LEAST_JOINS, _MOST_JOINS)

    def near(self, motion: Motion, gap: float | Array) -> Int[Array, ""]:
        """How many eigenvalues are at the threshold, or below it by a part of it."""
        values = motion.spectrum.values
        return jnp.sum(values >= self.edge.threshold * (1 - gap))

    def rank(self, oscillation: Array) -> Int[Array, ""]:
        """How many directions oscillate."""
        values = jnp.linalg.eigvalsh(oscillation)
        return jnp.sum(values > _RANK_RTOL * jnp.max(jnp.abs(values)))
