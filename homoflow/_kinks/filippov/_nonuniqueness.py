"""Non-uniqueness: pairs that leave their kink, though they might slide along it as well.

Clarke's subdifferential is the convex hull of the gradients of the adjacent linear
pieces. Where kinks of one sample lie above each other, its elements are means over joint
distributions of the sides of these kinks. A slope at one kink is only a marginal of such
a distribution.

The multiplier λ_k depends on the sides that the kinks above k have *while k is on*. With
these, ∂L/∂a_k may have another sign than with their means. Then λ_k may be below 0 or
above the width. A pair that cannot slide with λ_k between 0 and the width may still
slide with such a λ_k. Both ways are solutions of the differential inclusion. (Gradient
descent may follow either: where the pair slides, it chatters.)
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ._sliding_field import Linearization, factorize_gram
from ._sliding_mode import Mode, compute_z_rate, max_constrained_rate

#: The fractions of time for which a pair is on at which its multiplier is bounded.
_FRACTIONS = np.linspace(0, 1, 33)
#: A pair with less of its squared row outside of the span of the sliding pairs' rows is
#: constrained by those.
_MIN_OUTSIDE = 1e-10


def may_keep_sliding(
    at: Linearization,
    mode: Mode,
    is_based_on_plus: Bool[Array, " slots"],
    leaves: Bool[Array, " slots"],
) -> Bool[Array, " slots"]:
    """Which of the pairs that leave might slide, with some joint distribution of sides.

    Each pair is tested by itself, while all sliding pairs go on sliding; it must be alone
    in its group. With more than two kinks above each other, the sides of those between
    count with their means.
    """
    slides = mode.state == 0
    rate = compute_z_rate(at, mode.multiplier)
    solve, _ = factorize_gram(at.gram, slides)
    plus = is_based_on_plus.astype(at.gram.dtype)
    from_minus = mode.multiplier + plus * mode.width
    nonzero_width = jnp.where(mode.width != 0, mode.width, 1)
    moves = leaves & (jnp.abs(rate) > max_constrained_rate(at))

    def may_slide(k):
        response = solve(at.gram[:, k, None])[:, 0]
        outside = at.gram[k, k] - at.gram[k] @ response
        is_free = outside > _MIN_OUTSIDE
        # The multiplier that would stop the pair.
        push = jnp.where(is_free, rate[k] / jnp.where(is_free, outside, 1), 0)
        # The fraction of time above its kink of each other pair, if this one is stopped.
        fraction = ((from_minus - response * push) / nonzero_width).clip(0, 1)
        width, least, most = _bound_multiplier(at, mode.width, plus, fraction, k)
        wanted = jnp.where(is_based_on_plus[k], width, 0) + push
        return is_free & (least <= wanted) & (wanted <= most)

    def test_next(carry):
        untested, result = carry
        k = jnp.argmax(untested)
        return untested.at[k].set(False), result.at[k].set(may_slide(k))

    # Nearly always there is one pair that leaves.
    start = moves, jnp.zeros_like(moves)
    return lax.while_loop(lambda carry: jnp.any(carry[0]), test_next, start)[1]


def _bound_multiplier(
    at: Linearization,
    width: Float[Array, " slots"],
    plus: Float[Array, " slots"],
    fraction: Float[Array, " slots"],
    k: Int[Array, ""],
) -> tuple[Float[Array, ""], ...]:
    """The width of pair k, and the least and largest multiplier that it may have.

    Multipliers count from the minus side. A kink l above k is on for a given `fraction`
    of the time. How much of it coincides with the time for which k is on is free, within
    the Fréchet bounds for joint distributions.
    """
    whole = at.slope_gap[k] * at.length[k]
    jumps = at.dz_da[:, k] * width * at.scale
    jumps = jnp.where(jnp.arange(width.size) == k, 0, jumps)
    alone = (at.dloss_da[k] - plus @ jumps) * whole
    jumps = jumps * whole
    on = jnp.asarray(_FRACTIONS, fraction.dtype)[:, None]
    most_overlap = jumps * jnp.minimum(on, fraction)
    least_overlap = jumps * jnp.maximum(on + fraction - 1, 0)
    least, most = (
        jnp.sum(pick(most_overlap, least_overlap), 1) + on[:, 0] * alone
        for pick in (jnp.minimum, jnp.maximum)
    )
    return alone + jumps @ fraction, jnp.min(least), jnp.max(most)
