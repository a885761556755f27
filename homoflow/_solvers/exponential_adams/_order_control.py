"""Order and size of an Adams method's next step."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

#: The next step is aimed at this share of what the error allows.
SAFETY = 0.9
#: Steps grow if by this much at least, and at most by this much: after the first, while
#: there are few, and later.
MIN_GROWTH, MAX_FIRST_GROWTH, MAX_EARLY_GROWTH, MAX_GROWTH = 1.2, 100.0, 5.0, 2.0
NUM_EARLY_STEPS = 10
#: At most so much smaller is a rejected step repeated: the first, which is a guess, any
#: later one, and one that was not finite.
MAX_FIRST_SHRINKAGE, MAX_SHRINKAGE, COLLAPSE = 1e-5, 0.2, 0.1

#: Where J leaves a stiffness above the first number, h·‖ΔN‖/‖Δw‖, the order comes down to
#: the second. High orders become unstable first, and by their own estimates they would
#: stay: of what oscillates the differences fall from order to order, if slowly.
STABLE = ((2.0, 4), (5.0, 2))


def next_order_and_factor(
    num_known: Int[Array, ""],
    order: Int[Array, ""],
    errors: Float[Array, "3"],
    stiffness: Float[Array, ""],
    max_order: int,
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """From the errors of a step at orders − 1, + 0, + 1, in units of the tolerance.

    The order with the largest step is taken; a lower one only if its error is the lower
    one as well, for then differences of higher order have ceased to fall, be it by
    instability, or if the `stiffness` that J leaves is too much for the order. Orders rise
    with the number of known values at first. At most `max_order`; errors at orders that
    are out of the question are infinite.
    """
    exponents = (order + jnp.arange(3, dtype=order.dtype)).astype(errors.dtype)
    factors = SAFETY * jnp.maximum(errors, 1e-10) ** (-1 / exponents)
    is_falling = errors[1] < errors[0]
    is_young = (num_known == order) & (order < max_order)
    stable = jnp.asarray(max_order, order.dtype)
    for min_stiffness, highest in STABLE:
        stable = jnp.where(stiffness > min_stiffness, min(highest, max_order), stable)
    down = (~is_falling & (factors[0] > factors[1])) | (order > stable)
    up = ~down & jnp.where(is_young, is_falling, factors[2] > factors[1])
    up &= order < stable
    change = jnp.where(down, -1, jnp.where(up, 1, 0)).astype(order.dtype)
    # The error of an order that is not known yet is taken for that of this one.
    factor = jnp.where(
        down, factors[0], jnp.where(up & ~is_young, factors[2], factors[1])
    )
    growth = jnp.where(num_known <= NUM_EARLY_STEPS, MAX_EARLY_GROWTH, MAX_GROWTH)
    growth = jnp.where(num_known == 1, MAX_FIRST_GROWTH, growth)
    grown = jnp.where(factor > MIN_GROWTH, jnp.minimum(factor, growth), 1)
    smallest = jnp.where(num_known == 1, MAX_FIRST_SHRINKAGE, MAX_SHRINKAGE)
    shrunk = jnp.maximum(factors[1], smallest)
    shrunk = jnp.where(jnp.isfinite(errors[1]), shrunk, COLLAPSE)
    factor = jnp.where(errors[1] <= 1, grown, shrunk)
    return order + change, factor.astype(errors.dtype)
