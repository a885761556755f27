"""The fraction of a step that a pre-activation spends above its kink."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class TimeFraction(NamedTuple):
    """Of every pair: the fraction of the step above the kink, and whether it slides.

    A pair that slides counts as above for the part α of the time, where its slope is
    low + α · (high − low).
    """

    above: Float[Array, "*pairs"]
    slides: Bool[Array, "*pairs"]


def fraction_above(
    z: Float[Array, "*pairs"],
    velocity: Float[Array, "*pairs"],
    assumed: Float[Array, "*pairs"],
    pull: Float[Array, "*pairs"],
    step: Float[Array, ""],
) -> TimeFraction:
    """The mean of α over a step of Filippov's flow of one pre-activation z.

    The flow is ż = u − α·pull with constant u and pull: α = 0 below the kink, 1 above,
    and whatever keeps z = 0 between, where both sides push towards it. `velocity` is ż at
    α = `assumed`, from which u follows. With pull ≤ 0 (the kink repels, or its pull is
    not known) z crosses and never slides.
    """
    below = velocity + assumed * pull
    above = below - pull
    convex = (above < 0) & (below > 0)
    balance = below / jnp.where(convex, pull, 1)
    # The times at which z comes to its kink, as fractions of the step.
    falls = jnp.where(above < 0, z / (-step * jnp.where(above < 0, above, -1)), 1)
    rises = jnp.where(below > 0, -z / (step * jnp.where(below > 0, below, 1)), 1)
    falls, rises = (jnp.clip(fraction, 0, 1) for fraction in (falls, rises))
    starts_above = z > 0
    hit = jnp.where(starts_above, falls, rises)
    before = jnp.where(starts_above, hit, 0)
    crossed = jnp.where(starts_above, before, 1 - hit)
    slid = before + (1 - hit) * balance
    return TimeFraction(jnp.where(convex, slid, crossed), convex & (hit < 1))
