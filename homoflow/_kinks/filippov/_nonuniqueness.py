"""Pairs that leave their kink where a joint choice of slopes would hold them there.

Clarke's set is the hull of the gradients of the adjacent cells. Where kinks of one sample
lie above each other it holds all joint distributions of their sides, of which slopes are
the means. What counts in λ_k are the sides that the kinks above have while k is on, and
between ∂L/∂a_k at these and at their means there may be a sign: then λ_k may be below 0
or above its width. A pair that is not held within these might as well be, and both are
flows. (Gradient descent may follow either: held, it chatters.)
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ._sliding_field import Point, gram_solver
from ._sliding_mode import Mode, held_rate, rate_of_change

#: For which parts of the time that a pair is on its multiplier is looked at.
_PARTS = np.linspace(0, 1, 33)
#: Rows of which less is outside of the span of the sliders' do not move by themselves.
_OUTSIDE = 1e-10


def might_stay(
    point: Point,
    mode: Mode,
    based_on_plus: Bool[Array, " slots"],
    leaves: Bool[Array, " slots"],
) -> Bool[Array, " slots"]:
    """Those of the pairs that leave that a joint choice of slopes might hold.

    Each by itself, while all sliders stay. Pairs are not tied to others. Of more than two
    kinks above each other, the sides of those between count with their means.
    """
    slides = mode.state == 0
    rate = rate_of_change(point, mode.multiplier)
    solve, _ = gram_solver(point, slides)
    share = solve(point.gram)
    outside = jnp.diagonal(point.gram) - jnp.sum(point.gram * share, 0)
    moves = leaves & (outside > _OUTSIDE) & (jnp.abs(rate) > held_rate(point))
    push = jnp.where(moves, rate / jnp.where(moves, outside, 1), 0)
    # Of each pair l, in the columns for each k that is held.
    plus = based_on_plus.astype(point.gram.dtype)
    from_minus = mode.multiplier + plus * mode.width
    wide = jnp.where(mode.width != 0, mode.width, 1)
    place = (from_minus[:, None] - share * push) / wide[:, None]
    width, least, most = _intervals(point, mode.width, plus, place.clip(0, 1))
    # The largest jump, of a pair that is on in all cells, is the width.
    wanted = jnp.where(based_on_plus, width, 0) + push
    return moves & (least <= wanted) & (wanted <= most)


def _intervals(
    point: Point,
    width: Float[Array, " slots"],
    plus: Float[Array, " slots"],
    place: Float[Array, "slots slots"],
) -> tuple[Float[Array, " slots"], ...]:
    """The width of each pair, and the least and the largest multiplier that it may have.

    From its minus side, where kinks l above k are on for the part `place[l, k]`. How much
    of that is while k is on, is free: all that can be, for all of them, or as little.
    """
    whole = point.gap * point.length
    turns = point.above * (width * point.scale)[:, None]
    turns = turns * (1 - jnp.eye(width.size, dtype=turns.dtype))
    alone = (point.jump - plus @ turns) * whole
    turns = turns * whole
    parts = jnp.asarray(_PARTS, place.dtype)[:, None, None]
    together = turns * jnp.minimum(parts, place)
    apart = turns * jnp.maximum(parts + place - 1, 0)
    least, most = (
        jnp.sum(pick(together, apart), 1) + parts[:, 0] * alone
        for pick in (jnp.minimum, jnp.maximum)
    )
    return alone + jnp.sum(turns * place, 0), jnp.min(least, 0), jnp.max(most, 0)
