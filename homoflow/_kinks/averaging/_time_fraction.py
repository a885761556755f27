"""The share of a step that a pre-activation spends above its kink."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Share(NamedTuple):
    """Of every pair: the share of the step above the kink, and whether it slides then.

    While a pair slides, its share counts as the slope's place between low and high.
    """

    above: Float[Array, "*pairs"]
    slides: Bool[Array, "*pairs"]


def share_above(
    z: Float[Array, "*pairs"],
    velocity: Float[Array, "*pairs"],
    assumed: Float[Array, "*pairs"],
    pull: Float[Array, "*pairs"],
    step: Float[Array, ""],
) -> Share:
    """The mean slope of Filippov's flow of one z during a step.

    z' = u − α·pull, with α = 0 below the kink, 1 above, and whatever keeps z = 0 between
    where both sides push towards it. `velocity` is z' at the slope `assumed`; then the
    velocities below and above are known, and the flow is that of two constants. A pull
    ≤ 0 (a kink that repels, or one whose pull is not known) makes z cross and never
    slide.
    """
    below = velocity + assumed * pull
    above = below - pull
    convex = (above < 0) & (below > 0)
    balance = below / jnp.where(convex, pull, 1)
    # The times at which z comes to its kink, as shares of the step.
    falls = jnp.where(above < 0, z / (-step * jnp.where(above < 0, above, -1)), 1)
    rises = jnp.where(below > 0, -z / (step * jnp.where(below > 0, below, 1)), 1)
    falls, rises = (jnp.clip(share, 0, 1) for share in (falls, rises))
    starts_above = z > 0
    hit = jnp.where(starts_above, falls, rises)
    before = jnp.where(starts_above, hit, 0)
    crossed = jnp.where(starts_above, before, 1 - hit)
    slid = before + (1 - hit) * balance
    return Share(jnp.where(convex, slid, crossed), convex & (hit < 1))
