"""Which pairs are at their kink at a point, and which of them nothing reaches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._system import System

#: |z| up to this times the largest |z| counts as 0.
_ON_KINK = 1e-10
#: A derivative up to this times the largest one counts as 0.
_NO_DERIVATIVE = 1e-9
#: How far sliding units are lifted to see which way the units above them would wake.
#: Small enough not to shift events by more than rounding does.
LIFT = 1e-11
#: How much more units are lifted that leave their kinks: those that slide on are at 0.
_LEAVING = 100.0
#: In how many other proportions sliding units are lifted, and by what least part.
_PROPORTIONS, _LEAST_PART = 4, 1e-2


class Way(NamedTuple):
    """The way on that was found at a point, if it has to be settled `again`.

    - `near`: the pairs with z = 0, `dormant` those that nothing reached; `held`: those
        that others keep at 0.
    """

    again: Bool[Array, ""]
    velocity: Float[Array, " weights"]
    near: Bool[Array, "samples kinks"]
    dormant: Bool[Array, "samples kinks"]
    held: Bool[Array, "samples kinks"]

    def moving(self, side: Int[Array, "samples kinks"]) -> Bool[Array, "samples kinks"]:
        """The pairs that this way takes off their kinks, to their `side`."""
        return self.near & (side != 0) & ~self.dormant & ~self.held


class Contact(NamedTuple):
    """The pairs `at_kink`; sides and base slopes in which `dormant` pairs are placed.

    `torn` are dormant pairs whose side depends on which of the sliders below opens first:
    the set of slopes that these may have is then more than the product of intervals.
    """

    at_kink: Bool[Array, "samples kinks"]
    dormant: Bool[Array, "samples kinks"]
    torn: Bool[Array, "samples kinks"]
    side: Int[Array, "samples kinks"]
    base: Int[Array, "samples kinks"]


def find_contact(
    system: System,
    w: Float[Array, " weights"],
    side: Int[Array, "samples kinks"],
    base: Int[Array, "samples kinks"],
    trigger: Bool[Array, "samples kinks"],
    largest: Float[Array, ""],
    way: Way,
) -> Contact:
    """Sort out the pairs with z = 0.

    A pair is dormant if z = 0 with zero derivative: no unit below it is on for its
    sample. It has no constraint to keep. Its slope is irrelevant until a kink below
    opens, and is then set by a one-sided derivative: by the sign that z takes when the
    kinks below are lifted a little. Where that depends on which of them opens first it
    keeps its side.

    Where a way on is known the kinks that open along it do reach the pairs above: these
    have constraints there, and begin on the sides that it takes them to.
    """
    known = (side == 0) | trigger | (way.again & way.near)
    opened = way.again & way.moving(side)
    near, is_reached = _near(system, w, base, known, opened, largest)
    base, side, follows = lax.cond(
        way.again,
        lambda: _along(system, w, side, base, way),
        lambda: (base, side, jnp.zeros_like(near)),
    )
    dormant = near & ~is_reached
    at_kink = near & is_reached
    # Sliders that nothing reaches any more: as they were where their group is open.
    side = jnp.where(dormant & (side == 0), -base, side)
    free = dormant & ~follows
    opens = at_kink & (side >= 0)
    lift = LIFT * jnp.where(side > 0, _LEAVING, 1) * opens.astype(w.dtype)

    slides = LIFT * (at_kink & (side == 0) & ~trigger).astype(w.dtype)
    among, one_by_one = (jnp.asarray(p, w.dtype) for p in _proportions(system.kinks))

    def place(base, side):
        def one_layer(number, carry):
            base, side, _ = carry
            # At last, with what slides on alone.
            is_last = number == system.function.depth
            lifted = jnp.where(is_last, slides, lift)
            z = jax.vmap(
                lambda part: system.preactivations(w, system.slope(base), lifted * part)
            )(jnp.where(is_last, one_by_one, among))
            seen = free & (jnp.abs(z) > 1e-3 * _LEAST_PART * LIFT)
            wakes = jnp.where(seen, jnp.sign(z), 0).astype(side.dtype)
            torn = jnp.any(wakes > 0, 0) & jnp.any(wakes < 0, 0)
            may_stay = is_last | jnp.any((wakes == side) & seen, 0)
            side = jnp.where(seen[0] & ~may_stay, wakes[0], side)
            return jnp.where(free, side, base), side, torn

        start = base, side, jnp.zeros_like(dormant)
        return lax.fori_loop(0, system.function.depth + 1, one_layer, start)

    def leave(base, side):
        return base, side, jnp.zeros_like(dormant)

    base, side, torn = lax.cond(jnp.any(free), place, leave, base, side)
    return Contact(at_kink, dormant, torn, side, base)


def _along(
    system: System, w: Array, side: Array, base: Array, way: Way
) -> tuple[Array, Array, Array]:
    """Base slopes and sides that dormant pairs have on a way on, and which follow it."""
    still = jnp.zeros_like(system.low)

    def one_layer(_, carry):
        base, side, _ = carry
        slopes = system.slope(base)
        _, rate = jax.jvp(
            lambda w: system.preactivations(w, slopes, still), (w,), (way.velocity,)
        )
        least = _NO_DERIVATIVE * jnp.max(jnp.abs(rate))
        follows = way.dormant & (jnp.abs(rate) > least)
        side = jnp.where(follows, jnp.sign(rate).astype(side.dtype), side)
        return jnp.where(follows, side, base), side, follows

    start = base, side, jnp.zeros_like(way.dormant)
    return lax.fori_loop(0, system.function.depth, one_layer, start)


def _proportions(kinks: int) -> tuple[np.ndarray, np.ndarray]:
    """Equal ones, then others; and some in which any two kinks differ, either way."""
    bits = np.arange(kinks) >> np.arange(max(kinks - 1, 1).bit_length())[:, None] & 1
    one_by_one = _LEAST_PART ** np.concatenate([bits, 1 - bits])
    exponents = np.random.default_rng(1).random((_PROPORTIONS, kinks))
    among = np.concatenate([np.ones((1, kinks)), _LEAST_PART**exponents])
    count = max(len(among), len(one_by_one))
    return np.resize(among, (count, kinks)), np.resize(one_by_one, (count, kinks))


def _near(
    system: System, w: Array, base: Array, known: Array, opened: Array, largest: Array
) -> tuple[Array, Array]:
    """The pairs with z = 0, and which z change with w while those pairs are flat.

    But for those that have `opened`.

    Along one generic direction: a derivative that vanishes along it vanishes. Being
    flat does not change z where z is 0 below: so both are found at once, in one pass
    unless more pairs are at their kinks than are `known` to be.
    """
    slopes, nothing = system.slope(base), jnp.zeros_like(system.low)
    flat = jnp.where(
        jnp.abs(system.low) <= jnp.abs(system.high), system.low, system.high
    )
    random = np.random.default_rng(0).standard_normal(w.size)
    direction = jnp.asarray(random, w.dtype)

    def one(carry):
        near, _, _ = carry

        def z_of(w):
            return system.preactivations(
                w, jnp.where(near & ~opened, flat, slopes), nothing
            )

        z, change = jax.jvp(z_of, (w,), (direction,))
        found = near | (jnp.abs(z) <= _ON_KINK * largest)
        return found, jnp.abs(change), jnp.any(found != near)

    start = known, nothing, jnp.asarray(True)
    near, change, _ = lax.while_loop(lambda carry: carry[2], one, start)
    return near, change > _NO_DERIVATIVE * jnp.max(change)
