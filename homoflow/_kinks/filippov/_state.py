"""A point on the flow, with its mode: which pairs are on which side, and which slide.

Tables over pairs have the shape (samples, kinks). A *side* is −1 or 1, or 0 while the
pair slides. Every pair also has a *base side*, which is not 0: that of the slope from
which multipliers count (see `_sliding_field.py`).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._active_pairs import ActivePairs
from ._event_log import NO_EVENT
from ._sliding_field import Groups


class FlowPoint(NamedTuple):
    """Weights, and L and ẇ there. `max_abs_z` is the largest |z|: the scale of z."""

    w: Float[Array, " weights"]
    loss: Float[Array, ""]
    velocity: Float[Array, " weights"]
    max_abs_z: Float[Array, ""]


class PairTables(NamedTuple):
    """What is known of every pair.

    - `side`, `base`: the side, and that of the base slope.
    - `at_zero`: whether z = 0.
    - `disconnected`: pairs with z = 0 and ∂z/∂w = 0, because every unit below is off.
    - `ambiguous`: disconnected pairs whose side depends on which of the sliding pairs
        below leaves its kink first.
    - `constrained`: pairs on a side with z = 0 that stay there, because sliding pairs
        imply it. Their sides are not monitored.
    - `choice`: the kind of event where the side is one of several possible ones.
    """

    side: Int[Array, "samples kinks"]
    base: Int[Array, "samples kinks"]
    at_zero: Bool[Array, "samples kinks"]
    disconnected: Bool[Array, "samples kinks"]
    ambiguous: Bool[Array, "samples kinks"]
    constrained: Bool[Array, "samples kinks"]
    choice: Int[Array, "samples kinks"]

    @staticmethod
    def from_sides(side: Int[Array, "samples kinks"]) -> "PairTables":
        """Of pairs that are not at their kinks."""
        no = jnp.zeros(side.shape, bool)
        none = jnp.full(side.shape, NO_EVENT, jnp.int32)
        return PairTables(side, side, no, no, no, no, none)

    @property
    def leaves_kink(self) -> Bool[Array, "samples kinks"]:
        """The pairs at their kink that are about to leave it."""
        leaves = self.at_zero & (self.side != 0)
        return leaves & ~self.disconnected & ~self.constrained


class Sliding(NamedTuple):
    """The pairs that slide.

    - `groups`: those of them whose rows are parallel.
    - `leads`: the slots with the leaders of groups, which have the multipliers.
    - `multiplier`, `width`: of groups, from the minus side.
    """

    pairs: ActivePairs
    groups: Groups
    leads: Bool[Array, " slots"]
    multiplier: Float[Array, " slots"]
    width: Float[Array, " slots"]


class Extrapolation(NamedTuple):
    """Time derivatives at the end of the last step, with which the next is predicted.

    - `acceleration`: ẅ.
    - `multiplier_rate`, `width_rate`: those of the sliding pairs.
    """

    acceleration: Float[Array, " weights"]
    multiplier_rate: Float[Array, " slots"]
    width_rate: Float[Array, " slots"]


class State(NamedTuple):
    """A point on the flow at time t, from which the next step goes on.

    - `step`: the length that error control allows for that step.
    - `is_retry`: the event here must be resolved, at the start for the first time.
    - `is_forced`: no way on was found. So a short step is taken along the velocity, at
        whose end the event is resolved.
    """

    t: Float[Array, ""]
    point: FlowPoint
    tables: PairTables
    sliding: Sliding
    extrapolation: Extrapolation
    step: Float[Array, ""]
    is_retry: Bool[Array, ""]
    is_forced: Bool[Array, ""]

    @staticmethod
    def start(
        w: Float[Array, " weights"],
        side: Int[Array, "samples kinks"],
        max_abs_z: Float[Array, ""],
        capacity: int,
    ) -> "State":
        """At time 0, when only the sides are known."""
        zero, no = jnp.zeros((), w.dtype), jnp.asarray(False)
        none = jnp.zeros(capacity, w.dtype)
        samples, kinks = side.shape
        pairs = ActivePairs.empty((samples, kinks), capacity)
        return State(
            t=zero,
            point=FlowPoint(w, zero, jnp.zeros_like(w), max_abs_z),
            tables=PairTables.from_sides(side),
            sliding=Sliding(
                pairs, Groups.apart(capacity), jnp.zeros(capacity, bool), none, none
            ),
            extrapolation=Extrapolation(jnp.zeros_like(w), none, none),
            step=jnp.ones((), w.dtype),
            is_retry=~no,
            is_forced=no,
        )

    @property
    def hint(self) -> "ContinuationHint":
        return ContinuationHint(self.is_retry, self.point.velocity)


class ContinuationHint(NamedTuple):
    """Where an event must be resolved again (`is_retry`), the velocity found before."""

    is_retry: Bool[Array, ""]
    velocity: Float[Array, " weights"]
